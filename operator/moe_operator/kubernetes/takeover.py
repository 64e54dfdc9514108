"""The change to another workload: engines of several nodes in place of engines of one, or engines of fixed roles in
place of engines of all roles, and back.

Leaders, single pods and pods of a role have the labels of the engines' Service, so gateways see all of them. With
`surge` the new workload has one engine more than are ready, and the old one gives up as many as are ready, as in a
rolling update: the number that serves stays, and one engine more than before has to find room. With `inPlace` the old
workload goes first, and so it does where all engines share one node, which may have no room for one more.
"""

from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from typing import Any

from moe_contract.api_server import Kind
from moe_scheduling.engine.disaggregation import EngineRole

from moe_operator.api.autoscaling import AutoscalingMode
from moe_operator.api.pods import Update
from moe_operator.api.resource import MoEServing
from moe_operator.autoscale.signal import States
from moe_operator.kubernetes.api import Api
from moe_operator.kubernetes.groups import is_in_group, whole_replicas
from moe_operator.kubernetes.kinds import DEPLOYMENT, LEADER_WORKER_SET
from moe_operator.kubernetes.store import Key, Store
from moe_operator.kubernetes.victims import mark_victims_of
from moe_operator.plan import Observed
from moe_operator.plan.cluster import STABLE, plan_replicas, stable_nodes
from moe_operator.plan.names import REVISION, ROLE, Names, is_replica
from moe_operator.plan.one_node import share_one_node
from moe_operator.plan.pod_status import label_of

Document = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Takeover:
    """A workload that still serves while another one takes over.

    Attributes:
        kind: of the old workload.
        old: the old workload.
        wanted: stable engines in all.
        ready: engines of the new workload that are wholly ready.
        other: another old workload of the same kind, where the engines had two roles.
        to_roles: whether roles change, and not the nodes of an engine.
    """

    kind: Kind
    old: Document
    wanted: int
    ready: int
    other: Document | None = None
    to_roles: bool = False

    @property
    def olds(self) -> tuple[Document, ...]:
        """The old workloads, one or two, as they were last seen."""
        return (self.old,) if self.other is None else (self.old, self.other)

    @property
    def new_replicas(self) -> int:
        """Engines that the new workload has for now: one more than are ready."""
        return min(self.wanted, self.ready + 1)

    @property
    def old_replicas(self) -> int:
        """Engines that the old workload keeps: those that no ready new one stands for, and never more than it has."""
        return min(max(0, self.wanted - self.ready), sum(map(_replicas, self.olds)))

    @property
    def text(self) -> str:
        """How far it is, for people."""
        if self.to_roles:
            names = " and ".join(old["metadata"]["name"] for old in self.olds)
            return f"engines of other roles take over from {names}, {self.ready} of {self.wanted} are ready"
        new = LEADER_WORKER_SET if self.kind == DEPLOYMENT else DEPLOYMENT
        name = self.old["metadata"]["name"]
        return f"{name}: a {new.name} takes over from the {self.kind.name}, {self.ready} of {self.wanted} are ready"


def read_takeover(
    store: Store,
    key: Key,
    resource: MoEServing,
    observed: Observed,
    pods: Sequence[Document],
    kinds: Container[Kind],
) -> Takeover | None:
    """Returns the takeover that goes on in a resource, None where there is none; `kinds` are those of the cluster."""
    if (roles := read_role_takeover(store, key, resource, observed, pods)) is not None:
        return roles
    name, several = Names(key.name).engine, store.get(key, LEADER_WORKER_SET, Names(key.name).engine)
    if several is None and resource.spec.engine.parallelism.nodes == 1:
        return None
    nodes = stable_nodes(resource, observed)
    kind = DEPLOYMENT if nodes > 1 else LEADER_WORKER_SET
    old = store.get(key, kind, name)
    if old is None or "deletionTimestamp" in old["metadata"]:
        return None
    wanted, scaled = plan_replicas(resource, observed), observed.scaled.get((kind.name, name))
    if scaled is not None and not _scales_itself(resource):
        # What another manager set serves on until as many new engines do.
        wanted = max(wanted, scaled.count)
    if kind == DEPLOYMENT and LEADER_WORKER_SET not in kinds:
        # What cannot be made takes over from nothing.
        return Takeover(kind=kind, old=old, wanted=wanted, ready=0)
    return plan_takeover(kind, old, resource.spec.engine.update, wanted, nodes, pods)


def plan_takeover(
    kind: Kind, old: Document, update: Update, wanted: int, nodes: int, pods: Sequence[Document]
) -> Takeover | None:
    """Returns the takeover that goes on; None when the old workload may go: it does not serve, or is no longer needed.

    Args:
        kind: of the old workload.
        old: the old workload.
        update: how engines are replaced.
        wanted: stable engines.
        nodes: that an engine spans.
        pods: of the resource.
    """
    if update is not Update.SURGE:
        return None
    whole = whole_replicas(pods, nodes)
    stable = [pod for pod in pods if pod["metadata"]["name"] in whole and _is_stable_replica(pod)]
    in_groups = sum(map(is_in_group, stable))
    singles = len(stable) - in_groups
    serving_old, ready_new = (in_groups, singles) if kind == LEADER_WORKER_SET else (singles, in_groups)
    if not serving_old or ready_new >= wanted:
        return None
    return Takeover(kind=kind, old=old, wanted=wanted, ready=ready_new)


def with_takeover(observed: Observed, takeover: Takeover | None) -> Observed:
    """Returns what is observed with the number of new engines for now."""
    return observed if takeover is None else replace(observed, first_replicas=takeover.new_replicas)


def with_old_workload(objects: Sequence[Document], takeover: Takeover | None) -> list[Document]:
    """Returns the objects that must stay: those of a plan and the workload that still serves."""
    return [*objects] if takeover is None else [*objects, *takeover.olds]


async def shrink_old_workload(
    api: Api,
    store: Store,
    key: Key,
    takeover: Takeover | None,
    pods: Sequence[Document],
    states: States,
) -> None:
    """Takes from the old workloads as many engines as new ones are ready; of single pods those with the least work."""
    if takeover is None:
        return
    kept = share_out([_replicas(old) for old in takeover.olds], takeover.old_replicas)
    for old, replicas in zip(takeover.olds, kept, strict=True):
        name = old["metadata"]["name"]
        if replicas < _replicas(old):
            await mark_victims_of(api, store, key, name, replicas, pods, states)
            patch = {"spec": {"replicas": replicas}}
            store.put(takeover.kind, await api.merge(takeover.kind, key.namespace, name, patch))


def share_out(present: Sequence[int], total: int) -> list[int]:
    """Returns the number that each workload keeps when they keep `total` in all: the largest one loses first."""
    kept = [*present]
    while sum(kept) > max(0, total):
        kept[kept.index(max(kept))] -= 1
    return kept


def read_role_takeover(
    store: Store, key: Key, resource: MoEServing, observed: Observed, pods: Sequence[Document]
) -> Takeover | None:
    """Returns the takeover between engines of fixed roles and others that goes on; None where there is none."""
    names, engine = Names(key.name), resource.spec.engine
    is_fixed = engine.roles.is_fixed
    if is_fixed:
        places = [(kind, names.engine) for kind in (DEPLOYMENT, LEADER_WORKER_SET)]
    else:
        places = [(DEPLOYMENT, names.of_role(role)) for role in (EngineRole.PREFILL, EngineRole.DECODE)]
    olds = [(kind, live) for kind, name in places if (live := store.get(key, kind, name)) is not None]
    olds = [(kind, live) for kind, live in olds if "deletionTimestamp" not in live["metadata"]]
    if not olds or engine.update is not Update.SURGE or share_one_node(resource, observed.one_node_claims):
        return None
    nodes = max(int(live["spec"].get("leaderWorkerTemplate", {}).get("size", 1)) for _, live in olds)
    whole = whole_replicas(pods, nodes)
    stable = [pod for pod in pods if pod["metadata"]["name"] in whole and _is_stable_replica(pod)]
    new = sum((label_of(pod, ROLE) != "") is is_fixed for pod in stable)
    wanted = plan_replicas(resource, observed)
    if new == len(stable) or new >= wanted:
        return None
    (kind, old), other = olds[0], olds[1][1] if len(olds) > 1 and olds[1][0] == olds[0][0] else None
    return Takeover(kind=kind, old=old, wanted=wanted, ready=new, other=other, to_roles=True)


def _replicas(workload: Document) -> int:
    return int(workload["spec"].get("replicas", 1))


def _scales_itself(resource: MoEServing) -> bool:
    """Whether the operator is the autoscaler of the engines."""
    autoscaling = resource.spec.autoscaling
    return autoscaling is not None and autoscaling.mode is AutoscalingMode.INTERNAL


def _is_stable_replica(pod: Document) -> bool:
    labels = pod["metadata"].get("labels", {})
    return labels.get(REVISION) == STABLE and is_replica(labels)
