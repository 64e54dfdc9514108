"""How many engines run, and which go first: what no honest peer sends, and clocks that jump."""

import math
from dataclasses import replace

import pytest
from moe_scheduling.fleet.scaling import (
    Dated,
    PolicySelection,
    PolicyType,
    ScalingPolicy,
    ScalingRecord,
    ScalingRules,
    bound_change,
    stabilise,
)
from moe_scheduling.fleet.settings import FleetSettings, FleetTargets
from moe_scheduling.fleet.size import (
    FleetHistory,
    FleetObservation,
    FleetSignal,
    Keep,
    KeepReason,
    Metric,
    Scale,
    plan_fleet,
)
from moe_scheduling.fleet.victims import EngineWork, order_victims, work_left_s
from moe_scheduling.signals import EngineSignal, StepTime

NOW_S = 1000.0
FREE = ScalingRules(stabilization_window_s=0.0, policies=())
ALL = FleetTargets(wait_s=1.0, kv_usage=0.5, ttft_s=1.0, tokens_per_s=1000.0)
RULES = FleetSettings(targets=ALL, max_replicas=16, scale_up=FREE, scale_down=FREE)
GOOD = {"wait_s": 0.1, "kv_usage": 0.1, "ttft_s": 0.1, "tokens_per_s": 100.0, "arrivals_per_s": 1.0}
ABSURD = [math.nan, math.inf, -math.inf, -1.0]


def plan(signal, history=None, now_s=NOW_S, rules=RULES, replicas=4):
    observation = FleetObservation(replicas=replicas, ready=replicas)
    return plan_fleet(observation, signal, rules, history or FleetHistory(), now_s)


@pytest.mark.parametrize("value", ABSURD)
@pytest.mark.parametrize(
    ("name", "metric"),
    [
        ("wait_s", Metric.WAIT),
        ("kv_usage", Metric.KV_USAGE),
        ("ttft_s", Metric.TTFT),
        ("tokens_per_s", Metric.TOKENS_PER_S),
    ],
)
def test_a_value_that_is_none_counts_as_not_known(name, metric, value):
    decision = plan(FleetSignal(observed_s=NOW_S, in_flight=1, **(GOOD | {name: value})))
    assert isinstance(decision, Keep)
    assert [view.metric for view in decision.metrics if view.value is None] == [metric]


@pytest.mark.parametrize("value", ABSURD)
def test_an_absurd_time_in_the_queue_leaves_the_predicted_wait(value):
    decision = plan(FleetSignal(observed_s=NOW_S, held=1, held_since_s=value, **GOOD))
    assert decision.metrics[0].value == 0.1


@pytest.mark.parametrize("observed_s", [math.nan, math.inf, -math.inf, NOW_S - 31.0, NOW_S + 31.0])
def test_a_signal_of_no_time_or_another_time_is_stale(observed_s):
    assert plan(FleetSignal(observed_s=observed_s, in_flight=1, **GOOD)).reason is KeepReason.STALE


@pytest.mark.parametrize("now_s", [math.nan, math.inf, -math.inf])
def test_a_time_that_is_none_is_refused(now_s):
    with pytest.raises(ValueError, match="now_s must be finite"):
        plan(None, now_s=now_s)


def test_huge_values_ask_for_no_more_than_the_most():
    decision = plan(FleetSignal(observed_s=NOW_S, in_flight=1, **dict.fromkeys(GOOD, 1e308)))
    assert decision.replicas == 16
    tiny = replace(RULES, targets=FleetTargets(tokens_per_s=5e-324))
    assert plan(FleetSignal(observed_s=NOW_S, tokens_per_s=1e308), rules=tiny).replicas == 16


def test_a_kv_cache_is_never_more_than_full():
    rules = replace(RULES, targets=FleetTargets(kv_usage=0.5))
    assert plan(FleetSignal(observed_s=NOW_S, kv_usage=100.0), rules=rules).replicas == 8


def test_where_fewest_and_most_are_one_the_number_stays():
    rules = replace(RULES, min_replicas=4, max_replicas=4)
    for tokens_per_s in (0.0, 1e9):
        signal = FleetSignal(observed_s=NOW_S, in_flight=1, **(GOOD | {"tokens_per_s": tokens_per_s}))
        assert isinstance(plan(signal, rules=rules), Keep)


def test_a_clock_that_jumps_back_holds_no_window_open_for_ever():
    window = replace(FREE, stabilization_window_s=300.0)
    rules = replace(RULES, targets=FleetTargets(kv_usage=0.5), scale_down=window)

    def at(now_s, history):
        return plan(FleetSignal(observed_s=now_s, kv_usage=0.25, in_flight=1), history, now_s, rules)

    history = at(1e6, FleetHistory()).history
    back = at(0.0, history)
    assert isinstance(back, Keep)
    assert isinstance(at(299.0, back.history), Keep)
    assert isinstance(at(300.0, back.history), Scale)


def test_a_clock_that_jumps_back_does_not_keep_an_idle_fleet_for_ever():
    rules = replace(RULES, min_replicas=0, idle_s=100.0)

    def at(now_s, history):
        return plan(FleetSignal(observed_s=now_s, arrivals_per_s=0.0), history, now_s, rules, 1)

    history = at(0.0, at(1e6, FleetHistory()).history).history
    assert isinstance(at(99.0, history), Keep)
    assert at(100.0, history).replicas == 0


def test_a_record_of_more_engines_than_there_may_be_plans_none_of_them():
    record = ScalingRecord().recommended(50, NOW_S - 1.0)
    window = replace(FREE, stabilization_window_s=300.0)
    rules = replace(RULES, max_replicas=6, scale_up=window, scale_down=window)
    signal = FleetSignal(observed_s=NOW_S, in_flight=1, **GOOD)
    assert isinstance(plan(signal, FleetHistory(record=record), rules=rules), Keep)


@pytest.mark.parametrize("select", [PolicySelection.MAX, PolicySelection.MIN])
def test_a_change_by_others_turns_no_rise_into_a_fall(select):
    """What policies counted may not fit what stands now: someone else changed the number."""
    policy = ScalingPolicy(type=PolicyType.PODS, value=1, period_s=60.0)
    rules = replace(FREE, policies=(policy,), select_policy=select)
    risen = ScalingRecord(changes=(Dated(NOW_S, 10),))
    fallen = ScalingRecord(changes=(Dated(NOW_S, -10),))
    assert bound_change(5, 9, risen, rules, rules, NOW_S) == 5
    assert bound_change(5, 2, fallen, rules, rules, NOW_S) == 5


@pytest.mark.parametrize(
    ("select", "up", "down"), [(PolicySelection.MAX, 18, 5), (PolicySelection.MIN, 13, 7), ("disabled", 10, 10)]
)
def test_the_policy_that_counts_is_selected(select, up, down):
    """Kubernetes, "Scaling Policies": the policy that allows the greatest change by default, the least with `Min`."""
    percent = ScalingPolicy(type=PolicyType.PERCENT, value=80 if up > 10 else 100, period_s=60.0)
    pods = ScalingPolicy(type=PolicyType.PODS, value=3, period_s=60.0)
    rules = replace(FREE, policies=(percent, pods), select_policy=PolicySelection(select))
    half = replace(rules, policies=(replace(percent, value=50), pods))
    assert bound_change(10, 100, ScalingRecord(), rules, FREE, NOW_S) == up
    assert bound_change(10, 0, ScalingRecord(), FREE, half, NOW_S) == down


def test_a_percentage_never_keeps_one_engine_alone():
    by_tenth = replace(FREE, policies=(ScalingPolicy(type=PolicyType.PERCENT, value=10, period_s=60.0),))
    assert bound_change(1, 9, ScalingRecord(), by_tenth, by_tenth, NOW_S) == 2
    assert bound_change(80, 10, ScalingRecord(), by_tenth, by_tenth, NOW_S) == 72


def test_no_recommendation_leaves_the_one_that_is_made():
    assert stabilise(4, 7, ScalingRecord(), FREE, FREE, NOW_S) == 7
    assert stabilise(4, 2, ScalingRecord(), FREE, FREE, NOW_S) == 2


@pytest.mark.parametrize("base_s", [math.nan, -1.0])
def test_work_that_is_no_number_is_never_little(base_s):
    rank = EngineSignal(running=1, step_time=StepTime(base_s=base_s, prefill_s=0.0, decode_s=0.0))
    assert work_left_s(rank) == math.inf
    first, last = order_victims([EngineWork(name="a", ranks=(rank,)), EngineWork(name="b", ranks=(EngineSignal(),))])
    assert (first.name, last.name) == ("b", "a")


def test_fewer_requests_than_none_are_none():
    step_time = StepTime(base_s=1.0, prefill_s=0.5, decode_s=1.0)
    assert work_left_s(EngineSignal(running=-1, waiting_prefill_tokens=4, step_time=step_time)) == 2.0


def test_no_engines_have_no_order():
    assert order_victims([]) == ()
