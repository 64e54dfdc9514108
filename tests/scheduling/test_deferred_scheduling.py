"""How long the scheduling of a step may wait: tables, invariants, and the share of steps that end before it."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_scheduling.request.deferred_scheduling import EARLY_SHARE, LEAD_S, DeferredScheduling

TIMES = st.floats(0.0, 1e6)


def learn(ratios, predicted_s=0.05):
    deferral = DeferredScheduling()
    for ratio in ratios:
        deferral.observe(predicted_s, ratio * predicted_s)
    return deferral


@pytest.mark.parametrize(
    ("what", "ratios", "least", "most"),
    [
        ("before anything was seen, half the time", [], 0.5, 0.5),
        ("steps take as long as predicted", [1.0] * 300, 0.95, 1.0),
        ("steps take twice as long as predicted, but no wait is longer than that", [2.0] * 300, 1.0, 1.0),
        ("steps take half", [0.5] * 300, 0.4, 0.55),
        ("one step in ten takes a third", ([1.0] * 9 + [0.34]) * 100, 0.2, 0.5),
        ("one step in a hundred takes a third", ([1.0] * 99 + [0.34]) * 10, 0.85, 1.0),
    ],
)
def test_it_defers_by_the_part_that_steps_take_at_least(what, ratios, least, most):
    wait_s = learn(ratios).wait_s(1.0)
    assert least - LEAD_S - 1e-9 <= wait_s <= most - LEAD_S + 1e-9, what


def test_a_step_shorter_than_the_lead_is_not_waited_for():
    assert learn([1.0] * 300).wait_s(LEAD_S) == 0.0


@pytest.mark.parametrize("predicted_s", [0.0, -1.0, math.inf, math.nan])
def test_what_was_not_predicted_teaches_nothing_and_is_not_waited_for(predicted_s):
    deferral = DeferredScheduling()
    before = deferral.wait_s(1.0)
    deferral.observe(predicted_s, 0.5)
    deferral.observe(1.0, predicted_s)
    assert deferral.wait_s(1.0) == before
    assert deferral.wait_s(predicted_s) == 0.0


@given(seen=st.lists(st.tuples(TIMES, TIMES), max_size=200), predicted_s=TIMES)
def test_a_wait_is_never_negative_and_never_longer_than_the_prediction(seen, predicted_s):
    deferral = DeferredScheduling()
    for each in seen:
        deferral.observe(*each)
    assert 0.0 <= deferral.wait_s(predicted_s) <= predicted_s


@pytest.mark.parametrize("seed", range(4))
def test_about_the_wanted_share_of_steps_ends_before_the_next_is_scheduled(seed):
    dice, deferral, early = random.Random(seed), DeferredScheduling(), 0
    for number in range(12_000):
        # What a fit without a term for the context does: off by up to a third either way.
        step_s = 0.05 * dice.uniform(0.67, 1.33)
        early += number >= 2000 and step_s < deferral.wait_s(0.05)
        deferral.observe(0.05, step_s)
    # `LEAD_S` is subtracted from the wait, so that fewer end before it.
    assert 0.0 < early / 10_000 < EARLY_SHARE * 1.5


def test_a_wait_that_was_too_long_with_what_launching_takes_counts_as_such():
    deferral = DeferredScheduling()
    for _ in range(300):
        deferral.observe(0.05, 0.05)
    before = deferral.wait_s(0.05)
    deferral.observe(0.05, 0.06, overran=True)
    assert deferral.wait_s(0.05) < before
