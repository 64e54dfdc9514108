"""The traffic share of a gateway, from signals and its requests in flight."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_scheduling.engine.target_state import TargetState
from moe_scheduling.engine.traffic_share import LEAST_SHARE, MEMORY_S, TrafficShare
from moe_scheduling.signals import EngineSignal, Target

STALE_AFTER_S = 2.0


def engine(running, own, *, waiting=0, observed_s=0.0):
    """State of an engine with `running` and `waiting` requests by its signal, `own` of them from this gateway."""
    state = TargetState(Target("a"))
    for number in range(own):
        state.sent(number, 10, observed_s)
    state.observe(EngineSignal(running=running, waiting=waiting), observed_s)
    return state


def share(*states, now_s=0.0):
    return TrafficShare().observe(states, now_s, STALE_AFTER_S)


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        ([], 1.0),
        ([engine(0, 0)], 1.0),
        ([engine(99, 99)], 1.0),
        ([engine(99, 49)], 0.5),
        ([engine(60, 24, waiting=39)], 0.25),
        # Requests of two engines are counted together: where one has none of the own, that says nothing by itself.
        ([engine(60, 49), engine(39, 0)], 0.5),
        ([engine(10**6, 1)], LEAST_SHARE),
        ([engine(0, 5)], 1.0),
        ([engine(1, 0)], 0.5),
    ],
)
def test_the_share_is_that_of_the_requests(states, expected):
    assert share(*states) == pytest.approx(expected)


def test_targets_without_a_fresh_signal_do_not_count():
    assert share(TargetState(Target("b")), engine(99, 49, observed_s=-3.0)) == 1.0
    assert share(TargetState(Target("b")), engine(99, 49)) == 0.5


def test_counts_are_averaged_and_forgotten():
    load = TrafficShare()
    assert load.observe([engine(99, 49)], 0.0, STALE_AFTER_S) == 0.5
    # A moment at which the own happen to be many changes little.
    assert load.observe([engine(99, 99, observed_s=0.1)], 0.1, STALE_AFTER_S) == pytest.approx(0.5, abs=0.01)
    assert load.observe([], 5 * MEMORY_S, STALE_AFTER_S) == pytest.approx(1.0, abs=0.25)
    assert load.observe([], 20 * MEMORY_S, STALE_AFTER_S) == pytest.approx(1.0, abs=0.001)


ROWS = st.lists(st.tuples(st.integers(0, 10**9), st.integers(0, 20), st.floats(-5, 5)), max_size=4)


@given(st.lists(st.tuples(st.floats(-1, 30), ROWS), max_size=10))
def test_the_share_stays_within_its_bounds_whatever_the_signals_are(steps):
    load, now_s = TrafficShare(), 0.0
    for step_s, rows in steps:
        # A clock that goes back a little breaks nothing.
        now_s += step_s
        states = [engine(running, own, observed_s=now_s + age_s) for running, own, age_s in rows]
        assert LEAST_SHARE <= load.observe(states, now_s, STALE_AFTER_S) <= 1.0
