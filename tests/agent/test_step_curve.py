"""The curve of a step's time on made-up engines: its knee found, followed, never negative, unmoved by freaks."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_agent.step_curve import KNEES, StepTimeCurveFit

BASE_S, TOKEN_S, DECODE_S = 0.012, 0.000014, 0.0002
KNEE, BEYOND_S = 1536, 0.000011


def true_s(prefill: int, decoding: int, everything: int, beyond_s: float = BEYOND_S) -> float:
    return BASE_S + TOKEN_S * prefill + DECODE_S * decoding + beyond_s * max(0, everything - KNEE)


def feed(curve: StepTimeCurveFit, steps: int, *, beyond_s: float = BEYOND_S, noise: float = 0.0, seed: int = 1) -> None:
    dice = random.Random(seed)
    for _ in range(steps):
        own, others = (dice.choice((0, 0, dice.randrange(1, 2048))) for _ in range(2))
        decoding = dice.randrange(1, 64)
        prefill, everything = max(own, others), own + others + 2 * decoding
        step_s = true_s(prefill, decoding, everything, beyond_s) * (1.0 + noise * dice.uniform(-1.0, 1.0))
        curve.observe(prefill_tokens=prefill, decoding_requests=decoding, all_tokens=everything, step_s=step_s)


def predict(curve: StepTimeCurveFit, prefill: int, decoding: int, everything: int) -> float:
    found = curve.at(decoding)
    assert found is not None
    beyond_s = sum(knee.token_s * max(0, everything - knee.tokens) for knee in found.knees)
    return found.decode_only_s + found.token_s * prefill + beyond_s


CASES = [(0, 10, 20), (500, 20, 540), (1000, 20, 2040), (2000, 20, 4040), (2000, 20, 2040)]


def test_there_is_no_curve_before_enough_steps():
    curve = StepTimeCurveFit(least_steps=16)
    feed(curve, 15)
    assert curve.at(1) is None
    feed(curve, 1)
    assert curve.at(1) is not None


@pytest.mark.parametrize(("noise", "rel"), [(0.0, 0.02), (0.2, 0.06)])
def test_the_knee_of_a_made_up_engine_is_found(noise, rel):
    curve = StepTimeCurveFit()
    feed(curve, 4000, noise=noise)
    for case in CASES:
        assert predict(curve, *case) == pytest.approx(true_s(*case), rel=rel), case


def test_an_engine_without_a_knee_is_a_line():
    curve = StepTimeCurveFit()
    feed(curve, 2000, beyond_s=0.0)
    found = curve.at(20)
    assert sum(knee.token_s for knee in found.knees) < 0.05 * TOKEN_S
    assert found.token_s == pytest.approx(TOKEN_S, rel=0.05)


def test_what_is_not_seen_any_more_is_not_forgotten():
    curve = StepTimeCurveFit(memory_steps=100.0)
    feed(curve, 2000)
    for step in range(3000):
        decoding = 1 + step % 64
        step_s = true_s(0, decoding, decoding)
        curve.observe(prefill_tokens=0, decoding_requests=decoding, all_tokens=decoding, step_s=step_s)
    assert predict(curve, 2000, 20, 4040) == pytest.approx(true_s(2000, 20, 4040), rel=0.1)


def test_one_freak_step_moves_the_curve_little():
    curve = StepTimeCurveFit()
    feed(curve, 2000)
    curve.observe(prefill_tokens=0, decoding_requests=8, all_tokens=16, step_s=120.0)
    feed(curve, 63, seed=2)
    for case in CASES:
        assert predict(curve, *case) == pytest.approx(true_s(*case), rel=0.05), case


@pytest.mark.parametrize("step_s", [0.0, -1.0, float("nan"), float("inf")])
def test_a_time_that_is_no_time_is_ignored(step_s):
    curve = StepTimeCurveFit(least_steps=1)
    curve.observe(prefill_tokens=1, decoding_requests=1, all_tokens=2, step_s=step_s)
    assert curve.at(1) is None


steps = st.tuples(st.integers(0, 20_000), st.integers(0, 500), st.integers(0, 40_000), st.floats(1e-6, 100.0))


@given(st.lists(steps, min_size=1, max_size=40))
def test_no_coefficient_is_ever_negative_or_endless(rows):
    curve = StepTimeCurveFit(least_steps=1, refit_every=1)
    for prefill, decoding, more, step_s in rows:
        curve.observe(
            prefill_tokens=prefill, decoding_requests=decoding, all_tokens=prefill + decoding + more, step_s=step_s
        )
    found = curve.at(3)
    if found is not None:
        values = [found.token_s, found.decode_only_s, *(knee.token_s for knee in found.knees)]
        assert all(0.0 <= value < float("inf") for value in values)
        assert [knee.tokens for knee in found.knees] == sorted(knee.tokens for knee in found.knees)
        assert {knee.tokens for knee in found.knees} <= set(KNEES)
