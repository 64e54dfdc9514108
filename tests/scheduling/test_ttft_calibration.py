"""TTFT calibration: the factor of each engine from predicted and measured times."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_scheduling.engine.choice import EngineSettings, Job, choose_target
from moe_scheduling.engine.target_state import TargetState
from moe_scheduling.engine.ttft_calibration import LEAST, MEMORY_S, MOST, OUTLIER, PRIOR_S, TtftCalibration
from moe_scheduling.signals import EngineSignal, StepTime, Target

A, B, C = Target("a"), Target("b"), Target("c", 1)
ABSURD = [math.nan, math.inf, -math.inf, -1.0, 10**400]


def taught(ratios, *, predicted_s=0.5, each_s=0.01, rounds=400):
    """A calibration after `rounds` answers of each target, which took `ratio` times as long as predicted."""
    calibration = TtftCalibration()
    for number in range(rounds):
        for target, ratio in ratios.items():
            calibration.observe(target, predicted_s, ratio * predicted_s, each_s * number)
    return calibration, each_s * rounds


def test_before_anything_was_seen_predictions_stand():
    assert TtftCalibration().factor(A, 5.0) == 1.0


@pytest.mark.parametrize("ratio", [0.25, 0.5, 1.0, 2.0, 5.0])
def test_the_ratio_of_a_target_is_found(ratio):
    calibration, now_s = taught({A: ratio})
    assert calibration.factor(A, now_s) == pytest.approx(ratio, rel=0.05)


def test_each_target_has_its_own():
    calibration, now_s = taught({A: 1.0, B: 2.0})
    assert calibration.factor(A, now_s) == pytest.approx(1.0, rel=0.05)
    assert calibration.factor(B, now_s) == pytest.approx(2.0, rel=0.05)


def test_the_ranks_of_an_engine_have_one_factor():
    calibration, now_s = taught({Target("a", 0): 1.0, Target("a", 1): 3.0, B: 1.0})
    factors = [calibration.factor(Target("a", rank), now_s) for rank in range(3)]
    assert factors == pytest.approx([2.0] * 3, rel=0.05)
    calibration.forget(Target("a", 1))
    assert calibration.factor(Target("a", 0), now_s) < 1.8


def test_a_target_that_is_new_is_like_the_fleet():
    calibration, now_s = taught({A: 3.0, B: 3.0})
    assert calibration.factor(C, now_s) == pytest.approx(3.0, rel=0.05)


def test_idle_all_go_back_to_neutral():
    calibration, now_s = taught({A: 4.0, B: 1.0})
    ages_s = [number * MEMORY_S for number in range(12)]
    factors = [calibration.factor(A, now_s + age_s) for age_s in ages_s]
    assert factors == sorted(factors, reverse=True)
    assert factors[-1] == pytest.approx(1.0, abs=0.01)


def test_long_predictions_count_for_more_than_short_ones():
    calibration = TtftCalibration()
    for number in range(1000):
        calibration.observe(A, 0.2, 0.2, 0.01 * number)
        # What each request costs alike, such as a network's way, doubles a short time only.
        calibration.observe(A, 0.01, 0.02, 0.01 * number)
    assert 1.0 < calibration.factor(A, 10.0) < 1.06


@pytest.mark.parametrize("measured_s", [0.0, 1e-300, 1e8])
def test_one_outlier_moves_a_factor_by_little(measured_s):
    calibration, now_s = taught({A: 1.0})
    before = calibration.factor(A, now_s)
    calibration.observe(A, 10.0, measured_s, now_s)
    assert calibration.factor(A, now_s) == pytest.approx(before, rel=0.02)


def test_a_tenth_of_outliers_moves_a_factor_by_a_tenth():
    calibration = TtftCalibration()
    for number in range(2000):
        calibration.observe(A, 0.2, 60.0 if number % 10 == 0 else 0.2, 0.01 * number)
    assert 1.0 < calibration.factor(A, 20.0) < 1.0 + 0.1 * OUTLIER


def test_a_first_observation_moves_a_factor_by_a_quarter_at_most():
    for measured_s in (0.0, 1e8):
        calibration = TtftCalibration()
        calibration.observe(A, 100.0, measured_s, 0.0)
        assert 0.75 < calibration.factor(A, 0.0) < 1.4


def test_one_that_is_forgotten_is_like_the_fleet_again():
    calibration, now_s = taught({A: 1.0, B: 2.0, C: 1.0})
    calibration.forget(B)
    calibration.forget(Target("stranger"))
    assert calibration.factor(B, now_s) == pytest.approx(4 / 3, rel=0.1)


@pytest.mark.parametrize(
    ("predicted_s", "measured_s"),
    [*((value, 1.0) for value in ABSURD), *((1.0, value) for value in ABSURD), (0.0, 1.0), (0.0, 0.0)],
)
def test_what_is_no_time_changes_nothing(predicted_s, measured_s):
    calibration, now_s = taught({A: 2.0})
    before = calibration.factor(A, now_s)
    calibration.observe(A, predicted_s, measured_s, now_s)
    assert calibration.factor(A, now_s) == before


ANY = st.floats() | st.integers() | st.sampled_from(ABSURD)
OBSERVATIONS = st.lists(st.tuples(st.sampled_from([A, B]), ANY, ANY, st.floats(allow_nan=False)), max_size=30)


@given(OBSERVATIONS, st.floats(allow_nan=False), st.sampled_from([A, B, C]))
def test_every_factor_is_within_the_bounds_whatever_was_seen(observations, now_s, target):
    calibration = TtftCalibration()
    for seen, predicted_s, measured_s, at_s in observations:
        calibration.observe(seen, predicted_s, measured_s, at_s)
    assert LEAST <= calibration.factor(target, now_s) <= MOST


TIMES = st.floats(1e-6, 1e6)
SANE = st.lists(st.tuples(st.sampled_from([A, B]), TIMES, TIMES, st.floats(0, 1000)), max_size=30)


@given(SANE, TIMES, st.floats(0, 1e8))
def test_no_observation_moves_a_factor_past_twice_or_half_of_what_was_believed(observations, predicted_s, measured_s):
    calibration = TtftCalibration()
    for observation in observations:
        calibration.observe(*observation)
    before = calibration.factor(A, 1000.0)
    calibration.observe(A, predicted_s, measured_s, 1000.0)
    after = calibration.factor(A, 1000.0)
    assert before / OUTLIER * 0.999 <= after <= before * OUTLIER * 1.001


@given(SANE)
def test_all_is_forgotten_in_the_end(observations):
    calibration = TtftCalibration()
    for observation in observations:
        calibration.observe(*observation)
    assert calibration.factor(A, 1000.0 + 30 * MEMORY_S) == pytest.approx(1.0, abs=1e-6)


def test_the_prior_is_worth_what_it_says():
    calibration = TtftCalibration()
    for _ in range(4):
        calibration.observe(A, PRIOR_S / 4, 1.2 * PRIOR_S / 4, 0.0)
    # Half from the target, a quarter through the fleet, which has seen the same.
    assert calibration.factor(A, 0.0) == pytest.approx(1.15)


STEP_TIME = StepTime(base_s=1 / 64, prefill_s=1 / 1024, decode_s=0.0)


def test_the_factor_multiplies_every_prediction():
    state = TargetState(A)
    state.sent("r", 1024, 0.0)
    state.ttft_factor = 2.0
    assert state.first_token_s(1024, STEP_TIME, 0.0, 2.0) == 2 * (2 + 1 / 64)
    state.observe(EngineSignal(waiting_prefill_tokens=1024, step_time=STEP_TIME), 1.0)
    assert state.first_token_s(1024, STEP_TIME, 1.0, 2.0) == 2 * (2 + 1 / 64)
    for _ in range(2):
        state.ttft_factor = 3.0
        assert state.ttft_factor == 3.0
    assert state.first_token_s(1024, STEP_TIME, 1.0, 2.0) == 3 * (2 + 1 / 64)
    assert state.ttft_model(STEP_TIME, 1.0, 2.0).wait_s(1024) == 3.0


def test_of_two_that_say_the_same_the_one_that_was_slower_is_passed_over():
    slow, fair = TargetState(A), TargetState(B)
    for state in (slow, fair):
        state.observe(EngineSignal(step_time=STEP_TIME), 0.0)
    slow.ttft_factor = 2.0
    for turn in range(4):
        assert choose_target(Job(100), [slow, fair], EngineSettings(), turn=turn, now_s=0.0).target == B
