"""How far the workloads of a resource are with the newest template of their pods, from the store."""

from typing import Any

from moe_operator.kubernetes.children import WORKLOADS
from moe_operator.kubernetes.groups import describe_rollout
from moe_operator.kubernetes.kinds import LEADER_WORKER_SET, POD
from moe_operator.kubernetes.role_rollout import describe_wait
from moe_operator.kubernetes.store import Key, Store

Document = dict[str, Any]


def find_rollouts(store: Store, key: Key) -> list[str]:
    """Workloads of which not all pods are of the newest template yet, in words."""
    rolling = []
    for kind, live in store.children(key, WORKLOADS):
        spec, status = live.get("spec", {}), live.get("status", {})
        wanted, updated = spec.get("replicas", 1), status.get("updatedReplicas", 0)
        if kind == LEADER_WORKER_SET and not _is_unseen(live):
            rolling.append(describe_rollout(live, store.of(key, POD)))
        elif _is_unseen(live) or updated < wanted or status.get("replicas", 0) > updated:
            numbers = f"{live['metadata']['name']}: {updated} of {wanted} pods are up to date"
            # The operator pauses one role while the other rolls.
            rolling.append(numbers + (describe_wait(live, store.of(key, POD)) or _describe_pause(live)))
    return [text for text in rolling if text]


def _describe_pause(workload: Document) -> str:
    """What a person has to do where one has paused the rollout."""
    metadata = workload["metadata"]
    resume = f"kubectl rollout resume deployment/{metadata['name']} -n {metadata['namespace']}"
    return f" (its rollout is paused: {resume})" if workload["spec"].get("paused") else ""


def _is_unseen(workload: Document) -> bool:
    """Whether its controller has not looked at the newest template; that of LeaderWorkerSets up to v0.7 never says."""
    status = workload.get("status", {})
    if "observedGeneration" not in status:
        return not (workload["kind"] == LEADER_WORKER_SET.name and status.get("conditions"))
    return bool(status["observedGeneration"] < workload["metadata"].get("generation", 0))
