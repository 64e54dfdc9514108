"""What became of groups of pods before they were made anew: one owner, the reconciler.

LeaderWorkerSet v0.10 deletes the whole group when a container of it is started again. The new pods have new uids and no
restarts, so what is wrong stands only in the pods that go. It is read there, and remembered until the group has been
whole for `STEADY`. An operator that starts anew learns of it at the next failure.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from moe_operator.api.reasons import Reason
from moe_operator.kubernetes.finding import LONGEST_MESSAGE, Finding
from moe_operator.kubernetes.groups import PodGroup, read_groups
from moe_operator.kubernetes.store import Key
from moe_operator.plan.names import REVISION_DIGEST
from moe_operator.plan.pod_status import ENGINE

Document = dict[str, Any]
# A group that was whole for so long has recovered.
STEADY = timedelta(minutes=10)
# A group is made anew for many a good reason, such as a node that is drained; more often than this it is a fault.
FEW = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupFailure:
    """How a container of a group ended, which made the controller make the group anew.

    Attributes:
        pod: name of its pod.
        reason: as the kubelet gives it, such as `OOMKilled`.
        status: exit status of the container.
    """

    pod: str
    reason: str
    status: int


@dataclass(slots=True)
class _Record:
    """What is known of one group: its leader's uid and revision, how often it was made anew, and its last failure."""

    leader: str = ""
    revision: str = ""
    remade: int = 0
    failure: GroupFailure | None = None
    whole_since: datetime | None = None


class GroupHistory:
    """The past of the groups of all resources."""

    def __init__(self) -> None:
        self._records: dict[Key, dict[tuple[str, int], _Record]] = {}

    def forget(self, key: Key) -> None:
        """Drops what is known of a resource that was deleted."""
        self._records.pop(key, None)

    def observe(self, key: Key, pods: Sequence[Document], nodes: int, now: datetime) -> list[Finding]:
        """Takes the pods of a resource as they are now; returns what is wrong with groups that were made anew."""
        groups = read_groups(pods, nodes)
        if not groups and key not in self._records:
            return []
        records = self._records.setdefault(key, {})
        findings = []
        for group in groups:
            record = records.setdefault((group.workload, group.index), _Record())
            _update(record, group, now)
            finding = _find(record, group)
            if finding is not None:
                findings.append(finding)
        return findings


def _update(record: _Record, group: PodGroup, now: datetime) -> None:
    if record.whole_since is not None and now - record.whole_since >= STEADY:
        # Without a change of the pods nobody looked meanwhile.
        record.remade, record.failure = 0, None
    metadata: Document = {} if group.leader is None else group.leader["metadata"]
    leader, revision = metadata.get("uid", ""), metadata.get("annotations", {}).get(REVISION_DIGEST, "")
    if leader and leader != record.leader:
        if revision == record.revision:
            record.remade += bool(record.leader)
        else:
            # An update: what was wrong before it may be mended by it.
            record.remade, record.failure = 0, None
        record.leader, record.revision = leader, revision
    record.failure = next(_failures(group), record.failure)
    if not group.is_whole:
        record.whole_since = None
    elif record.whole_since is None:
        record.whole_since = now
    elif now - record.whole_since >= STEADY:
        record.remade, record.failure = 0, None


def _failures(group: PodGroup) -> Iterator[GroupFailure]:
    """Ends that made the controller act, not those of pods that it ended itself."""
    for pod in group.pods:
        status = pod.get("status", {})
        for row in (*status.get("initContainerStatuses", ()), *status.get("containerStatuses", ())):
            ends = (row.get("lastState", {}), row.get("state", {}))
            last, present = (end.get("terminated") or {} for end in ends)
            end = present if present.get("reason") == "OOMKilled" else last
            if end.get("exitCode", 0):
                yield GroupFailure(pod=pod["metadata"]["name"], reason=end.get("reason", ""), status=end["exitCode"])


def _find(record: _Record, group: PodGroup) -> Finding | None:
    name, failure = f"{group.workload}-{group.index}", record.failure
    again = f"the group {name} was made anew {record.remade} times"
    if failure is not None and failure.reason == "OOMKilled":
        advice = "raise spec.engine.resources.memory or serve with less"
        return _build(Reason.OUT_OF_MEMORY, f"{advice} (pod {failure.pod}: OOMKilled; {again})", failure.pod)
    if group.is_whole or not record.remade:
        return None
    if failure is not None:
        advice = f"a container of pod {failure.pod} ended with status {failure.status}; see its log"
        return _build(Reason.CRASH_LOOPING, f"{advice} ({again})", failure.pod)
    if record.remade > FEW:
        return _build(Reason.CRASH_LOOPING, f"{again}; see the events of its LeaderWorkerSet", name)
    return None


def _build(reason: Reason, message: str, pod: str) -> Finding:
    return Finding(reason=reason, message=message[:LONGEST_MESSAGE], pod=pod, component=ENGINE)
