"""Scale-in of groups: what drains, what is waited for, and what becomes of it when more are wanted meanwhile."""

import asyncio
from typing import Any

import pytest
from group_pods import group_pod
from hypothesis import given
from hypothesis import strategies as st
from moe_contract.agent_state import AgentState
from moe_operator.autoscale.signal import States
from moe_operator.kubernetes import group_scale_in
from moe_operator.kubernetes.api import NotLeading
from moe_operator.kubernetes.group_scale_in import (
    MOST_CALLS,
    GroupDrains,
    begun_goal,
    plan_group_changes,
    plan_scale_in,
)
from moe_operator.kubernetes.kinds import LEADER_WORKER_SET
from moe_operator.kubernetes.peers import Peer
from moe_operator.kubernetes.store import Key, Store
from moe_operator.plan.replicas import Count

Document = dict[str, Any]
KEY = Key("ns", "tiny")
NAME = "tiny-engine"
READY, DRAINING, STOPPED, STARTING = "ready", "draining", "stopped", "starting"


@pytest.mark.parametrize(
    ("wanted", "present", "phases", "found"),
    [
        (3, 3, [READY] * 3, None),
        (4, 3, [READY] * 3, None),
        # Asked, then waited for, then gone; as far as the highest that still works.
        (1, 3, [READY] * 3, (3, (1, 2))),
        (1, 3, [READY, DRAINING, DRAINING], (3, ())),
        (1, 3, [READY, DRAINING, STOPPED], (2, ())),
        (1, 3, [READY, STOPPED, DRAINING], (3, ())),
        (1, 3, [READY, STOPPED, STOPPED], (1, ())),
        # One that starts or waits for its next start has nothing to lose, and is asked all the same.
        (1, 3, [READY, STARTING, "backoff"], (3, (1, 2))),
        # One that does not answer is not waited for.
        (1, 3, [READY, None, None], (1, ())),
        (1, 3, [READY, READY, None], (2, (1,))),
        (0, 1, [READY], (1, (0,))),
        # The set is smaller, but its controller has not ended the pods yet.
        (1, 1, [READY, STOPPED, STOPPED], None),
        # More are wanted again, or drained by somebody else.
        (3, 3, [READY, DRAINING, STOPPED], None),
        (2, 3, [STOPPED, READY, READY], (3, (2,))),
        # Fewer still.
        (1, 3, [READY, READY, DRAINING], (3, (1,))),
        # Above the set's own number is what its controller makes for a rollout.
        (2, 4, [READY, READY, DRAINING, STOPPED, STARTING], (3, ())),
        (2, 2, [READY, READY, STARTING, STOPPED], None),
    ],
)
def test_what_goes_on(
    wanted: int, present: int, phases: list[str | None], found: tuple[int, tuple[int, ...]] | None
) -> None:
    scale_in = plan_scale_in(NAME, wanted, present, dict(enumerate(phases)))
    assert (scale_in and (scale_in.replicas, scale_in.ask)) == found
    assert scale_in is None or scale_in.goal == wanted


def test_the_text_counts_the_groups_that_are_waited_for() -> None:
    some = plan_scale_in(NAME, 1, 3, {0: READY, 1: DRAINING, 2: STOPPED})
    assert some is not None
    assert some.text == "tiny-engine: 1 of the 2 groups that go still end their streams"


@pytest.mark.parametrize(
    ("live", "goal"),
    [
        (None, None),
        ({"metadata": {}}, None),
        ({"metadata": {"annotations": {"moeserving.dev/scale-in": "2"}}}, 2),
        ({"metadata": {"annotations": {"moeserving.dev/scale-in": "two"}}}, None),
    ],
)
def test_what_was_begun_stands_in_an_annotation(live: dict[str, object] | None, goal: int | None) -> None:
    assert begun_goal(live) == goal


def the_set(replicas: int, **annotations: str) -> Document:
    return {
        "apiVersion": LEADER_WORKER_SET.api_version,
        "kind": "LeaderWorkerSet",
        "metadata": {
            "name": NAME,
            "namespace": KEY.namespace,
            "labels": group_pod(0, 0)["metadata"]["labels"],
            "annotations": annotations,
        },
        "spec": {"replicas": replicas, "leaderWorkerTemplate": {"size": 2}},
    }


def states(*phases: str) -> States:
    return States(engines={f"{NAME}-{index}": AgentState(phase=phase) for index, phase in enumerate(phases)})


@pytest.mark.parametrize("is_ours", [True, False], ids=["the resource's number", "another manager's number"])
def test_a_drained_group_that_stays_is_made_anew_whatever_the_set_says(is_ours: bool) -> None:
    leaders = [group_pod(index, 0) for index in range(4)]
    said = states(READY, STOPPED, DRAINING, STOPPED)
    count = Count(replicas=3, spec={"replicas": 3} if is_ours else {})
    for live in (the_set(3), the_set(3, **{"moeserving.dev/scale-in": "1"})):
        changes = plan_group_changes(live, count, leaders, said, {})
        assert (changes.scale_in, changes.drained, changes.ended) == (None, (1, 2), (1,))
        assert changes.texts == ["tiny-engine-1, tiny-engine-2: drained, made anew once the streams have ended"]


def test_a_number_that_another_manager_sets_drains_nothing() -> None:
    leaders = [group_pod(index, 0) for index in range(3)]
    changes = plan_group_changes(the_set(3), Count(replicas=1), leaders, states(READY, READY, READY), {})
    assert changes.scale_in is None


def test_a_leader_that_was_asked_drains_also_while_its_newest_state_is_older() -> None:
    leaders = [group_pod(index, 0) for index in range(3)]
    count, said = Count(replicas=1, spec={"replicas": 1}), states(READY, READY, READY)
    asked = {"tiny-engine-1-uid": True, "tiny-engine-2-uid": False}
    scale_in = plan_group_changes(the_set(3), count, leaders, said, asked).scale_in
    assert scale_in is not None
    assert (scale_in.ask, scale_in.working, scale_in.replicas) == ((), 1, 2), "one did not take it"


class FakeApi:
    """An operator that leads, or no longer does after some calls."""

    def __init__(self, calls: int = 99) -> None:
        self.calls = calls

    def check_lead(self, what: str) -> None:
        self.calls -= 1
        if self.calls < 0:
            raise NotLeading(what)


def drains_of(count: int, monkeypatch: pytest.MonkeyPatch, calls: int = 99, **annotations: str) -> Any:
    """A set of groups that all have to go, and which of them were asked, with how many at a time at most."""
    store, asked, at_a_time = Store(), [], [0, 0]
    store.put(LEADER_WORKER_SET, the_set(count, **annotations))
    leaders = [group_pod(index, 0) for index in range(count)]

    async def drain(peer: Peer, tokens: Any) -> str:
        at_a_time[0] += 1
        at_a_time[1] = max(at_a_time)
        await asyncio.sleep(0)
        at_a_time[0] -= 1
        asked.append(peer.pod)
        return ""

    monkeypatch.setattr(group_scale_in, "drain", drain)
    drains = GroupDrains(FakeApi(calls), store)  # type: ignore[arg-type]
    live = store.get(KEY, LEADER_WORKER_SET, NAME)
    assert live is not None
    changes = drains.plan(KEY, live, Count(replicas=0, spec={"replicas": 0}), leaders, states(*[READY] * count))
    peers = [
        Peer(pod=pod["metadata"]["name"], url="", component="engine", revision="stable", uid=pod["metadata"]["uid"])
        for pod in leaders
    ]
    return drains.carry_out(KEY, changes, peers, ["t"]), asked, at_a_time


async def test_agents_are_asked_side_by_side_and_not_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    carrying, asked, at_a_time = drains_of(3 * MOST_CALLS, monkeypatch, **{"moeserving.dev/scale-in": "0"})
    await carrying
    assert (len(asked), at_a_time[1]) == (3 * MOST_CALLS, MOST_CALLS)


async def test_no_agent_is_asked_before_the_set_says_which_groups_go(monkeypatch: pytest.MonkeyPatch) -> None:
    for annotations in ({}, {"moeserving.dev/scale-in": "1"}):
        carrying, asked, _ = drains_of(3, monkeypatch, **annotations)
        await carrying
        assert asked == []


async def test_no_agent_is_asked_without_the_lead(monkeypatch: pytest.MonkeyPatch) -> None:
    carrying, asked, _ = drains_of(3, monkeypatch, calls=1, **{"moeserving.dev/scale-in": "0"})
    with pytest.raises(NotLeading):
        await carrying
    assert len(asked) == 1


@given(
    st.lists(st.sampled_from([READY, DRAINING, STOPPED, STARTING, None]), min_size=1, max_size=6),
    st.lists(st.integers(0, 7), min_size=1, max_size=5),
    st.randoms(use_true_random=False),
)
def test_it_comes_to_the_wanted_number_without_an_engine_that_ends_while_it_has_streams(first, wishes, chance) -> None:
    """A world of one set: agents drain when they are asked, the controller ends the highest and makes new ones."""
    phases: dict[int, str | None] = dict(enumerate(first))
    present = len(first)
    for wanted in [*wishes, *[wishes[-1]] * 60]:
        scale_in = plan_scale_in(NAME, wanted, present, phases)
        if scale_in is None:
            assert wanted >= present
            present = wanted
        else:
            assert wanted <= scale_in.replicas <= present
            present = scale_in.replicas
            phases |= dict.fromkeys(scale_in.ask, DRAINING)
        # A leader that has drained and stays is deleted.
        phases = {index: phase for index, phase in phases.items() if index >= min(wanted, present) or phase != STOPPED}
        if chance.random() < 0.7:
            for index in [index for index in phases if index >= present]:
                assert phases[index] in (STOPPED, None), "it still has streams"
                del phases[index]
            phases |= {index: READY for index in range(present) if index not in phases}
        for index, phase in phases.items():
            if phase == DRAINING and chance.random() < 0.5:
                phases[index] = STOPPED
    assert present == wishes[-1]
    assert all(phase not in (DRAINING, STOPPED) for phase in phases.values())
