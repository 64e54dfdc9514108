"""The step-time line on made-up engines: found, followed, never negative, unmoved by freaks and by silence."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_agent.step_time import StepTimeFit, StepTimeLines

BASE_S, PREFILL_S, DECODE_S = 0.012, 0.00015, 0.0008


def true_s(prefill: int, decode: int, factor: float = 1.0) -> float:
    return factor * (BASE_S + PREFILL_S * prefill + DECODE_S * decode)


def feed(fit: StepTimeFit, steps: int, *, seed: int = 1, noise: float = 0.0, factor: float = 1.0) -> None:
    dice = random.Random(seed)
    for _ in range(steps):
        prefill = dice.choice((0, 0, 0, dice.randrange(1, 2048)))
        decode = dice.randrange(1, 64)
        step_s = true_s(prefill, decode, factor) * (1.0 + noise * dice.uniform(-1.0, 1.0))
        fit.observe(prefill_tokens=prefill, decoding_requests=decode, step_s=step_s)


def assert_near(fit: StepTimeFit, rel: float, factor: float = 1.0) -> None:
    assert fit.line is not None
    for prefill, decode in ((0, 1), (0, 32), (0, 64), (500, 0), (2048, 16)):
        predicted_s = fit.line.base_s + fit.line.prefill_s * prefill + fit.line.decode_s * decode
        assert predicted_s == pytest.approx(true_s(prefill, decode, factor), rel=rel)


def test_no_line_before_enough_steps():
    fit = StepTimeFit(least_steps=16)
    feed(fit, 15)
    assert fit.line is None
    feed(fit, 1)
    assert fit.line is not None


def test_the_coefficients_of_an_exact_engine_are_found():
    fit = StepTimeFit()
    feed(fit, 300)
    assert fit.line.base_s == pytest.approx(BASE_S, rel=1e-3)
    assert fit.line.prefill_s == pytest.approx(PREFILL_S, rel=1e-3)
    assert fit.line.decode_s == pytest.approx(DECODE_S, rel=1e-3)


def test_noise_of_a_fifth_leaves_the_predictions_within_a_twentieth():
    fit = StepTimeFit()
    feed(fit, 2000, noise=0.2)
    assert_near(fit, rel=0.05)


def test_an_engine_that_becomes_slower_is_followed():
    fit = StepTimeFit(memory_steps=200.0)
    feed(fit, 500)
    feed(fit, 2000, factor=3.0, seed=2)
    assert_near(fit, rel=0.02, factor=3.0)


def test_what_is_not_seen_any_more_is_not_forgotten():
    fit = StepTimeFit(memory_steps=100.0)
    feed(fit, 500)
    for step in range(5000):
        fit.observe(prefill_tokens=0, decoding_requests=1 + step % 64, step_s=true_s(0, 1 + step % 64))
    assert fit.line.prefill_s == pytest.approx(PREFILL_S, rel=0.02)


def test_one_freak_step_moves_the_line_little():
    fit = StepTimeFit()
    feed(fit, 500)
    fit.observe(prefill_tokens=0, decoding_requests=8, step_s=120.0)
    feed(fit, 8)
    assert_near(fit, rel=0.05)


@pytest.mark.parametrize("step_s", [0.0, -1.0, float("nan"), float("inf")])
def test_a_time_that_is_no_time_is_ignored(step_s):
    fit = StepTimeFit(least_steps=1)
    fit.observe(prefill_tokens=1, decoding_requests=1, step_s=step_s)
    assert fit.line is None


def test_a_step_without_work_is_ignored():
    fit = StepTimeFit(least_steps=1)
    fit.observe(prefill_tokens=0, decoding_requests=0, step_s=0.01)
    assert fit.line is None


def test_an_engine_that_sees_one_kind_of_step_is_predicted_for_that_kind():
    fit = StepTimeFit()
    for _ in range(100):
        fit.observe(prefill_tokens=0, decoding_requests=1, step_s=0.02)
    assert fit.line.base_s + fit.line.decode_s == pytest.approx(0.02, rel=1e-3)


@given(
    st.lists(st.tuples(st.integers(0, 100_000), st.integers(0, 2000), st.floats(1e-6, 1e3)), min_size=16, max_size=60)
)
def test_no_coefficient_is_ever_negative_or_not_finite(steps):
    fit = StepTimeFit(refit_every=1)
    for prefill, decode, step_s in steps:
        fit.observe(prefill_tokens=prefill, decoding_requests=decode, step_s=step_s)
    if fit.line is not None:
        assert all(0.0 <= value < float("inf") for value in (fit.line.base_s, fit.line.prefill_s, fit.line.decode_s))


def test_steps_with_prompts_have_a_line_of_their_own():
    lines = StepTimeLines()
    assert (lines.step_s(100, 0), lines.step_s(0, 4)) == (0.0, 0.0)
    for number in range(200):
        tokens = 100 * (number % 7) if number % 2 else 0
        step_s = 0.04 + 1e-5 * tokens if tokens else 0.01
        lines.observe(prefill_tokens=tokens, decoding_requests=4, step_s=step_s)
    assert lines.step_s(1000, 4) == pytest.approx(0.05, rel=0.01)
    assert lines.prompt_line.prefill_s == pytest.approx(1e-5, rel=0.02)
    assert lines.line.prefill_s > 2 * lines.prompt_line.prefill_s
