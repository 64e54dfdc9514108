"""The step-time line on made-up engines: found, followed, never negative, unmoved by freaks and by silence."""

import random
from dataclasses import astuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_agent.step_time import StepTimeFit

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
        assert fit.line.step_s(prefill, decode) == pytest.approx(true_s(prefill, decode, factor), rel=rel)


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


def test_steps_with_prompts_may_have_a_least_time_and_many_answers_may_share_their_experts():
    """The shape of a measured GPU: 15 ms more with any prompt tokens, and answers by their square root."""

    def measured_s(prefill, decode):
        return 0.0025 + 0.001 * decode**0.5 + (0.015 + 8e-6 * prefill if prefill else 0.0)

    fit, dice = StepTimeFit(), random.Random(3)
    for _ in range(3000):
        prefill, decode = dice.choice((0, 0, 0, dice.randrange(1, 8192))), dice.randrange(1, 64)
        fit.observe(prefill_tokens=prefill, decoding_requests=decode, step_s=measured_s(prefill, decode))
    assert fit.line.prefill_base_s == pytest.approx(0.015, rel=0.01)
    assert fit.line.decode_root_s == pytest.approx(0.001, rel=0.01)
    for prefill, decode in ((0, 1), (0, 200), (1, 8), (8192, 32)):
        assert fit.line.step_s(prefill, decode) == pytest.approx(measured_s(prefill, decode), rel=0.01)


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
    assert fit.line.decode_step_s(1) == pytest.approx(0.02, rel=1e-3)


@given(
    st.lists(st.tuples(st.integers(0, 100_000), st.integers(0, 2000), st.floats(1e-6, 1e3)), min_size=16, max_size=60)
)
def test_no_coefficient_is_ever_negative_or_not_finite(steps):
    fit = StepTimeFit(refit_every=1)
    for prefill, decode, step_s in steps:
        fit.observe(prefill_tokens=prefill, decoding_requests=decode, step_s=step_s)
    if fit.line is not None:
        assert all(0.0 <= value < float("inf") for value in astuple(fit.line))
