"""What events say is wrong, of whom they are asked for, and how often."""

from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_contract.api_server import ApiError
from moe_operator.api.reasons import Reason
from moe_operator.autoscale.signal import States
from moe_operator.kubernetes.event_problems import MOST_SUSPECTS, Suspect, find_suspects, read_events
from moe_operator.kubernetes.kinds import DEPLOYMENT, LEADER_WORKER_SET, POD
from moe_operator.kubernetes.problems import EVENTS_EVERY_S, ProblemFinder
from moe_operator.kubernetes.store import Key, Store
from moe_operator.kubernetes.workload_problems import (
    find_deadlines,
    find_failures_to_create,
    find_failures_to_delete,
)
from moe_operator.plan.names import LWS_WORKER_INDEX, Names
from pods import pod

Document = dict[str, Any]
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
KEY = Key("ns", "tiny")


def ago(seconds: float) -> str:
    return (NOW - timedelta(seconds=seconds)).isoformat().replace("+00:00", "Z")


def creating(
    name: str = "tiny-engine-a", *, age_s: float = 60.0, waiting: str | None = "ContainerCreating"
) -> Document:
    found = pod(name, ready=False, phase="Pending")
    found["metadata"]["uid"] = f"uid-{name}"
    found["spec"]["nodeName"] = "node1"
    found["status"]["conditions"].append({"type": "PodScheduled", "status": "True", "lastTransitionTime": ago(age_s)})
    if waiting:
        row = {"name": "engine", "state": {"waiting": {"reason": waiting}}}
        found["status"]["containerStatuses"] = [row]
    return found


def event(
    reason: str, message: str = "words", *, severity: str = "Warning", at_s: float = 5.0, **about: Any
) -> Document:
    involved = {"kind": "Pod", "name": "tiny-engine-a", "uid": "uid-tiny-engine-a"} | about
    return {
        "reason": reason,
        "message": message,
        "type": severity,
        "involvedObject": involved,
        "lastTimestamp": ago(at_s),
    }


SUSPECT = Suspect(
    kind="Pod", name="tiny-engine-a", uid="uid-tiny-engine-a", component="engine", since=NOW - timedelta(seconds=60)
)


@pytest.mark.parametrize(
    ("reason", "message", "found", "advice"),
    [
        (
            "FailedMount", 'MountVolume.SetUp failed for volume "s" : secret "mine" not found',
            "FailedMount", "a volume cannot be mounted; make the Secret mine",
        ),
        (
            "FailedMount", 'MountVolume.SetUp failed for volume "c" : configmap "mine" not found',
            "FailedMount", "a volume cannot be mounted; make the ConfigMap mine",
        ),
        ("FailedMount", "Unable to attach or mount volumes: timed out", "FailedMount", "a volume cannot be mounted ("),
        ("FailedMapVolume", "no device", "FailedMount", "a volume cannot be mounted"),
        (
            "FailedAttachVolume", 'Multi-Attach error for volume "pvc-1" Volume is already used by pod(s) other',
            "FailedAttachVolume", "a volume cannot be attached; one of access mode ReadWriteOnce may still be",
        ),
        (
            "FailedCreatePodSandBox", 'plugin type="bridge" failed (add): no IP addresses available in range set',
            "FailedCreatePodSandBox", "the node cannot set up the pod's network; look at its CNI plugin",
        ),
        ("NetworkNotReady", "cni plugin not initialized", "FailedCreatePodSandBox", "the node cannot set up"),
        ("FailedSync", "error determining status", "ContainerCreating", "the container is not created ("),
    ],
)  # fmt: skip
def test_what_a_kubelet_writes_in_events_alone_is_a_finding(reason: str, message: str, found: str, advice: str) -> None:
    finding = read_events(SUSPECT, [event("Scheduled", severity="Normal"), event(reason, message)], NOW)
    assert finding is not None
    assert (finding.reason, finding.pod, finding.component) == (found, "tiny-engine-a", "engine")
    assert finding.message.startswith(advice)
    assert message in finding.message, "the cluster's words stand in full"


def test_a_volume_that_is_not_attached_is_the_cause_and_not_that_it_is_not_mounted() -> None:
    rows = [event("FailedMount", at_s=1.0), event("FailedAttachVolume", at_s=50.0)]
    assert (read_events(SUSPECT, rows, NOW) or 0).reason == "FailedAttachVolume"


def test_of_several_events_of_a_reason_the_newest_counts_by_its_last_time() -> None:
    old, new = event("FailedMount", "old", at_s=9.0), event("FailedMount", "new", at_s=99.0)
    new |= {"lastTimestamp": None, "series": {"count": 3, "lastObservedTime": ago(1.0)}}
    first = event("FailedMount", "first", at_s=0.0) | {"lastTimestamp": None, "eventTime": ago(70.0)}
    finding = read_events(SUSPECT, [new, old, first], NOW)
    assert finding is not None
    assert "new" in finding.message


@pytest.mark.parametrize("reason", ["Pulling", "Pulled"])
def test_an_image_on_its_way_is_no_fault_however_long_it_takes(reason: str) -> None:
    late = Suspect(kind="Pod", name="tiny-engine-a", since=NOW - timedelta(hours=1))
    assert read_events(late, [event(reason, severity="Normal")], NOW) is None
    mount = read_events(late, [event("FailedMount", at_s=1.0), event(reason, severity="Normal", at_s=9.0)], NOW)
    assert mount is not None, "as when the kubelet mounts all anew"


def test_what_kept_a_pod_from_its_node_is_over_once_it_has_one() -> None:
    late = event("FailedScheduling", "0/1 nodes are available", at_s=65.0)
    assert read_events(SUSPECT, [late], NOW) is None
    finding = read_events(SUSPECT, [late, event("SomethingNew", "broken", at_s=30.0)], NOW)
    assert finding is not None
    assert finding.message == "the container is not created (pod tiny-engine-a: SomethingNew: broken)"


def test_what_kept_a_volume_away_is_over_once_the_image_is_pulled() -> None:
    missing = event("FailedMount", 'secret "mine" not found', at_s=40.0)
    pulling = event("Pulling", severity="Normal", at_s=20.0)
    assert read_events(SUSPECT, [missing, pulling], NOW) is None
    again = event("FailedMount", 'secret "other" not found', at_s=10.0)
    finding = read_events(SUSPECT, [missing, pulling, again], NOW)
    assert finding is not None
    assert "make the Secret other" in finding.message


def test_a_node_that_says_nothing_for_two_minutes_is_reported() -> None:
    assert read_events(SUSPECT, [event("Scheduled", severity="Normal")], NOW) is None
    late = Suspect(kind="Pod", name="tiny-engine-a", since=NOW - timedelta(seconds=121))
    finding = read_events(late, [event("Scheduled", severity="Normal")], NOW)
    assert finding is not None
    assert finding.reason == "ContainerCreating"
    assert "is the kubelet of its node at work?" in finding.message


def test_the_events_of_an_earlier_pod_of_the_name_say_nothing() -> None:
    assert read_events(SUSPECT, [event("FailedMount", uid="another")], NOW) is None
    assert read_events(SUSPECT, [event("FailedMount", name="another")], NOW) is None


FORBIDDEN = 'create Pod tiny-engine-0 in StatefulSet tiny-engine failed error: pods "tiny-engine-0" is forbidden: quota'


def test_a_stateful_set_that_may_not_make_pods_is_reported() -> None:
    suspect = Suspect(kind="StatefulSet", name="tiny-engine", component="engine")
    finding = read_events(suspect, [event("FailedCreate", FORBIDDEN, **_about("StatefulSet"))], NOW)
    assert finding is not None
    assert finding.reason == "FailedCreate"
    assert FORBIDDEN in finding.message
    assert read_events(suspect, [event("SuccessfulCreate", severity="Normal", **_about("StatefulSet"))], NOW) is None


def _about(kind: str) -> Document:
    return {"kind": kind, "name": "tiny-engine"}


@pytest.mark.parametrize("reason", ["ProvisioningFailed", "FailedBinding"])
def test_a_claim_for_which_no_volume_is_made_is_reported(reason: str) -> None:
    found = pod(ready=False, phase="Pending")
    message = "0/1 nodes are available: pod has unbound immediate PersistentVolumeClaims."
    found["status"]["conditions"].append({"type": "PodScheduled", "status": "False", "message": message})
    found["spec"]["volumes"] = [{"name": "cache", "persistentVolumeClaim": {"claimName": "tiny-cache"}}, {"name": "x"}]
    (suspect,) = find_suspects([found], [], NOW)
    assert (suspect.kind, suspect.name) == ("PersistentVolumeClaim", "tiny-cache")
    about = {"kind": "PersistentVolumeClaim", "name": "tiny-cache", "uid": "c"}
    finding = read_events(suspect, [event(reason, 'storageclass "fast" not found', severity="Normal", **about)], NOW)
    assert finding is not None
    assert finding.reason == "VolumeNotProvisioned"


@pytest.mark.parametrize(
    ("found", "asked"),
    [
        (creating(), True),
        (creating(waiting=None), True),
        (creating(age_s=10.0), False),
        (creating(waiting="ImagePullBackOff"), False),
        (creating(waiting="PodInitializing"), False),
        (pod(), False),
        (pod(ready=False), False),
        (pod(phase="Failed"), False),
        (creating() | {"metadata": pod(ending=True)["metadata"]}, False),
    ],
)
def test_events_are_asked_for_only_of_a_pod_that_is_not_created_for_long(found: Document, asked: bool) -> None:
    assert bool(find_suspects([found], [], NOW)) is asked


def leader_worker_set(replicas: int = 2, size: int = 3) -> Document:
    labels = Names("tiny").labels("engine", "stable")
    spec = {"replicas": replicas, "leaderWorkerTemplate": {"size": size}}
    return {"kind": "LeaderWorkerSet", "metadata": {"name": "tiny-engine", "labels": labels}, "spec": spec}


def group(index: int, workers: int) -> list[Document]:
    leader = pod(f"tiny-engine-{index}", **{LWS_WORKER_INDEX: "0"})
    rest = [pod(f"tiny-engine-{index}-{number}", **{LWS_WORKER_INDEX: str(number)}) for number in range(1, workers + 1)]
    return [leader, *rest]


def test_of_a_leader_worker_set_the_stateful_sets_that_lack_pods_are_asked() -> None:
    whole = [*group(0, 2), *group(1, 2)]
    assert find_suspects(whole, [leader_worker_set()], NOW) == []
    workers = find_suspects([*group(0, 2), *group(1, 1)], [leader_worker_set()], NOW)
    assert [(row.kind, row.name) for row in workers] == [("StatefulSet", "tiny-engine-1")]
    leaders = find_suspects(group(0, 2), [leader_worker_set()], NOW)
    assert [(row.kind, row.name) for row in leaders] == [
        ("StatefulSet", "tiny-engine"),
        ("LeaderWorkerSet", "tiny-engine"),
    ]
    assert find_suspects([], [leader_worker_set(replicas=0)], NOW) == []


@given(st.integers(0, 12))
def test_few_calls_are_made_however_many_pods_hang(count: int) -> None:
    hanging = [creating(f"tiny-engine-{number}") for number in range(count)]
    assert len(find_suspects(hanging, [], NOW)) == min(count, MOST_SUSPECTS)


def deployment(**conditions: tuple[str, str, str]) -> Document:
    rows = [
        {"type": kind, "status": status, "reason": reason, "message": message}
        for kind, (status, reason, message) in conditions.items()
    ]
    metadata = {"name": "tiny-gateway", "namespace": "ns", "uid": "d", "labels": Names("tiny").labels("gateway")}
    return {"kind": "Deployment", "metadata": metadata, "status": {"conditions": rows}}


def test_what_a_deployment_says_of_itself_is_reported_and_disappears_with_it() -> None:
    quota = 'pods "x" is forbidden: exceeded quota: none, requested: pods=1, used: pods=0, limited: pods=0'
    broken = deployment(ReplicaFailure=("True", "FailedCreate", quota), Progressing=("True", "NewReplicaSet", ""))
    (finding,) = find_failures_to_create([broken])
    assert (finding.reason, finding.component) == ("FailedCreate", "gateway")
    assert quota in finding.message
    assert find_failures_to_create([deployment(Progressing=("True", "NewReplicaSetAvailable", ""))]) == []
    words = f'Failed to create new replica set "tiny-gateway-1": {quota}'
    (finding,) = find_failures_to_create([deployment(Progressing=("False", "ReplicaSetCreateError", words))])
    assert (finding.reason, finding.component) == ("FailedCreate", "gateway")
    assert words in finding.message
    kept = deployment(ReplicaFailure=("True", "FailedDelete", "pods is forbidden"))
    assert find_failures_to_create([kept]) == []
    (finding,) = find_failures_to_delete([kept])
    assert (finding.reason, finding.message.endswith("pods is forbidden)")) == ("FailedDelete", True)
    assert find_failures_to_delete([broken]) == []
    late = deployment(Progressing=("False", "ProgressDeadlineExceeded", 'ReplicaSet "x" has timed out progressing.'))
    (finding,) = find_deadlines([late])
    assert finding.reason == "ProgressDeadlineExceeded"
    assert find_deadlines([broken, deployment(), {"metadata": {"name": "x"}}]) == []


class Events:
    """Stands in for the API server's events; counts how often it is asked."""

    def __init__(self, rows: list[Document]) -> None:
        self.rows, self.fields, self.error = rows, list[str](), False
        self.calls: Counter[Any] = Counter()

    async def select(self, kind: Any, namespace: str, *, labels: str = "", fields: str = "") -> list[Document]:
        self.fields.append(fields)
        if self.error:
            raise ApiError(403, "events is forbidden")
        return self.rows


async def test_a_resource_that_is_well_costs_no_call_and_a_broken_one_few() -> None:
    now_s = 100.0
    events, store = Events([event("FailedMount")]), Store()
    finder = ProblemFinder(events, store, clock=lambda: now_s)  # type: ignore[arg-type]
    assert (await finder.find(KEY, [pod()], States())).findings == ()
    assert events.fields == []
    found = creating()
    for _ in range(5):
        problems = await finder.find(KEY, [found], States())
        assert [row.reason for row in problems.findings] == [Reason.FAILED_MOUNT]
    assert events.fields == ["involvedObject.kind=Pod,involvedObject.name=tiny-engine-a"]
    now_s += EVENTS_EVERY_S + 1.0
    events.rows = [event("FailedCreatePodSandBox")]
    problems = await finder.find(KEY, [found], States())
    assert [row.reason for row in problems.findings] == [Reason.FAILED_SANDBOX]
    assert (await finder.find(KEY, [pod()], States())).findings == (), "it runs: what was wrong is reported no more"
    assert len(events.fields) == 2


async def test_without_the_right_to_read_events_the_pass_goes_on() -> None:
    events, store = Events([]), Store()
    events.error = True
    assert (await ProblemFinder(events, store).find(KEY, [creating()], States())).findings == ()  # type: ignore[arg-type]


async def test_what_keeps_pods_from_being_made_comes_first_and_a_deadline_last() -> None:
    store, conditions = Store(), {"ReplicaFailure": ("True", "FailedCreate", "quota")}
    live = deployment(**conditions, Progressing=("False", "ProgressDeadlineExceeded", "late"))
    live["metadata"]["labels"] |= {}
    store.put(DEPLOYMENT, live)
    unscheduled = pod(ready=False)
    unscheduled["status"]["conditions"].append({"type": "PodScheduled", "status": "False", "message": "no"})
    problems = await ProblemFinder(Events([]), store).find(KEY, [unscheduled], States())  # type: ignore[arg-type]
    assert [row.reason for row in problems.findings] == ["FailedCreate", "Unschedulable", "ProgressDeadlineExceeded"]


def test_the_kinds_are_those_of_the_store() -> None:
    assert (POD.name, LEADER_WORKER_SET.name) == ("Pod", "LeaderWorkerSet")
