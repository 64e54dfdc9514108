"""Rates of the last half minute, against a recount of all events."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_gateway.recent import WINDOW_S, RecentDemand

EVENTS = st.lists(st.tuples(st.floats(0.0, 20.0), st.integers(0, 5000)), max_size=60)


@given(EVENTS, st.floats(0.0, 100.0))
def test_the_sums_are_those_of_the_seconds_in_the_window(steps, pause_s):
    recent, now_s, events = RecentDemand(1000.0), 1000.0, []
    for step_s, tokens in steps:
        now_s += step_s
        recent.arrive(tokens, now_s)
        recent.answer(tokens / 1000.0, now_s)
        events.append((now_s, tokens))
    now_s += pause_s
    inside = [tokens for at_s, tokens in events if int(at_s) > int(now_s) - WINDOW_S]
    watched_s = min(WINDOW_S - 1 + now_s % 1.0, max(1.0, now_s - 1000.0))
    assert recent.arrivals_per_s(now_s) == pytest.approx(len(inside) / watched_s)
    assert recent.prompt_tokens_per_s(now_s) == pytest.approx(sum(inside) / watched_s)
    mean_s = sum(inside) / 1000.0 / len(inside) if inside else None
    assert recent.mean_ttft_s(now_s) == (None if mean_s is None else pytest.approx(mean_s))


def test_a_steady_rate_is_right_from_the_first_second_on_and_forgotten_after_the_last():
    recent = RecentDemand(50.5)
    for tick in range(600):
        recent.arrive(100, now_s := 50.5 + tick / 10)
        if tick > 20:
            assert recent.arrivals_per_s(now_s) == pytest.approx(10, rel=0.06)
            assert recent.prompt_tokens_per_s(now_s) == pytest.approx(1000, rel=0.06)
    assert recent.arrivals_per_s(now_s + WINDOW_S + 1) == 0.0
    assert recent.mean_ttft_s(now_s) is None


def test_a_clock_that_stands_still_or_an_arrival_noted_late_breaks_nothing():
    recent = RecentDemand(10.0)
    recent.arrive(1, 12.0)
    recent.arrive(1, 11.9)
    assert recent.arrivals_per_s(12.0) == 1.0
