"""How many engines run: the rules, case by case."""

from dataclasses import replace

import pytest
from moe_scheduling.fleet.latency import LatencyHistory
from moe_scheduling.fleet.scaling import PolicySelection, PolicyType, ScalingPolicy, ScalingRecord, ScalingRules
from moe_scheduling.fleet.settings import FleetSettings, FleetTargets
from moe_scheduling.fleet.size import (
    FleetHistory,
    FleetObservation,
    FleetSignal,
    Keep,
    KeepReason,
    Limit,
    Metric,
    Scale,
    ScaleReason,
    plan_fleet,
)

NOW_S = 1000.0
FREE = ScalingRules(stabilization_window_s=0.0, policies=())
OFF = replace(FREE, select_policy=PolicySelection.DISABLED)
KV = FleetTargets(kv_usage=0.5)
WAIT = FleetTargets(wait_s=1.0)
# The fleet is the same since long: latencies are compared with nothing and are acted on.
SETTLED = {"record": ScalingRecord(), "busy_s": NOW_S, "seen_s": NOW_S}


def settings(targets=KV, *, up=FREE, down=FREE, **changes):
    bounds = {"min_replicas": 1, "max_replicas": 100} | changes
    return FleetSettings(targets=targets, scale_up=up, scale_down=down, **bounds)


def busy(**values):
    return FleetSignal(**({"observed_s": NOW_S, "in_flight": 1, "arrivals_per_s": 1.0} | values))


def idle(**values):
    return FleetSignal(**({"observed_s": NOW_S, "arrivals_per_s": 0.0, "kv_usage": 0.0} | values))


def engines(replicas, ready=None, **values):
    return FleetObservation(replicas=replicas, ready=replicas if ready is None else ready, **values)


def settled(observation, **latency):
    known = LatencyHistory(wanted=observation.replicas, ready=observation.ready, since_s=NOW_S - 1000.0, **latency)
    return FleetHistory(latency=known, **SETTLED)


def plan(observation, signal, rules=None, history=None, now_s=NOW_S):
    return plan_fleet(observation, signal, rules or settings(), history or settled(observation), now_s)


def replicas(observation, decision):
    return decision.replicas if isinstance(decision, Scale) else observation.replicas


@pytest.mark.parametrize(
    ("current", "value", "target", "wanted"),
    [
        # Kubernetes, "Algorithm details": 200m against 100m doubles the number, 50m halves it.
        (2, 0.5, 0.25, 4),
        (4, 0.25, 0.5, 2),
        # "skips any scaling action if the ratio is sufficiently close to 1.0": 0.1 by default.
        (10, 0.5499, 0.5, 10),
        (10, 0.4501, 0.5, 10),
        (10, 0.56, 0.5, 12),
        (10, 0.44, 0.5, 9),
        # The result is rounded up.
        (3, 0.6, 0.5, 4),
        (3, 0.35, 0.5, 3),
        (3, 0.3, 0.5, 2),
        # A whole number of engines is not made one more by a division.
        (6, 0.4, 0.8, 3),
        (1, 0.0, 0.5, 1),
    ],
)
def test_the_number_is_that_of_the_horizontal_pod_autoscaler(current, value, target, wanted):
    rules = settings(FleetTargets(kv_usage=target))
    assert replicas(engines(current), plan(engines(current), busy(kv_usage=value), rules)) == wanted


def test_tokens_of_the_whole_fleet_are_compared_with_the_target_of_one_engine():
    decision = plan(engines(2), busy(tokens_per_s=3000.0), settings(FleetTargets(tokens_per_s=1000.0)))
    assert (decision.replicas, decision.binding) == (3, Metric.TOKENS_PER_S)
    (view,) = decision.metrics
    assert (view.value, view.target, view.replicas) == (1500.0, 1000.0, 3)


def test_the_metric_that_asks_for_most_engines_binds():
    rules = settings(FleetTargets(kv_usage=0.5, tokens_per_s=1000.0, wait_s=1.0))
    decision = plan(engines(4), busy(kv_usage=0.75, tokens_per_s=5000.0, wait_s=0.2), rules)
    assert (decision.replicas, decision.reason, decision.binding) == (6, ScaleReason.ABOVE_TARGET, Metric.KV_USAGE)
    asked = {view.metric: view.replicas for view in decision.metrics}
    assert asked[Metric.KV_USAGE] == 6
    assert asked[Metric.TOKENS_PER_S] == 5
    assert asked[Metric.WAIT] < 5


def test_engines_that_load_are_capacity_to_come():
    half = engines(8, ready=4, loading=4)
    assert plan(half, busy(kv_usage=1.0)).reason is KeepReason.ON_TARGET
    assert plan(engines(8, ready=4), busy(kv_usage=1.0)).reason is KeepReason.ON_TARGET
    assert plan(engines(4), busy(kv_usage=1.0)).replicas == 8


def test_a_metric_that_is_not_known_hinders_a_fall_but_no_rise():
    rules = settings(FleetTargets(kv_usage=0.5, tokens_per_s=1000.0))
    assert plan(engines(4), busy(kv_usage=0.1), rules).reason is KeepReason.ON_TARGET
    assert plan(engines(4), busy(kv_usage=1.0), rules).replicas == 8
    assert plan(engines(4), busy(), rules).reason is KeepReason.UNKNOWN
    assert (
        plan(engines(4, ready=0, loading=4), busy(kv_usage=0.0, tokens_per_s=0.0), rules).reason is KeepReason.UNKNOWN
    )


@pytest.mark.parametrize(("signal", "reason"), [(None, KeepReason.MISSING), (busy(observed_s=969.0), KeepReason.STALE)])
def test_nothing_is_done_without_a_fresh_signal(signal, reason):
    asleep = settings(min_replicas=0)
    for observation in (engines(4), engines(0)):
        assert plan(observation, signal, asleep).reason is reason


@pytest.mark.parametrize(("current", "bounded"), [(2, 3), (9, 8), (0, 3)])
@pytest.mark.parametrize("signal", [None, busy(observed_s=0.0), busy(kv_usage=0.5)])
def test_a_number_outside_the_bounds_is_brought_inside_whatever_is_known(current, bounded, signal):
    decision = plan(engines(current), signal, settings(min_replicas=3, max_replicas=8, up=OFF, down=OFF))
    assert (decision.replicas, decision.reason, decision.binding) == (bounded, ScaleReason.BOUNDS, None)


@pytest.mark.parametrize(
    ("current", "usage", "wanted", "limit"),
    [(4, 1.0, 6, Limit.MAX_REPLICAS), (6, 1.0, 6, Limit.MAX_REPLICAS), (4, 0.1, 3, Limit.MIN_REPLICAS)],
)
def test_bounds_limit_and_say_so(current, usage, wanted, limit):
    decision = plan(engines(current), busy(kv_usage=usage), settings(min_replicas=3, max_replicas=6))
    assert (replicas(engines(current), decision), decision.limit) == (wanted, limit)


def test_at_a_bound_the_number_stays_and_the_reason_names_it():
    decision = plan(engines(6), busy(kv_usage=1.0), settings(max_replicas=6))
    assert (type(decision), decision.reason, decision.binding) == (Keep, KeepReason.AT_BOUND, Metric.KV_USAGE)
    assert decision.metrics[0].replicas == 12


def test_policies_limit_and_say_so():
    by_one = ScalingRules(
        stabilization_window_s=0.0, policies=(ScalingPolicy(type=PolicyType.PODS, value=1, period_s=60.0),)
    )
    rules = settings(up=by_one, down=by_one)
    up = plan(engines(4), busy(kv_usage=1.0), rules)
    assert (up.replicas, up.limit) == (5, Limit.SCALE_UP_RATE)
    again = plan(engines(5), busy(kv_usage=1.0, observed_s=NOW_S + 59.0), rules, up.history, NOW_S + 59.0)
    assert (again.reason, again.limit) == (KeepReason.RATE, Limit.SCALE_UP_RATE)
    later = plan(engines(5), busy(kv_usage=1.0, observed_s=NOW_S + 60.0), rules, again.history, NOW_S + 60.0)
    assert later.replicas == 6
    down = plan(engines(4), busy(kv_usage=0.1), rules)
    assert (down.replicas, down.limit) == (3, Limit.SCALE_DOWN_RATE)


def test_a_fall_waits_for_the_window_and_follows_its_greatest_recommendation():
    rules = settings(down=replace(FREE, stabilization_window_s=300.0))
    history, at_s = FleetHistory(), NOW_S
    taken = []
    for at_s, usage in [(1000.0, 0.5), (1100.0, 0.25), (1200.0, 0.4), (1301.0, 0.25), (1399.0, 0.25), (1501.0, 0.25)]:
        decision = plan_fleet(engines(10), busy(kv_usage=usage, observed_s=at_s), rules, history, at_s)
        history = decision.history
        taken.append((replicas(engines(10), decision), decision.reason))
    assert [count for count, _ in taken] == [10, 10, 10, 8, 8, 5]
    assert taken[1][1] is KeepReason.STABILISING


def test_the_first_window_after_a_start_is_a_whole_one():
    rules = settings(down=replace(FREE, stabilization_window_s=300.0))
    first = plan_fleet(engines(10), busy(kv_usage=0.25), rules, FleetHistory(), NOW_S)
    assert first.reason is KeepReason.STABILISING
    last = plan_fleet(engines(10), busy(kv_usage=0.25, observed_s=1300.0), rules, first.history, 1300.0)
    assert last.replicas == 5


def test_a_rise_waits_for_its_window_too():
    rules = settings(up=replace(FREE, stabilization_window_s=60.0))
    history = plan_fleet(engines(2), busy(kv_usage=1.0), rules, FleetHistory(), NOW_S).history
    assert plan(engines(2), busy(kv_usage=1.0), rules, history, NOW_S + 29.0).reason is KeepReason.STABILISING
    at_s = NOW_S + 60.0
    assert plan(engines(2), busy(kv_usage=1.0, observed_s=at_s), rules, history, at_s).replicas == 4


@pytest.mark.parametrize(
    "signal", [idle(held=1), idle(held=1, held_since_s=0.0), idle(arrivals_per_s=0.1), idle(in_flight=1)]
)
def test_any_request_wakes_one_engine_at_once(signal):
    slow = ScalingRules(stabilization_window_s=3600.0, policies=(), select_policy=PolicySelection.DISABLED)
    decision = plan_fleet(engines(0), signal, settings(min_replicas=0, up=slow), FleetHistory(), NOW_S)
    assert (decision.replicas, decision.reason) == (1, ScaleReason.WAKE)


@pytest.mark.parametrize("signal", [None, busy(observed_s=0.0), idle(), busy()])
def test_a_request_that_anybody_knows_of_wakes_one_engine_whatever_the_signal(signal):
    decision = plan(engines(0, asked=True), signal, settings(min_replicas=0))
    assert (decision.replicas, decision.reason) == (1, ScaleReason.WAKE)
    assert decision.history.busy_s == NOW_S


def test_a_request_that_the_signal_does_not_show_starts_the_idle_time_anew():
    rules, history = settings(min_replicas=0, idle_s=600.0), FleetHistory()
    for at_s, asked in ((0.0, False), (300.0, True), (899.0, False)):
        signal = replace(idle(), observed_s=at_s)
        decision = plan_fleet(engines(1, asked=asked), signal, rules, history, at_s)
        history = decision.history
        assert type(decision) is Keep
    ends = plan_fleet(engines(1), replace(idle(), observed_s=900.0), rules, history, 900.0)
    assert (ends.replicas, ends.reason) == (0, ScaleReason.IDLE)


@pytest.mark.parametrize("arrivals_per_s", [0.0, None, float("nan"), float("inf"), -1.0])
def test_nothing_wakes_without_a_request(arrivals_per_s):
    decision = plan(engines(0), idle(arrivals_per_s=arrivals_per_s), settings(min_replicas=0))
    assert (type(decision), decision.reason) == (Keep, KeepReason.ASLEEP)


def run_idle(rules, observation, times, signals=None, history=None):
    """The decision at each of the times."""
    history, decisions = history or FleetHistory(), []
    for number, at_s in enumerate(times):
        signal = replace(signals[number] if signals else idle(), observed_s=at_s)
        decision = plan_fleet(observation, signal, rules, history, at_s)
        history = decision.history
        decisions.append(decision)
    return decisions


def test_the_last_engine_goes_when_no_request_was_seen_for_the_idle_time():
    rules = settings(min_replicas=0, idle_s=600.0, down=replace(FREE, stabilization_window_s=3600.0))
    decisions = run_idle(rules, engines(1), [0.0, 300.0, 599.0, 600.0])
    assert [type(decision) for decision in decisions] == [Keep, Keep, Keep, Scale]
    assert (decisions[-1].replicas, decisions[-1].reason) == (0, ScaleReason.IDLE)


def test_a_request_starts_the_idle_time_anew():
    rules = settings(min_replicas=0, idle_s=600.0)
    signals = [idle(), idle(in_flight=1), idle(), idle()]
    decisions = run_idle(rules, engines(1), [0.0, 300.0, 899.0, 900.0], signals)
    assert [type(decision) for decision in decisions] == [Keep, Keep, Keep, Scale]


def test_without_an_observation_as_old_as_the_idle_time_nothing_shows_that_no_request_came():
    rules = settings(min_replicas=0, idle_s=600.0)
    decisions = run_idle(rules, engines(1), [0.0, 601.0, 1200.0, 1201.0])
    assert [type(decision) for decision in decisions] == [Keep, Keep, Keep, Scale]


@pytest.mark.parametrize("signal", [idle(arrivals_per_s=None), idle(arrivals_per_s=float("nan"))])
def test_unknown_arrivals_are_never_idle(signal):
    rules = settings(min_replicas=0, idle_s=10.0)
    times = [float(at_s) for at_s in range(0, 100, 5)]
    assert all(isinstance(decision, Keep) for decision in run_idle(rules, engines(1), times, [signal] * 20))


def test_the_last_engine_stays_where_the_fewest_is_one():
    times = [float(at_s) for at_s in range(0, 2000, 100)]
    assert all(isinstance(decision, Keep) for decision in run_idle(settings(idle_s=600.0), engines(1), times))


def test_policies_hold_for_the_way_to_zero():
    by_one = replace(FREE, policies=(ScalingPolicy(type=PolicyType.PODS, value=1, period_s=60.0),))
    history = replace(settled(engines(3)), busy_s=0.0)
    step = plan(engines(3), idle(), settings(min_replicas=0, down=by_one), history)
    assert (step.replicas, step.reason, step.limit) == (2, ScaleReason.IDLE, Limit.SCALE_DOWN_RATE)
    never = plan(engines(3), idle(), settings(min_replicas=0, down=OFF), history)
    assert (never.reason, never.limit) == (KeepReason.RATE, Limit.SCALE_DOWN_RATE)


@pytest.mark.parametrize(("wait_s", "wanted"), [(1.05, 4), (1.25, 5), (1.5, 6), (9.0, 8), (0.9, 4)])
def test_a_wait_above_its_target_asks_for_a_bounded_step(wait_s, wanted):
    decision = plan(engines(4), busy(wait_s=wait_s, tokens_per_s=100.0), settings(WAIT))
    assert replicas(engines(4), decision) == wanted


def test_the_time_in_the_gateways_queue_is_wait():
    signal = busy(wait_s=0.1, held=3, held_since_s=1.5)
    assert plan(engines(4), signal, settings(WAIT)).replicas == 6
    assert plan(engines(4), replace(signal, wait_s=None), settings(WAIT)).replicas == 6
    assert plan(engines(4), replace(signal, held=0), settings(WAIT)).reason is KeepReason.ON_TARGET


def test_no_step_is_made_while_engines_are_to_come():
    waiting = engines(4, ready=2, startup_s=300.0)
    coming = replace(settled(waiting), latency=LatencyHistory(wanted=4, ready=2, since_s=NOW_S - 599.0))
    assert plan(waiting, busy(wait_s=9.0), settings(WAIT), coming).reason is KeepReason.ON_TARGET
    overdue = replace(coming, latency=replace(coming.latency, since_s=NOW_S - 600.0))
    assert plan(waiting, busy(wait_s=9.0), settings(WAIT), overdue).replicas == 8


def test_an_engine_never_seen_to_start_may_take_as_long_as_its_probe_allows():
    waiting = engines(4, ready=3, loading=1)
    coming = replace(settled(waiting), latency=LatencyHistory(wanted=4, ready=3, since_s=NOW_S - 3599.0))
    assert plan(waiting, busy(wait_s=9.0), settings(WAIT), coming).reason is KeepReason.ON_TARGET
    overdue = replace(coming, latency=replace(coming.latency, since_s=NOW_S - 3600.0))
    assert plan(waiting, busy(wait_s=9.0), settings(WAIT), overdue).replicas == 8


def follow(observation, rules, waits, history=None, tokens_per_s=100.0):
    """Decisions for (time, wait) pairs, the engines staying as they are."""
    history, decisions = history or FleetHistory(), []
    for at_s, wait_s in waits:
        signal = busy(observed_s=at_s, wait_s=wait_s, tokens_per_s=tokens_per_s)
        decision = plan_fleet(observation, signal, rules, history, at_s)
        history = decision.history
        decisions.append(decision)
    return decisions


def test_no_step_is_made_while_a_backlog_is_worked_off_before_an_engine_could_serve():
    """At 30 s it falls by 5 s in 30 s: 84 s more."""
    waits = [(0.0, 20.0), (15.0, 20.0), (30.0, 15.0), (60.0, 5.0), (90.0, 1.5)]
    fast, slow = engines(4, startup_s=84.0), engines(4, startup_s=83.0)
    assert all(isinstance(decision, Keep) for decision in follow(fast, settings(WAIT), waits))
    decisions = follow(slow, settings(WAIT), waits)
    assert [type(decision) for decision in decisions[:3]] == [Keep, Keep, Scale]
    assert decisions[2].replicas == 8


def test_a_backlog_that_no_longer_falls_asks_for_engines():
    stuck = follow(engines(4), settings(WAIT), [(0.0, 20.0), (30.0, 10.0), (45.0, 10.0), (60.0, 10.0)])
    assert [type(decision) for decision in stuck] == [Keep, Keep, Keep, Scale]


def test_a_new_miss_after_the_target_was_met_is_no_backlog():
    waits = [(0.0, 20.0), (30.0, 10.0), (60.0, 0.9), (70.0, 5.0)]
    assert isinstance(follow(engines(4), settings(WAIT), waits)[-1], Scale)


def fall(observation, *, wait_s, tokens_per_s, **latency):
    decision = plan(
        observation, busy(wait_s=wait_s, tokens_per_s=tokens_per_s), settings(WAIT), settled(observation, **latency)
    )
    return replicas(observation, decision)


def test_engines_go_as_far_as_their_load_was_seen_to_be_served():
    assert fall(engines(8), wait_s=0.9, tokens_per_s=800.0, served_rate=200.0) == 4
    assert fall(engines(8), wait_s=0.9, tokens_per_s=801.0, served_rate=200.0) == 5
    assert fall(engines(8), wait_s=0.9, tokens_per_s=800.0, served_rate=90.0) == 8
    assert fall(engines(8), wait_s=1.05, tokens_per_s=800.0, served_rate=200.0) == 8


def test_without_evidence_one_engine_goes_on_trial():
    assert fall(engines(8), wait_s=0.5, tokens_per_s=800.0) == 7
    assert fall(engines(8), wait_s=0.51, tokens_per_s=800.0) == 8
    assert fall(engines(1), wait_s=0.1, tokens_per_s=800.0) == 1


def test_a_load_that_was_too_much_is_not_tried_again():
    assert fall(engines(8), wait_s=0.1, tokens_per_s=700.0, failed_rate=125.0) == 8
    assert fall(engines(8), wait_s=0.1, tokens_per_s=699.0, failed_rate=125.0) == 7


def test_half_of_what_was_too_much_needs_no_trial():
    assert fall(engines(8), wait_s=0.9, tokens_per_s=400.0, failed_rate=200.0) == 4


def test_engines_that_compute_nothing_go():
    assert fall(engines(8), wait_s=0.0, tokens_per_s=0.0) == 1


def test_a_latency_lets_no_engine_go_where_the_load_is_not_known():
    assert fall(engines(8), wait_s=0.0, tokens_per_s=None, served_rate=1000.0) == 8


def test_a_latency_lets_no_engine_go_while_one_is_on_its_way_out():
    assert fall(engines(7, ready=8), wait_s=0.0, tokens_per_s=700.0, served_rate=1000.0) == 7


def test_a_miss_teaches_what_is_too_much():
    history = settled(engines(4), served_rate=100.0)
    decision = plan(engines(4), busy(wait_s=2.0, tokens_per_s=400.0), settings(WAIT), history)
    assert (decision.history.latency.failed_rate, decision.history.latency.served_rate) == (100.0, None)
    history = settled(engines(4), served_rate=70.0)
    decision = plan(engines(4), busy(wait_s=2.0, tokens_per_s=400.0), settings(WAIT), history)
    assert (decision.history.latency.failed_rate, decision.history.latency.served_rate) == (100.0, 70.0)


def test_what_is_served_for_the_time_of_an_average_is_evidence():
    met = [(0.0, 0.9), (30.0, 0.9), (59.0, 0.9), (60.0, 0.9)]
    served = [decision.history.latency.served_rate for decision in follow(engines(4), settings(WAIT), met)]
    assert served == [None, None, None, 25.0]


def test_evidence_overrules_what_failed_under_another_load():
    history = settled(engines(4), failed_rate=20.0, met_since_s=NOW_S - 30.0)
    decision = plan(engines(4), busy(wait_s=0.9, tokens_per_s=100.0), settings(WAIT), history)
    assert (decision.history.latency.failed_rate, decision.history.latency.served_rate) == (None, 25.0)
    decision = plan(engines(4), busy(wait_s=0.9, tokens_per_s=88.0), settings(WAIT), history)
    assert (decision.history.latency.failed_rate, decision.history.latency.served_rate) == (20.0, 22.0)


def test_no_time_to_first_token_means_none_asked_or_none_answered():
    rules = settings(FleetTargets(ttft_s=1.0))
    none_asked = plan(engines(4), idle(tokens_per_s=0.0), rules)
    assert (none_asked.replicas, none_asked.metrics[0].value) == (1, 0.0)
    none_answered = plan(engines(4), busy(tokens_per_s=0.0), rules)
    assert (none_answered.reason, none_answered.metrics[0].value) == (KeepReason.UNKNOWN, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"min_replicas": -1}, "min_replicas"),
        ({"max_replicas": 0}, "max_replicas"),
        ({"min_replicas": 5, "max_replicas": 4}, "max_replicas"),
        ({"idle_s": 0.0}, "idle_s"),
        ({"tolerance": -0.1}, "tolerance"),
        ({"tolerance": float("nan")}, "tolerance"),
        ({"stale_after_s": float("inf")}, "stale_after_s"),
    ],
)
def test_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        settings(**changes)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ({}, "at least one target"),
        ({"wait_s": 0.0}, "wait_s"),
        ({"kv_usage": 1.1}, "kv_usage must be at most 1"),
        ({"ttft_s": float("nan")}, "ttft_s"),
        ({"tokens_per_s": float("inf")}, "tokens_per_s"),
    ],
)
def test_targets_out_of_range_are_refused(targets, message):
    with pytest.raises(ValueError, match=message):
        FleetTargets(**targets)


def test_behaviour_out_of_range_is_refused():
    with pytest.raises(ValueError, match="stabilization_window_s"):
        replace(FREE, stabilization_window_s=3601.0)
    with pytest.raises(ValueError, match="value"):
        ScalingPolicy(type=PolicyType.PODS, value=0, period_s=15.0)
    with pytest.raises(ValueError, match="period_s"):
        ScalingPolicy(type=PolicyType.PODS, value=1, period_s=0.0)
    with pytest.raises(ValueError, match="at least 0"):
        engines(1, ready=-1)
