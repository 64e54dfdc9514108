"""Step times before and after a move are compared by class of load, or not at all."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_agent.experts.step_times import StepTimes, compare_step_times, load_class

SMALL, LARGE = load_class(8, 4), load_class(512, 256)


def test_classes_are_eighths_of_a_doubling():
    assert load_class(100, 50) == load_class(102, 51)
    assert load_class(100, 50) != load_class(120, 50)
    assert load_class(100, 50) != load_class(100, 60)
    assert load_class(0, 0) == (-1, -1)


def test_only_steps_of_the_same_class_are_compared():
    before = {SMALL: [0.010] * 20, LARGE: [0.100] * 20}
    after = {SMALL: [0.009] * 20}
    gain = compare_step_times(before, after)
    assert gain.mean_s == pytest.approx(0.001)
    # A load that changed is no gain: all steps after are small ones.
    assert gain.before == gain.after == 18


def test_classes_weigh_as_they_came_after_the_move():
    before = {SMALL: [0.010] * 100, LARGE: [0.100] * 100}
    after = {SMALL: [0.010] * 90, LARGE: [0.090] * 10}
    assert compare_step_times(before, after).mean_s == pytest.approx(0.001, rel=0.05)


@pytest.mark.parametrize(
    ("before", "after"),
    [({}, {}), ({SMALL: [0.01] * 50}, {LARGE: [0.01] * 50}), ({SMALL: [0.01] * 7}, {SMALL: [0.01] * 50})],
)
def test_too_little_to_compare_is_no_gain_and_no_loss(before, after):
    assert compare_step_times(before, after) is None


def test_a_step_that_the_machine_held_up_does_not_count():
    gain = compare_step_times({SMALL: [0.010] * 19 + [3.0]}, {SMALL: [0.009] * 20})
    assert gain.mean_s == pytest.approx(0.001)
    assert gain.error_s < 1e-9


TIMES = st.lists(st.floats(0.001, 1.0), min_size=8, max_size=40)


@given(early=TIMES, late=TIMES, shift=st.floats(0.0, 0.5))
def test_a_loss_seen_from_the_other_side_is_a_gain_and_a_slower_step_is_never_a_gain(early, late, shift):
    there = compare_step_times({SMALL: early}, {SMALL: late})
    back = compare_step_times({SMALL: late}, {SMALL: early})
    assert there.mean_s == pytest.approx(-back.mean_s)
    assert there.error_s == pytest.approx(back.error_s)
    slower = compare_step_times({SMALL: early}, {SMALL: [step_s + shift for step_s in early]})
    assert slower.mean_s == pytest.approx(-shift, abs=1e-9)


def test_of_each_class_the_newest_are_kept_and_older_ones_than_asked_for_are_left_out():
    times = StepTimes()
    for number in range(1000):
        times.add(number, 8, 4, float(number))
    assert times.since(0)[SMALL][-1] == 999.0
    assert len(times.since(0)[SMALL]) < 1000
    assert times.since(990)[SMALL] == [float(number) for number in range(990, 1000)]
    times.clear()
    assert times.since(0) == {}


@pytest.mark.parametrize(("late", "is_clear"), [([0.009] * 20, True), ([0.0099, 0.0102] * 10, False)])
def test_a_difference_within_the_noise_is_not_clear(late, is_clear):
    assert compare_step_times({SMALL: [0.0101, 0.0100] * 10}, {SMALL: late}).is_clear is is_clear
