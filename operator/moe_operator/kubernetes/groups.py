"""Groups of pods that are one engine over several nodes, and how far a LeaderWorkerSet's rollout is. Pure.

A group serves only as a whole: its leader and each of its workers must be ready. The facts about labels, names and the
set's status are those of LeaderWorkerSet v0.10 (lws.sigs.k8s.io); v0.7 has no `observedGeneration`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moe_operator.plan.names import (
    CONFIG,
    LWS_GROUP_INDEX,
    LWS_NAME,
    LWS_SIZE,
    LWS_WORKER_INDEX,
    REVISION_DIGEST,
)
from moe_operator.plan.pod_status import ENGINE, component_of, is_ready

Document = dict[str, Any]
# Pods are called `SET-GROUP` for the leader and `SET-GROUP-WORKER`; a set's own name ends in a word.
_POD_NAME = re.compile(r"(?P<workload>.*[a-z])-(?P<index>\d+)(-\d+)?")
_OF_THE_TEMPLATE = (CONFIG, REVISION_DIGEST)


@dataclass(frozen=True, slots=True, kw_only=True)
class PodGroup:
    """The pods of one engine over several nodes.

    Attributes:
        workload: name of the LeaderWorkerSet.
        index: number of the group in it.
        size: pods that a whole group has.
        leader: the pod that serves; None while there is none.
        workers: the other pods that exist.
    """

    workload: str
    index: int
    size: int
    leader: Document | None
    workers: tuple[Document, ...]

    @property
    def pods(self) -> tuple[Document, ...]:
        """All pods, the leader first."""
        return self.workers if self.leader is None else (self.leader, *self.workers)

    @property
    def is_whole(self) -> bool:
        """Whether every pod of the group exists and is ready."""
        return self.leader is not None and len(self.pods) >= self.size and all(map(is_ready, self.pods))


def read_groups(pods: Sequence[Document], nodes: int) -> list[PodGroup]:
    """Returns the groups among the pods, in order; `nodes` is the size of one whose pods do not say it."""
    found: dict[tuple[str, int], list[Document]] = {}
    for pod in pods:
        place = _place(pod)
        if place is not None:
            found.setdefault(place, []).append(pod)
    return [_build_group(place, members, nodes) for place, members in sorted(found.items())]


def whole_replicas(pods: Sequence[Document], nodes: int) -> set[str]:
    """Returns the names of the pods that stand for an engine all of whose pods are ready."""
    whole = {_name(group.leader) for group in read_groups(pods, nodes) if group.leader is not None and group.is_whole}
    return whole | {
        _name(pod) for pod in pods if not is_in_group(pod) and component_of(pod) == ENGINE and is_ready(pod)
    }


def read_nodes(document: Mapping[str, Any]) -> int:
    """Returns how many nodes one engine of a resource spans, 1 where the resource does not say it rightly."""
    part: Any = document.get("spec")
    for name in ("engine", "parallelism", "nodes"):
        part = part.get(name) if isinstance(part, Mapping) else None
    return part if isinstance(part, int) else 1


def is_in_group(pod: Mapping[str, Any]) -> bool:
    """Returns whether a LeaderWorkerSet made the pod."""
    return LWS_WORKER_INDEX in pod["metadata"].get("labels", {})


def describe_rollout(live: Document, pods: Sequence[Document]) -> str:
    """Returns what a LeaderWorkerSet still has to update, empty when nothing.

    Groups that are merely not ready are no part of it. The status alone is not enough: it may be older than the
    template, and a group counts as updated before it is ready.
    """
    wanted, status, name = live["spec"].get("replicas", 1), live.get("status", {}), live["metadata"]["name"]
    groups = [group for group in read_groups(pods, _size(live)) if group.workload == name]
    current = [group for group in groups if _is_current(group, live)]
    updated = min(len(current), status.get("updatedReplicas", 0)) if groups else status.get("updatedReplicas", 0)
    surplus = max(status.get("replicas", 0), len(groups)) > wanted
    if updated < wanted or surplus or len(current) < len(groups):
        return f"{name}: {min(updated, wanted)} of {wanted} groups are up to date"
    if sum(group.is_whole for group in groups) >= wanted and (reason := _unfinished(status)):
        return f"{name}: its controller is at work ({reason})"
    return ""


def _unfinished(status: Mapping[str, Any]) -> str:
    """What the controller says that it still does; empty when it says that all groups are available."""
    rows = {row.get("type"): row for row in status.get("conditions", [])}
    for kind in ("UpdateInProgress", "Progressing"):
        if rows.get(kind, {}).get("status") == "True":
            return str(rows[kind].get("reason") or kind)
    if not rows or rows.get("Available", {}).get("status") == "False":
        return "not Available"
    return ""


def _is_current(group: PodGroup, live: Document) -> bool:
    """Whether every pod of the group is of the set's newest template, as far as the pods say of which they are."""
    parts = live["spec"]["leaderWorkerTemplate"]
    template = (parts.get("leaderTemplate") or parts["workerTemplate"]).get("metadata", {}).get("annotations", {})
    for pod in group.pods:
        own = pod["metadata"].get("annotations", {})
        if any(name in own and own[name] != template.get(name) for name in _OF_THE_TEMPLATE):
            return False
    return True


def _size(live: Document) -> int:
    return int(live["spec"]["leaderWorkerTemplate"].get("size", 1))


def _place(pod: Document) -> tuple[str, int] | None:
    labels = pod["metadata"].get("labels", {})
    if not is_in_group(pod) or component_of(pod) != ENGINE:
        return None
    name = _POD_NAME.fullmatch(_name(pod))
    if labels.get(LWS_GROUP_INDEX, "").isdecimal():
        workload = labels.get(LWS_NAME) or (name["workload"] if name else _name(pod))
        return workload, int(labels[LWS_GROUP_INDEX])
    return (name["workload"], int(name["index"])) if name else None


def _build_group(place: tuple[str, int], members: Sequence[Document], nodes: int) -> PodGroup:
    leaders = [pod for pod in members if pod["metadata"]["labels"][LWS_WORKER_INDEX] == "0"]
    said = [str(pod["metadata"].get("annotations", {}).get(LWS_SIZE, "")) for pod in members]
    # A pod of a person may have the labels and say anything.
    sizes = [int(size) if size.isdecimal() else nodes for size in said]
    return PodGroup(
        workload=place[0],
        index=place[1],
        size=max(sizes),
        leader=leaders[0] if leaders else None,
        workers=tuple(pod for pod in members if pod not in leaders),
    )


def _name(pod: Document) -> str:
    return str(pod["metadata"]["name"])
