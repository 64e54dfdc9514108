"""Problems that stand in events alone: which objects to ask for, and what their events mean. Pure.

Kubelet, volume controllers and the controllers of StatefulSets and claims write no condition when they fail, only
events. Events are asked for only of an object that is not well:

- a pod on a node whose containers are not created for `CREATING_FOR`: volumes, network, sandbox,
- the StatefulSets of a LeaderWorkerSet that has fewer pods than it should: quota, Pod Security,
- the claims of a pod that cannot be scheduled because of one.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from moe_operator.api.reasons import Reason
from moe_operator.kubernetes.diagnosis import NOT_FOUND, parse_time
from moe_operator.kubernetes.finding import Finding, build_finding
from moe_operator.kubernetes.workload_problems import FORBIDDEN_ADVICE
from moe_operator.plan.names import COMPONENT, REVISION, is_replica
from moe_operator.plan.pod_status import component_of, condition_of, is_live, label_of

Document = dict[str, Any]
# A container is created within seconds unless its image is pulled, which has an event of its own.
CREATING_FOR = timedelta(seconds=20)
# Without any event for so long its node is not at work.
SILENT_FOR = timedelta(seconds=120)
# Each is one call; of many pods that fail alike the first few say why.
MOST_SUSPECTS = 4
LEADER_WORKER_SET = "LeaderWorkerSet"
_ATTACH = "a volume cannot be attached; one of access mode ReadWriteOnce may still be at another node"
_MOUNT = "a volume cannot be mounted"
_SANDBOX = "the node cannot set up the pod's network; look at its CNI plugin and its container runtime"
# The cause first: a volume that is not attached is not mounted either.
_POD_REASONS: Mapping[str, tuple[Reason, str]] = {
    "FailedAttachVolume": (Reason.FAILED_ATTACH_VOLUME, _ATTACH),
    "FailedCreatePodSandBox": (Reason.FAILED_SANDBOX, _SANDBOX),
    "FailedPodSandBoxStatus": (Reason.FAILED_SANDBOX, _SANDBOX),
    "NetworkNotReady": (Reason.FAILED_SANDBOX, _SANDBOX),
    "FailedMount": (Reason.FAILED_MOUNT, _MOUNT),
    "FailedMapVolume": (Reason.FAILED_MOUNT, _MOUNT),
}
_CREATING = "the container is not created"
_SET_REASONS = ("FailedCreate",)
_CLAIM_REASONS = ("ProvisioningFailed", "FailedBinding")


@dataclass(frozen=True, slots=True, kw_only=True)
class Suspect:
    """An object whose events may say what is wrong.

    Attributes:
        kind: of the object.
        name: of the object.
        uid: of the object; empty where it is not known.
        component: `engine` or `gateway`, what waits for it.
        since: since when it is not well; None where that is not known.
    """

    kind: str
    name: str
    uid: str = ""
    component: str = ""
    since: datetime | None = None


def find_suspects(pods: Sequence[Document], workloads: Iterable[Document], now: datetime) -> list[Suspect]:
    """The objects whose events are to be read, at most `MOST_SUSPECTS` of them."""
    live = sorted(filter(is_live, pods), key=_name)
    found = [*_sets(live, workloads), *_claims(live), *_creating(live, now)]
    return list(dict.fromkeys(found))[:MOST_SUSPECTS]


def _creating(pods: Iterable[Document], now: datetime) -> Iterator[Suspect]:
    for pod in pods:
        scheduled = condition_of(pod, "PodScheduled") or {}
        since = parse_time(scheduled.get("lastTransitionTime"))
        on_node = scheduled.get("status") == "True" and bool(pod["spec"].get("nodeName"))
        if on_node and since is not None and now - since > CREATING_FOR and _is_creating(pod):
            uid, component = pod["metadata"].get("uid", ""), component_of(pod)
            yield Suspect(kind="Pod", name=_name(pod), uid=uid, component=component, since=since)


def _is_creating(pod: Document) -> bool:
    """Whether no container has begun and none says why."""
    status = pod.get("status", {})
    rows = status.get("initContainerStatuses") or status.get("containerStatuses") or ()
    waiting = [row.get("state", {}).get("waiting", {}).get("reason") for row in rows]
    return status.get("phase") == "Pending" and all(reason in (None, "ContainerCreating") for reason in waiting)


def _sets(pods: Sequence[Document], workloads: Iterable[Document]) -> Iterator[Suspect]:
    """StatefulSets of LeaderWorkerSets: that of the leaders has its name, that of a group's workers the leader's."""
    for workload in workloads:
        if workload.get("kind") != LEADER_WORKER_SET:
            continue
        name, spec = workload["metadata"]["name"], workload.get("spec", {})
        size, replicas = spec.get("leaderWorkerTemplate", {}).get("size", 1), spec.get("replicas", 1)
        labels = workload["metadata"].get("labels") or {}
        own = [pod for pod in pods if all(label_of(pod, key) == labels.get(key) for key in (COMPONENT, REVISION))]
        leaders = [pod for pod in own if is_replica(pod["metadata"].get("labels") or {})]
        if len(leaders) < replicas:
            yield Suspect(kind="StatefulSet", name=name, component="engine")
            yield Suspect(kind=LEADER_WORKER_SET, name=name, component="engine")
        for leader in leaders:
            if sum(_name(pod).startswith(f"{_name(leader)}-") for pod in own) < size - 1:
                yield Suspect(kind="StatefulSet", name=_name(leader), component="engine")


def _claims(pods: Iterable[Document]) -> Iterator[Suspect]:
    for pod in pods:
        message = (condition_of(pod, "PodScheduled") or {}).get("message", "")
        if "persistentvolumeclaim" in message.lower():
            for volume in pod["spec"].get("volumes") or ():
                if claim := volume.get("persistentVolumeClaim", {}).get("claimName"):
                    yield Suspect(kind="PersistentVolumeClaim", name=claim, component=component_of(pod))


def read_events(suspect: Suspect, events: Iterable[Document], now: datetime) -> Finding | None:
    """What the events of an object say is wrong; None where they say nothing, or that it is on its way."""
    rows = sorted((row for row in events if _is_about(row, suspect)), key=_time_of, reverse=True)
    match suspect.kind:
        case "Pod":
            return _read_pod(suspect, rows, now)
        case "PersistentVolumeClaim":
            advice = "a volume for the claim is not made; check model.cache.storageClass and its provisioner"
            return _read_newest(suspect, rows, _CLAIM_REASONS, Reason.VOLUME_NOT_PROVISIONED, advice)
        case _:
            return _read_newest(suspect, rows, _SET_REASONS, Reason.FAILED_CREATE, FORBIDDEN_ADVICE)


def _read_pod(suspect: Suspect, rows: Sequence[Document], now: datetime) -> Finding | None:
    reason, advice = Reason.CONTAINER_CREATING, _CREATING
    pulls = [_time_of(row) for row in rows if row.get("reason") in ("Pulling", "Pulled")]
    # Volumes and network are there before the first image is pulled: what kept them away is over then.
    warnings = [row for row in rows if row.get("type") == "Warning" and not (pulls and _time_of(row) <= max(pulls))]
    for kind in _POD_REASONS:
        row = next((row for row in warnings if row.get("reason") == kind), None)
        if row is not None:
            reason, advice = _POD_REASONS[kind]
            return _finding(suspect, reason, _with_what_is_missing(advice, row), row)
    if pulls:
        # Its image is on its way, which for engines takes minutes; a failure has a status of its own.
        return None
    # What was wrong before the pod had its node, such as `FailedScheduling`, is over.
    newer = [row for row in warnings if suspect.since is None or _time_of(row) >= suspect.since]
    if newer:
        return _finding(suspect, reason, advice, newer[0])
    if suspect.since is not None and now - suspect.since > SILENT_FOR:
        quiet = "and there is no event that says why; is the kubelet of its node at work?"
        return _finding(suspect, reason, f"{advice}, {quiet}", {})
    return None


def _with_what_is_missing(advice: str, row: Document) -> str:
    match = NOT_FOUND.search(row.get("message", ""))
    if match is None:
        return advice
    kind = {"secret": "Secret", "configmap": "ConfigMap"}[match[1].lower()]
    return f"{advice}; make the {kind} {match[2]}"


def _read_newest(
    suspect: Suspect, rows: Sequence[Document], kinds: Sequence[str], reason: Reason, advice: str
) -> Finding | None:
    row = next((row for row in rows if row.get("reason") in kinds), None)
    return None if row is None else _finding(suspect, reason, advice, row)


def _finding(suspect: Suspect, reason: Reason, advice: str, row: Document) -> Finding:
    is_pod = suspect.kind == "Pod"
    detail = ": ".join(filter(None, (row.get("reason"), row.get("message"))))
    where = f"{'pod' if is_pod else suspect.kind} {suspect.name}"
    pod = suspect.name if is_pod else ""
    return build_finding(reason, advice, where=where, detail=detail, component=suspect.component, pod=pod)


def _is_about(row: Document, suspect: Suspect) -> bool:
    """Whether an event is about the object, and not about an earlier one of its name."""
    about = row.get("involvedObject", {})
    known = suspect.uid and about.get("uid")
    return (about.get("kind"), about.get("name")) == (suspect.kind, suspect.name) and (
        not known or about["uid"] == suspect.uid
    )


def _time_of(row: Document) -> datetime:
    """When an event was last seen: repeated ones have a count or a series."""
    series = row.get("series") or {}
    texts = (series.get("lastObservedTime"), row.get("lastTimestamp"), row.get("eventTime"))
    return next(filter(None, map(parse_time, texts)), datetime.min.replace(tzinfo=UTC))


def _name(pod: Document) -> str:
    return str(pod["metadata"]["name"])
