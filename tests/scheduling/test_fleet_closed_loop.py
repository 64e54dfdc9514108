"""How many engines run: the decisions against fleets that take time to start."""

import math
from dataclasses import dataclass, field, replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_scheduling.fleet.scaling import PolicySelection, PolicyType, ScalingPolicy, ScalingRules
from moe_scheduling.fleet.settings import FleetSettings, FleetTargets
from moe_scheduling.fleet.size import (
    FleetHistory,
    FleetObservation,
    FleetSignal,
    Scale,
    plan_fleet,
)

UNBOUND = ScalingRules(stabilization_window_s=0.0, policies=())


@dataclass
class Fleet:
    """Engines that become ready `startup_s` after they were asked for; the newest go first."""

    rules: FleetSettings
    startup_s: float
    replicas: int
    interval_s: float = 5.0
    now_s: float = 0.0
    history: FleetHistory = field(default_factory=FleetHistory)
    ready_at_s: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)

    def __post_init__(self):
        self.ready_at_s = [self.now_s] * self.replicas

    @property
    def ready(self):
        return sum(at_s <= self.now_s for at_s in self.ready_at_s)

    def step(self, **values):
        signal = FleetSignal(**({"observed_s": self.now_s, "in_flight": 1, "arrivals_per_s": 1.0} | values))
        loading = self.replicas - self.ready
        observation = FleetObservation(
            replicas=self.replicas, ready=self.ready, loading=loading, startup_s=self.startup_s
        )
        decision = plan_fleet(observation, signal, self.rules, self.history, self.now_s)
        self.history = decision.history
        if isinstance(decision, Scale):
            kept = sorted(self.ready_at_s)[: decision.replicas]
            started = [self.now_s + self.startup_s] * (decision.replicas - len(kept))
            self.replicas, self.ready_at_s = decision.replicas, kept + started
        self.counts.append(self.replicas)
        self.now_s += self.interval_s

    def changes(self):
        return [after - before for before, after in pairwise(self.counts) if after != before]


policies = st.builds(
    ScalingPolicy, type=st.sampled_from(PolicyType), value=st.integers(1, 200), period_s=st.integers(1, 300)
)
windows = st.sampled_from([0.0, 15.0, 300.0])
rules_without_policies = st.builds(ScalingRules, stabilization_window_s=windows, policies=st.just(()))
rules_with_policies = st.builds(
    ScalingRules,
    stabilization_window_s=windows,
    policies=st.lists(policies, max_size=3).map(tuple),
    select_policy=st.sampled_from(PolicySelection),
)
targets = st.builds(FleetTargets, kv_usage=st.floats(0.1, 1.0), tokens_per_s=st.none() | st.floats(1.0, 100.0))


@st.composite
def proportional_runs(draw, behaviours):
    """A fleet whose KV use and tokens are in proportion to a load that stays, and the counts that it went through."""
    fewest = draw(st.integers(0, 4))
    rules = FleetSettings(
        targets=draw(targets),
        min_replicas=fewest,
        max_replicas=draw(st.integers(max(1, fewest), 30)),
        tolerance=draw(st.floats(0.0, 0.3)),
        scale_up=draw(behaviours),
        scale_down=draw(behaviours),
    )
    start = draw(st.integers(max(1, fewest), rules.max_replicas))
    fleet = Fleet(rules, draw(st.sampled_from([0.0, 7.0, 60.0, 300.0])), start, draw(st.sampled_from([5.0, 15.0])))
    load = draw(st.floats(0.0, 40.0))
    fleet.counts.append(start)
    for _ in range(120):
        share = load / fleet.ready if fleet.ready else None
        fleet.step(kv_usage=None if share is None else min(share, 1.0), tokens_per_s=load)
    return fleet, load


@given(proportional_runs(rules_without_policies))
def test_a_constant_load_never_changes_the_count_twice(run):
    fleet, load = run
    # Where KV caches are full, their use no longer tells how much load there is.
    if load <= fleet.counts[0]:
        assert len(fleet.changes()) <= 1


@given(proportional_runs(rules_with_policies))
def test_under_policies_a_constant_load_never_turns_the_count_round(run):
    fleet, _ = run
    assert len({change > 0 for change in fleet.changes()}) <= 1


@pytest.mark.parametrize("interval_s", [5.0, 15.0])
def test_a_burst_starts_no_more_engines_than_serve_it(interval_s):
    fleet = Fleet(FleetSettings(targets=FleetTargets(tokens_per_s=100.0), max_replicas=100), 300.0, 4, interval_s)
    for _ in range(200):
        fleet.step(tokens_per_s=400.0 if fleet.now_s < 60.0 else 1950.0)
    assert max(fleet.counts) == 20
    assert fleet.counts[-1] == 20
    assert len(set(fleet.counts[int(120 / interval_s) :])) == 1, "no engine is asked for while the others load"


def test_bursts_shorter_than_the_window_keep_what_they_started():
    fleet = Fleet(FleetSettings(targets=FleetTargets(tokens_per_s=100.0), max_replicas=100), 300.0, 4)
    for number in range(600):
        fleet.step(tokens_per_s=1600.0 if number % 50 < 10 else 400.0)
    assert max(fleet.counts) == 16
    assert set(fleet.counts[20:]) == {16}


def test_a_sawtooth_within_the_tolerance_changes_nothing():
    fleet = Fleet(
        FleetSettings(targets=FleetTargets(kv_usage=0.5), max_replicas=20, scale_up=UNBOUND, scale_down=UNBOUND),
        0.0,
        10,
    )
    for number in range(100):
        fleet.step(kv_usage=0.455 if number % 2 else 0.545)
    assert set(fleet.counts) == {10}


@dataclass
class Queue:
    """Engines that compute `speed` tokens/s each before a queue: fluid, with the wait of M/M/1 below saturation."""

    fleet: Fleet
    speed: float
    service_s: float
    backlog: float = 0.0
    computed: list[float] = field(default_factory=list)

    def step(self, load):
        capacity, interval_s = self.speed * self.fleet.ready, self.fleet.interval_s
        work = self.backlog + load * interval_s
        done = min(work, capacity * interval_s)
        self.backlog = work - done
        self.computed.append(done / interval_s)
        recent = self.computed[-math.ceil(30.0 / interval_s) :]
        busy = min(load / capacity, 0.999) if capacity else 0.0
        wait_s = self.backlog / capacity + self.service_s * busy / (1.0 - busy) if capacity else None
        self.fleet.step(wait_s=wait_s, tokens_per_s=sum(recent) / len(recent))
        return wait_s


LATENCY = FleetSettings(targets=FleetTargets(wait_s=1.0), max_replicas=64)


@settings(max_examples=30)
@given(
    start=st.integers(1, 16),
    needed=st.floats(0.05, 12.0),
    service_s=st.sampled_from([0.01, 0.05, 0.2]),
    startup_s=st.sampled_from([0.0, 60.0, 300.0]),
)
def test_a_count_that_was_too_few_for_a_constant_load_is_not_tried_again(start, needed, service_s, startup_s):
    queue = Queue(Fleet(LATENCY, startup_s, start, 15.0), 1000.0, service_s)
    missed = []
    for _ in range(800):
        before = queue.fleet.replicas
        queue.step(needed * 1000.0)
        if queue.fleet.replicas > before:
            missed.append(before)
    assert len(missed) == len(set(missed)), "each count is missed once at most"
    assert len(set(queue.fleet.counts[-200:])) == 1, "the count comes to rest"
    assert needed < queue.fleet.counts[-1] <= max(start, 2 * math.ceil(needed + 1))


@pytest.mark.parametrize(("load", "most"), [(2600.0, 4), (3300.0, 8)])
def test_a_backlog_asks_for_engines_only_where_they_come_before_it_is_gone(load, most):
    """Four engines work off what came in the 300 s of their start: in 129 s at the lower load, 557 s at the higher."""
    queue = Queue(Fleet(LATENCY, 300.0, 2, 5.0), 1000.0, 0.01)
    for number in range(240):
        queue.step(1000.0 if number < 20 else load)
    assert max(queue.fleet.counts) == most


def test_a_day_of_load_runs_no_engine_short_of_its_target_while_it_falls():
    rules = replace(LATENCY, scale_down=replace(LATENCY.scale_down, stabilization_window_s=60.0))
    queue = Queue(Fleet(rules, 30.0, 1, 5.0), 1000.0, 0.01)
    waits = []
    for number in range(3000):
        wait_s = queue.step(3000.0 + 2500.0 * math.sin((number / 1500.0 - 0.5) * math.pi))
        waits.append((number, wait_s, queue.fleet.replicas))
    assert max(count for _, _, count in waits) >= 6
    falling = [wait_s for number, wait_s, _ in waits if number > 1600]
    assert max(falling) < 1.0
    assert waits[-1][2] <= 2
