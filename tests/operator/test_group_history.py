"""A group that ends again and again is reported, though its new pods have no restarts (LeaderWorkerSet v0.10)."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from group_pods import group, group_pod
from moe_operator.kubernetes.diagnosis import Finding, first_of_each_reason
from moe_operator.kubernetes.group_history import STEADY, GroupHistory
from moe_operator.kubernetes.store import Key

Document = dict[str, Any]
KEY = Key("ns", "tiny")
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


class Cluster:
    """Groups as the controller leaves them, seen by one history."""

    def __init__(self) -> None:
        self.history, self.now, self.life = GroupHistory(), NOW, 0

    def see(self, pods: list[Document]) -> list[tuple[str, str]]:
        self.now += timedelta(seconds=30)
        return [(found.reason, found.message) for found in self.history.observe(KEY, pods, 2, self.now)]

    def fresh(self, *, ready: bool = True, digest: str = "new") -> list[Document]:
        """The group with new pods."""
        self.life += 1
        return group(0, uid=f"uid-{self.life}", ready=ready, digest=digest)

    def ended(self, reason: str = "OOMKilled", status: int = 137, *, worker: int = 1) -> list[Document]:
        """The group in which a container was started again, so that the controller deletes it."""
        pods = self.fresh(ready=False)
        for made in pods:
            made["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
        terminated = {"reason": reason, "exitCode": status}
        row = {"name": "engine", "restartCount": 1, "lastState": {"terminated": terminated}, "state": {"running": {}}}
        pods[worker]["status"]["containerStatuses"] = [row]
        return pods


def test_a_worker_that_is_killed_for_its_memory_is_reported_though_its_pod_is_new():
    cluster = Cluster()
    for life in range(3):
        cluster.see(cluster.ended())
        assert cluster.see(cluster.fresh(ready=False)) == [
            (
                "OutOfMemory",
                "raise spec.engine.resources.memory or serve with less (pod tiny-engine-0-1: OOMKilled; the group "
                f"tiny-engine-0 was made anew {2 * life + 1} times)",
            )
        ]


def test_what_was_reported_ends_once_the_group_was_whole_for_long_enough():
    cluster = Cluster()
    cluster.see(cluster.ended())
    whole = cluster.fresh()
    assert cluster.see(whole)[0][0] == "OutOfMemory"
    cluster.now += STEADY
    assert cluster.see(whole) == []


def test_an_update_is_no_failure_and_ends_the_old_ones():
    cluster = Cluster()
    cluster.see(cluster.ended())
    assert cluster.see(cluster.fresh(ready=False, digest="newer")) == []


def test_a_worker_whose_program_ends_is_reported_with_its_status():
    cluster = Cluster()
    cluster.see(cluster.ended("Error", 1))
    ((reason, message),) = cluster.see(cluster.fresh(ready=False))
    assert reason == "CrashLooping"
    assert message.startswith("a container of pod tiny-engine-0-1 ended with status 1; see its log (the group")
    assert cluster.see(cluster.fresh()) == [], "a group that is whole again has no fault"


@pytest.mark.parametrize(("lives", "reported"), [(2, False), (3, False), (4, True)])
def test_a_group_that_is_made_anew_often_is_reported_also_when_nobody_saw_why(lives: int, reported: bool):
    cluster = Cluster()
    seen = [cluster.see(cluster.fresh(ready=False)) for _ in range(lives)]
    assert bool(seen[-1]) is reported


def test_the_ends_that_the_controller_itself_brings_about_are_no_failures():
    """The pods that go with the failed one end by a signal, and are not started again."""
    cluster = Cluster()
    pods = [group_pod(0, worker, ready=False, ending=True) for worker in range(2)]
    state = {"terminated": {"reason": "Error", "exitCode": 143}}
    pods[0]["status"]["containerStatuses"] = [{"name": "engine", "restartCount": 0, "state": state}]
    cluster.see(pods)
    assert cluster.see(cluster.fresh(ready=False)) == []


def test_a_resource_that_is_gone_is_forgotten():
    cluster = Cluster()
    cluster.see(cluster.ended())
    cluster.history.forget(KEY)
    assert cluster.see(cluster.fresh(ready=False)) == []


def test_of_each_reason_one_finding_stays_and_pods_that_exist_come_first():
    present, past = (Finding(reason="OutOfMemory", message=text, pod="p") for text in ("now", "then"))
    other = Finding(reason="CrashLooping", message="c", pod="q")
    assert first_of_each_reason([present, past, other]) == [present, other]


def test_a_group_that_was_whole_for_long_has_recovered_though_no_pass_was_made_meanwhile():
    cluster = Cluster()
    for _ in range(3):
        cluster.see(cluster.fresh())
    cluster.now += STEADY
    assert cluster.see(cluster.fresh(ready=False)) == []
