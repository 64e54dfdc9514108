"""The load of prefill engines and of decode engines, and the number of decode engines that it asks for."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_scheduling.fleet.role_load import decode_load, prefill_backlog_s
from moe_scheduling.fleet.scaling import ScalingRules
from moe_scheduling.fleet.settings import FleetSettings, FleetTargets
from moe_scheduling.fleet.size import FleetHistory, FleetObservation, FleetSignal, Keep, Metric, Scale, plan_fleet
from moe_scheduling.signals import EngineSignal, StepTime

STEP = StepTime(base_s=0.010, prefill_s=0.001, decode_s=0.0005)
ROOTED = replace(STEP, decode_root_s=0.003)


def rank(waiting=0, running=0, decoding=0, step_time=STEP):
    return EngineSignal(
        waiting_prefill_tokens=waiting, running_prefill_tokens=running, decode_tokens=decoding, step_time=step_time
    )


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        ([], None),
        ([rank()], 0.0),
        ([rank(1000, 500)], 1.5),
        ([rank(1000), rank(3000)], 3.0),
        ([rank(step_time=None)], 0.0),
        ([rank(5, step_time=None)], None),
        ([rank(1000), rank(5, step_time=None)], None),
        ([rank(1000, step_time=StepTime(base_s=0.0, prefill_s=math.nan, decode_s=0.0))], None),
    ],
)
def test_the_backlog_of_an_engine_is_that_of_its_busiest_rank(ranks, expected):
    assert prefill_backlog_s(ranks) == (expected if expected is None else pytest.approx(expected))


@pytest.mark.parametrize(
    ("ranks", "inter_token_s", "expected"),
    [
        ([], 0.03, None),
        ([rank(decoding=0)], 0.03, 0.0),
        ([rank(decoding=20)], 0.03, 0.5),
        ([rank(decoding=20), rank(decoding=80)], 0.03, 2.0),
        ([rank(decoding=20, step_time=None)], 0.03, None),
        ([rank(decoding=0, step_time=None)], 0.03, 0.0),
        ([rank(decoding=20), rank(decoding=0, step_time=None)], 0.03, 0.5),
        # 0.010 + 0.0005 * 16 + 0.003 * sqrt(16) = 0.030
        ([rank(decoding=16, step_time=ROOTED)], 0.03, 1.0),
        ([rank(decoding=4, step_time=ROOTED)], 0.03, 0.25),
        ([rank(decoding=9, step_time=replace(ROOTED, decode_s=0.0, decode_root_s=0.005))], 0.02, 2.25),
        ([rank(decoding=9, step_time=replace(ROOTED, decode_s=0.0, decode_root_s=0.0))], 0.02, 0.0),
        ([rank(decoding=20)], 0.010, 0.0),
        ([rank(decoding=20)], 0.005, 0.0),
        ([rank(decoding=20, step_time=StepTime(base_s=math.nan, prefill_s=0.0, decode_s=0.0005))], 0.03, None),
        ([rank(decoding=20, step_time=replace(STEP, decode_s=-1.0))], 0.03, None),
        ([rank(decoding=20, step_time=replace(STEP, decode_root_s=1e200))], 0.03, None),
        ([rank(decoding=20, step_time=replace(STEP, decode_root_s=math.nan))], 0.03, None),
    ],
)
def test_the_load_is_the_part_of_the_requests_that_a_step_has_time_for(ranks, inter_token_s, expected):
    assert decode_load(ranks, inter_token_s) == (expected if expected is None else pytest.approx(expected))


@given(st.integers(0, 10_000), st.floats(0.0105, 10.0))
def test_a_load_of_one_is_a_step_as_long_as_the_bound(decoding, inter_token_s):
    load = decode_load([rank(decoding=decoding)], inter_token_s)
    step_s = STEP.base_s + STEP.decode_s * decoding
    assert load * (inter_token_s - STEP.base_s) == pytest.approx(step_s - STEP.base_s, abs=1e-12)


FREE = ScalingRules(stabilization_window_s=0.0, policies=())
RULES = FleetSettings(
    targets=FleetTargets(kv_usage=0.8, inter_token_s=0.03), max_replicas=20, scale_up=FREE, scale_down=FREE
)


@pytest.mark.parametrize(
    ("replicas", "load", "kv_usage", "wanted"),
    [
        (2, 2.0, 0.1, 4),
        (4, 0.45, 0.1, 2),
        (2, 1.05, 0.8, 2),
        (2, None, 0.1, 2),
        (2, None, 1.0, 3),
        (2, math.nan, 0.1, 2),
    ],
)
def test_as_many_decode_engines_as_keep_the_step(replicas, load, kv_usage, wanted):
    signal = FleetSignal(observed_s=0.0, kv_usage=kv_usage, decode_load=load, in_flight=9)
    decision = plan_fleet(FleetObservation(replicas=replicas, ready=replicas), signal, RULES, FleetHistory(), 0.0)
    assert (decision.replicas if isinstance(decision, Scale) else replicas) == wanted
    assert isinstance(decision, Scale | Keep)


def test_the_time_between_tokens_can_bind():
    signal = FleetSignal(observed_s=0.0, kv_usage=0.1, decode_load=2.0, in_flight=9)
    decision = plan_fleet(FleetObservation(replicas=2, ready=2), signal, RULES, FleetHistory(), 0.0)
    assert decision.binding is Metric.INTER_TOKEN
    assert [(row.metric, row.value, row.target) for row in decision.metrics][-1] == (Metric.INTER_TOKEN, 2.0, 1.0)
