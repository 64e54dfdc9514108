"""How many engines run: what holds for any settings, signals and histories."""

import math
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st
from moe_scheduling.fleet.scaling import PolicySelection, PolicyType, ScalingPolicy, ScalingRules
from moe_scheduling.fleet.settings import FleetSettings, FleetTargets
from moe_scheduling.fleet.size import (
    FleetHistory,
    FleetObservation,
    FleetSignal,
    Keep,
    KeepReason,
    Scale,
    ScaleReason,
    plan_fleet,
)

NUMBERS = st.floats() | st.sampled_from([0.0, -1.0, 1e308, 5e-324, math.nan, math.inf, -math.inf])
MAYBE = st.none() | NUMBERS
POSITIVE = st.floats(1e-3, 1e6)

policies = st.builds(
    ScalingPolicy, type=st.sampled_from(PolicyType), value=st.integers(1, 200), period_s=st.integers(1, 1800)
)
rules = st.builds(
    ScalingRules,
    stabilization_window_s=st.sampled_from([0.0, 30.0, 300.0, 3600.0]),
    policies=st.lists(policies, max_size=3).map(tuple),
    select_policy=st.sampled_from(PolicySelection),
)
targets = st.builds(
    FleetTargets,
    wait_s=st.none() | POSITIVE,
    kv_usage=st.floats(0.01, 1.0),
    ttft_s=st.none() | POSITIVE,
    tokens_per_s=st.none() | POSITIVE,
)


@st.composite
def settings(draw, targets=targets, rules=rules):
    fewest = draw(st.integers(0, 10))
    return FleetSettings(
        targets=draw(targets),
        min_replicas=fewest,
        max_replicas=draw(st.integers(max(1, fewest), 40)),
        idle_s=draw(st.floats(1.0, 1000.0)),
        tolerance=draw(st.floats(0.0, 0.5)),
        scale_up=draw(rules),
        scale_down=draw(rules),
    )


observations = st.builds(
    FleetObservation,
    replicas=st.integers(0, 60),
    ready=st.integers(0, 60),
    loading=st.integers(0, 60),
    startup_s=MAYBE,
)
signals = st.builds(
    FleetSignal,
    observed_s=NUMBERS,
    wait_s=MAYBE,
    kv_usage=MAYBE,
    ttft_s=MAYBE,
    tokens_per_s=MAYBE,
    arrivals_per_s=MAYBE,
    held=st.integers(-5, 10**6),
    held_since_s=MAYBE,
    in_flight=st.integers(-5, 10**6),
)
times = st.floats(-1e6, 1e6)
looks = st.lists(st.tuples(observations, st.none() | signals, times, st.booleans()), min_size=1, max_size=12)


def follow(looks, rules):
    """Each look with its decision, the history carried on; `fresh` dates the signal by the look."""
    history = FleetHistory()
    for observation, signal, now_s, fresh in looks:
        dated = replace(signal, observed_s=now_s) if signal is not None and fresh else signal
        decision = plan_fleet(observation, dated, rules, history, now_s)
        yield observation, dated, now_s, history, decision
        history = decision.history


@given(looks, settings())
def test_a_number_outside_the_bounds_is_never_planned(looks, rules):
    for observation, _, _, _, decision in follow(looks, rules):
        if isinstance(decision, Scale):
            assert rules.min_replicas <= decision.replicas <= rules.max_replicas
            assert decision.replicas != observation.replicas
        else:
            assert rules.min_replicas <= observation.replicas <= rules.max_replicas


@given(looks, settings())
def test_nothing_but_the_bounds_is_acted_on_without_a_fresh_signal(looks, rules):
    for observation, signal, now_s, _, decision in follow(looks, rules):
        fresh = signal is not None and abs(now_s - signal.observed_s) <= rules.stale_after_s
        if not fresh and rules.min_replicas <= observation.replicas <= rules.max_replicas:
            assert isinstance(decision, Keep)
            assert decision.reason in (KeepReason.STALE, KeepReason.MISSING)


@given(looks, settings())
def test_the_same_arguments_give_the_same_decision(looks, rules):
    assert list(follow(looks, rules)) == list(follow(looks, rules))


@given(looks, settings())
def test_no_fleet_falls_while_a_metric_is_not_known(looks, rules):
    for _, _, _, _, decision in follow(looks, rules):
        if isinstance(decision, Scale) and decision.reason is ScaleReason.BELOW_TARGET:
            assert all(view.value is not None and view.replicas is not None for view in decision.metrics)


@given(looks, settings())
def test_a_history_forgets_what_no_window_reaches(looks, rules):
    for _, _, now_s, _, decision in follow(looks, rules):
        record = decision.history.record
        for entries in (record.peaks, record.valleys, record.changes):
            assert all(now_s - 3600.0 < entry.at_s <= now_s for entry in entries)
        assert [peak.count for peak in record.peaks] == sorted({peak.count for peak in record.peaks}, reverse=True)
        assert [valley.count for valley in record.valleys] == sorted({valley.count for valley in record.valleys})


LOADS = ("wait_s", "kv_usage", "ttft_s", "tokens_per_s")
plausible = st.fixed_dictionaries(dict.fromkeys(LOADS, st.floats(0.0, 1e4)))


@given(looks, settings(), observations, plausible, st.sampled_from(LOADS), st.floats(1.0, 100.0), times)
def test_more_load_never_plans_fewer_engines(looks, rules, observation, values, metric, factor, now_s):
    history = list(follow(looks, rules))[-1][-1].history
    counts = []
    for scale in (1.0, factor):
        signal = FleetSignal(observed_s=now_s, in_flight=1, **(values | {metric: values[metric] * scale}))
        decision = plan_fleet(observation, signal, rules, history, now_s)
        counts.append(decision.replicas if isinstance(decision, Scale) else observation.replicas)
    assert counts[0] <= counts[1]


@given(
    settings(),
    st.integers(1, 40),
    st.lists(st.tuples(st.floats(0.0, 1.0), st.floats(1.0, 120.0)), min_size=1, max_size=40),
)
def test_no_period_sees_a_greater_change_than_its_policies_allow(rules, start, loads):
    """By the numbers that ran: what stood at a period's start, and what stands at its end."""
    current = min(max(start, rules.min_replicas), rules.max_replicas)
    rules = replace(rules, min_replicas=max(1, rules.min_replicas))
    current = max(current, 1)
    history, now_s, ran = FleetHistory(), 0.0, [(-math.inf, current)]
    for usage, interval_s in loads:
        now_s += interval_s
        signal = FleetSignal(observed_s=now_s, kv_usage=usage, wait_s=usage, ttft_s=usage, in_flight=1)
        observation = FleetObservation(replicas=current, ready=current)
        decision = plan_fleet(observation, signal, rules, history, now_s)
        history = decision.history
        if isinstance(decision, Scale):
            behaviour = rules.scale_up if decision.replicas > current else rules.scale_down
            assert _is_allowed(behaviour, ran, current, decision.replicas, now_s)
            current = decision.replicas
            ran.append((now_s, current))


def _is_allowed(behaviour, ran, current, planned, now_s):
    allowed = []
    for policy in behaviour.policies:
        start = [count for at_s, count in ran if at_s <= now_s - policy.period_s][-1]
        step = policy.value if policy.type is PolicyType.PODS else start * policy.value / 100
        if planned > current:
            allowed.append(planned <= math.ceil(start + step + 1e-9))
        else:
            allowed.append(planned >= math.floor(start - step - 1e-9))
    if behaviour.select_policy is PolicySelection.DISABLED:
        return False
    return (any if behaviour.select_policy is PolicySelection.MAX else all)(allowed) or not allowed
