"""Pod deletion costs by the work left in each engine, written before the engines are scaled down."""

from collections.abc import Sequence
from typing import Any

from moe_contract.agent_state import AgentState
from moe_contract.api_server import NOT_FOUND, ApiError
from moe_scheduling.fleet.victims import EngineWork, order_victims

from moe_operator.autoscale.signal import States
from moe_operator.kubernetes.api import Api
from moe_operator.kubernetes.kinds import DEPLOYMENT, POD
from moe_operator.kubernetes.store import Key, Store
from moe_operator.plan import ClusterPlan
from moe_operator.plan.cluster import STABLE
from moe_operator.plan.names import REVISION, ROLE, Names
from moe_operator.plan.pod_status import ENGINE, component_of, is_over, label_of

Document = dict[str, Any]
COST = "controller.kubernetes.io/pod-deletion-cost"


async def mark_victims(
    api: Api, store: Store, key: Key, plan: ClusterPlan, pods: Sequence[Document], states: States
) -> None:
    """Writes the deletion costs of the stable engines of each Deployment that the plan gives fewer than it has.

    A LeaderWorkerSet lets the replica with the highest number go, whatever it costs.
    """
    counts = {row.name: row.count.replicas for row in plan.roles} or {Names(key.name).engine: plan.replicas}
    for name, replicas in counts.items():
        await mark_victims_of(api, store, key, name, replicas, pods, states)


async def mark_victims_of(
    api: Api, store: Store, key: Key, name: str, replicas: int, pods: Sequence[Document], states: States
) -> None:
    """Writes the deletion costs of the stable engines of one Deployment when it is to have fewer than it has."""
    workload = store.get(key, DEPLOYMENT, name)
    if workload is None or replicas == 0 or replicas >= workload.get("spec", {}).get("replicas", 0):
        return
    role = workload["metadata"].get("labels", {}).get(ROLE, "")
    by_name = {pod["metadata"]["name"]: pod for pod in pods if is_stable_engine(pod) and label_of(pod, ROLE) == role}
    for victim in order_victims(_work(pod, states.engines.get(name)) for name, pod in by_name.items()):
        if _cost(by_name[victim.name]) != victim.cost:
            patch = {"metadata": {"annotations": {COST: str(victim.cost)}}}
            try:
                store.put(POD, await api.merge(POD, key.namespace, victim.name, patch))
            except ApiError as error:
                # It ended meanwhile.
                if error.status != NOT_FOUND:
                    raise


def is_stable_engine(pod: Document) -> bool:
    """Whether a pod runs an engine of the stable revision."""
    return component_of(pod) == ENGINE and label_of(pod, REVISION) == STABLE and not is_over(pod)


def _work(pod: Document, state: AgentState | None) -> EngineWork:
    draining = "deletionTimestamp" in pod["metadata"] or (state is not None and state.phase in ("draining", "stopped"))
    return EngineWork(
        name=pod["metadata"]["name"],
        # An engine without a state may be busy: it counts as ready.
        ready=state is None or state.ready,
        draining=draining,
        ranks=() if state is None else state.ranks,
        cost=_cost(pod),
    )


def _cost(pod: Document) -> int | None:
    text = pod["metadata"].get("annotations", {}).get(COST, "")
    return int(text) if text.lstrip("-").isdecimal() else None
