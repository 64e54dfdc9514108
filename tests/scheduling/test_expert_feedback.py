"""What engines say of their experts in the choice of the engine: what changed since their step-time line was fitted."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_scheduling.engine.choice import EngineSettings, Job, choose_target
from moe_scheduling.engine.target_state import TargetState
from moe_scheduling.engine.ttft_model import (
    EXPERT_PART,
    LINE_MEMORY_STEPS,
    TtftModel,
    build_ttft_model,
    build_unsignalled_ttft_model,
)
from moe_scheduling.signals import EngineSignal, StepTime, Target

A, B = Target("a"), Target("b")
NOW_S = 100.0
LINE = StepTime(base_s=1 / 64, prefill_s=1 / 1024, decode_s=1 / 512)
STALE_S = 2.0


def told(target: Target, *signals: tuple[int, float], step_time: StepTime | None = LINE) -> TargetState:
    """Books after signals of (step, balance)."""
    books = TargetState(target)
    for step, balance in signals:
        books.observe(EngineSignal(step=step, expert_balance=balance, step_time=step_time), NOW_S)
    return books


def pace(books: TargetState) -> TtftModel:
    return books.pace(LINE, NOW_S, STALE_S)


def slower(books: TargetState) -> float:
    """How much slower a prompt's tokens are than the line has it."""
    return pace(books).token_s / LINE.prefill_s


def test_an_imbalance_that_lasts_is_in_the_line_and_not_counted_again() -> None:
    even, uneven = told(A, (1, 1.0), (900, 1.0)), told(B, (1, 1.6), (900, 1.6))
    assert pace(even) == pace(uneven)
    chosen = {
        choose_target(Job(100), [even, uneven], EngineSettings(), turn=turn, now_s=NOW_S).target for turn in (0, 1)
    }
    assert chosen == {A, B}


def test_an_imbalance_that_is_new_sends_requests_elsewhere_and_one_that_is_gone_back() -> None:
    grown, gone = told(A, (1000, 1.0), (1010, 1.6)), told(B, (1000, 1.6), (1010, 1.0))
    assert slower(grown) > 1.0 > slower(gone)
    for turn in (0, 1):
        assert choose_target(Job(100), [grown, gone], EngineSettings(), turn=turn, now_s=NOW_S).target == B


def test_what_changed_counts_by_the_experts_part_of_a_step() -> None:
    assert build_ttft_model(LINE, EngineSignal(decode_tokens=4, expert_balance=3.0), 2.0) == TtftModel(
        pytest.approx((1 + EXPERT_PART / 2) / 1024), pytest.approx((1 + EXPERT_PART / 2) * (1 / 64 + 4 / 512)), 0.0
    )
    at_once = slower(told(A, (1000, 1.0), (1000, 2.0)))
    assert at_once == pytest.approx(1 + EXPERT_PART), "no step was made since, so the line knows nothing of it"


def test_the_line_learns_of_it_as_fast_as_it_forgets() -> None:
    after = told(A, (1000, 1.0), (1000 + int(LINE_MEMORY_STEPS), 2.0))
    fitted = 2.0 - math.exp(-1)
    assert slower(after) == pytest.approx(1 + EXPERT_PART * (2.0 / fitted - 1))
    assert slower(told(A, (1000, 1.0), (10**9, 2.0))) == 1.0


def test_an_engine_that_was_just_heard_of_or_has_restarted_is_as_its_line_says() -> None:
    assert slower(told(A, (1000, 1.6))) == 1.0
    assert slower(told(A, (1000, 1.0), (3, 1.6))) == 1.0


def test_the_rank_of_a_group_that_has_the_hot_experts_gets_as_much_as_the_others() -> None:
    paces = set()
    for pressure in (0.4, 1.0, 1.6):
        books = TargetState(A)
        books.observe(EngineSignal(step=1, expert_balance=1.6, expert_pressure=pressure, step_time=LINE), NOW_S)
        paces.add(pace(books))
    assert len(paces) == 1


def test_what_is_not_believed_any_more_says_nothing_of_experts_either() -> None:
    books = told(A, (1000, 1.0), (1010, 2.0))
    assert books.pace(LINE, NOW_S + 10, STALE_S) == build_unsignalled_ttft_model(LINE, 0)


HISTORY = st.lists(st.tuples(st.integers(0, 10**6), st.floats(1, 64)), min_size=1, max_size=20)


@given(HISTORY)
def test_whatever_the_balance_does_a_pace_stays_a_pace(history: list[tuple[int, float]]) -> None:
    most = max(balance for _, balance in history)
    assert 1 - EXPERT_PART <= slower(told(A, *history)) <= 1 + EXPERT_PART * (most - 1) + 1e-9


@given(HISTORY, st.floats(1, 64), st.floats(1, 64))
def test_a_greater_balance_never_looks_faster(history: list[tuple[int, float]], one: float, other: float) -> None:
    step = history[-1][0] + 10
    less, more = sorted((one, other))
    assert slower(told(A, *history, (step, less))) <= slower(told(A, *history, (step, more))) + 1e-12
