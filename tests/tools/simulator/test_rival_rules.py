"""The rivals' rules for the choice of an engine, as their authors publish them."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_scheduling.engine.target_state import TargetState
from moe_scheduling.signals import EngineSignal, Target
from moe_tools.simulator.rival_rules import GimbalRule, kv_usage, pick_as_gimbal, pick_as_vllm, pick_of_two

A, B, C, D = (Target(name) for name in "abcd")
NOW_S, STALE_AFTER_S = 100.0, 2.0


def engine(target, *, own=0, observed_s=NOW_S, **signal):
    state = TargetState(target)
    for key in range(own):
        state.sent(key, 10, observed_s - 1)
    state.observe(EngineSignal(**signal), observed_s)
    return state


# vLLM's own.


@pytest.mark.parametrize(
    ("engines", "chosen"),
    [
        ([engine(A, waiting=2, running=3), engine(B, waiting=0, running=4)], B),
        ([engine(A, own=5), engine(B, waiting=1, running=3)], B),
        # 1 + 1 + 6 * 1 * 0.5 against 4 that run: KV use counts where requests wait, and only there.
        ([engine(A, waiting=1, running=1, kv_usage=1.0), engine(B, running=4, kv_usage=1.0)], B),
        ([engine(A, waiting=1, running=1, kv_usage=0.8), engine(B, running=4, kv_usage=1.0)], A),
        ([engine(A, waiting=1, running=1, kv_usage=0.5), engine(B, running=3)], A),
        ([engine(A, running=2), engine(B, running=2)], A),
        # What was said long ago counts for nothing.
        ([engine(A, own=1), engine(B, waiting=9, running=9, observed_s=NOW_S - 3)], B),
    ],
)
def test_the_least_score_of_vllm_wins(engines, chosen):
    assert pick_as_vllm(engines, NOW_S, STALE_AFTER_S).target == chosen


def test_what_was_sent_since_the_signal_waits():
    engines = [engine(A, kv_usage=1.0), engine(B, kv_usage=1.0, running=3)]
    engines[0].sent("r", 10, NOW_S)
    assert pick_as_vllm(engines, NOW_S, STALE_AFTER_S).target == B


def test_the_own_requests_stand_for_those_of_other_gateways():
    engines = [engine(A, own=2), engine(B, running=3)]
    assert pick_as_vllm(engines, NOW_S, STALE_AFTER_S).target == A
    engines[0].traffic_share = engines[1].traffic_share = 0.5
    assert pick_as_vllm(engines, NOW_S, STALE_AFTER_S).target == B


# Power of two.


@given(st.lists(st.integers(0, 5), min_size=2, max_size=6), st.integers(-(10**20), 10**20))
def test_the_one_with_the_most_is_never_taken_where_it_is_alone_with_that(in_flight, turn):
    engines = [engine(Target(str(at)), own=own) for at, own in enumerate(in_flight)]
    chosen = pick_of_two(engines, turn)
    assert chosen in engines
    if in_flight.count(max(in_flight)) == 1:
        assert chosen.in_flight < max(in_flight)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 16])
def test_all_are_drawn_evenly(count):
    engines = [engine(Target(str(at))) for at in range(count)]
    taken = Counter(pick_of_two(engines, turn).target for turn in range(1000 * count))
    assert len(taken) == count
    assert max(taken.values()) < 1.2 * min(taken.values())


def test_the_second_that_is_drawn_wins_where_it_has_less():
    engines = [engine(A, own=3), engine(B, own=1), engine(C, own=2)]
    assert Counter(pick_of_two(engines, turn).target for turn in range(300)).keys() == {B, C}


# Gimbal.


@pytest.mark.parametrize(
    ("engines", "session", "chosen"),
    [
        ([engine(A, kv_usage=0.3), engine(B, kv_usage=0.1)], A, (B, GimbalRule.KV)),
        ([engine(A, kv_usage=0.2), engine(B, kv_usage=0.1)], None, (A, GimbalRule.TURN)),
        # A full engine is no candidate, also where it was the user's.
        ([engine(A, kv_usage=0.9), engine(B, kv_usage=0.85)], A, (B, GimbalRule.TURN)),
        ([engine(A, kv_usage=0.95), engine(B, kv_usage=0.9)], B, (B, GimbalRule.USER)),
        ([engine(A, waiting_prefill_tokens=3001), engine(B)], A, (B, GimbalRule.LOAD)),
        ([engine(A, waiting_prefill_tokens=3000), engine(B)], A, (A, GimbalRule.USER)),
        ([engine(A), engine(B)], B, (B, GimbalRule.USER)),
        ([engine(A), engine(B)], C, (A, GimbalRule.TURN)),
        ([engine(A, kv_usage=0.5, observed_s=NOW_S - 3), engine(B)], None, (A, GimbalRule.TURN)),
    ],
)
def test_the_cascade_of_gimbal(engines, session, chosen):
    state, rule = pick_as_gimbal(engines, session, NOW_S, STALE_AFTER_S)
    assert (state.target, rule) == chosen


ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "own": st.integers(0, 3),
            "running": st.integers(0, 9),
            "waiting": st.integers(0, 9),
            "kv_usage": st.floats(0, 1),
            "waiting_prefill_tokens": st.integers(0, 9000),
            "observed_s": st.sampled_from([NOW_S, NOW_S - 3]),
        }
    ),
    min_size=1,
    max_size=4,
)


@given(ROWS, st.none() | st.sampled_from([A, B, C, D]))
def test_gimbal_never_takes_a_full_engine_where_another_is_not(rows, session):
    engines = [engine(target, **row) for target, row in zip((A, B, C, D), rows, strict=False)]
    state, rule = pick_as_gimbal(engines, session, NOW_S, STALE_AFTER_S)
    uses = [kv_usage(each, NOW_S, STALE_AFTER_S) for each in engines]
    assert state in engines
    assert kv_usage(state, NOW_S, STALE_AFTER_S) < 0.9 or min(uses) >= 0.9
    assert (rule is GimbalRule.USER) <= (state.target == session)
