"""The step-time line that engines of the same make share, and the choice by it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_scheduling.alike import ALIKE, full_step_s, is_alike, share_line
from moe_scheduling.books import TargetBooks
from moe_scheduling.engine import EngineSettings, Job, choose_target
from moe_scheduling.signals import EngineSignal, StepTime, Target

STALE_AFTER_S = 2.0
A, B, C = Target("a"), Target("b"), Target("c")


def line(prefill_s, *, base_s=0.0, decode_s=0.0):
    return StepTime(base_s=base_s, prefill_s=prefill_s, decode_s=decode_s)


def engine(target, told, *, waiting_tokens=0, decoding=0):
    books = TargetBooks(target)
    signal = EngineSignal(waiting_prefill_tokens=waiting_tokens, decode_tokens=decoding, step_time=told)
    books.observe(signal, 0.0)
    return books


def shared(*engines):
    """What the owner does now and then."""
    found = share_line([books.line for books in engines if books.line is not None])
    for books in engines:
        books.share(found)
    return engines


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([], None),
        ([line(4e-5)], line(4e-5)),
        ([line(5e-4), line(4e-5), line(6e-5)], line(6e-5)),
        # Of an even number the faster of the two in the middle: one that is slow alone is not what all are like.
        ([line(6e-5), line(4e-5)], line(4e-5)),
        ([line(9e-5), line(6e-5), line(5e-5), line(4e-5)], line(5e-5)),
        # What is compared is a full step, not its parts.
        ([line(4e-5, base_s=0.001), line(3e-5, base_s=1.0), line(5e-5)], line(5e-5)),
        ([line(0.0), line(0.0, decode_s=1.0)], line(0.0)),
    ],
)
def test_the_shared_line_is_the_middle_one(lines, expected):
    assert share_line(lines) == expected


@pytest.mark.parametrize(
    ("one", "other", "alike"),
    [
        (line(1.0), line(ALIKE), True),
        (line(1.0), line(1.01 * ALIKE), False),
        (line(0.0), line(0.0), True),
        (line(0.0), line(1.0), False),
        # What is compared is a full step: a base is next to nothing in it.
        (line(4e-5, base_s=0.001), line(4e-5, base_s=0.02), True),
    ],
)
def test_engines_are_alike_whose_full_steps_are(one, other, alike):
    assert is_alike(one, other) is is_alike(other, one) is alike


def test_of_engines_that_are_alike_the_one_with_less_ahead_is_chosen_whatever_it_was_fitted_to():
    settings, job = EngineSettings(), Job(1000)
    # The first had long prompts, which cost more for each token; it has less to do now.
    engines = engine(A, line(9e-5), waiting_tokens=3000), engine(B, line(5e-5), waiting_tokens=4000)
    assert choose_target(job, engines, settings, turn=0, now_s=0.0).target == B
    assert choose_target(job, shared(*engines), settings, turn=0, now_s=0.0).target == A


def test_an_engine_that_is_slower_by_more_is_reckoned_by_its_own_line():
    slow, *others = shared(engine(A, line(1e-3)), engine(B, line(4e-5)), engine(C, line(6e-5)))
    assert slow.first_token_s(1000, line(1.0), 0.0, STALE_AFTER_S) == pytest.approx(1.0)
    assert [books.first_token_s(1000, line(1.0), 0.0, STALE_AFTER_S) for books in others] == pytest.approx([0.06] * 2)


def test_the_shared_line_outlives_the_signal_and_serves_an_engine_that_has_told_none():
    told, silent = shared(engine(A, line(5e-5)), TargetBooks(B))
    for books in (told, silent):
        assert books.first_token_s(1000, line(1.0), 100.0, STALE_AFTER_S) == pytest.approx(0.05)


def test_without_a_shared_line_the_own_is_back():
    _, books = shared(engine(A, line(4e-5)), engine(B, line(6e-5)))
    assert books.first_token_s(1000, line(1.0), 0.0, STALE_AFTER_S) == pytest.approx(0.04)
    books.share(None)
    assert books.first_token_s(1000, line(1.0), 0.0, STALE_AFTER_S) == pytest.approx(0.06)


def test_a_line_that_changed_since_counts_when_it_is_shared_again():
    engines = shared(engine(A, line(4e-5)), engine(B, line(4e-5)))
    engines[0].observe(EngineSignal(step_time=line(1e-3)), 1.0)
    assert engines[0].first_token_s(1000, line(1.0), 1.0, STALE_AFTER_S) == pytest.approx(0.04)
    shared(*engines)
    assert engines[0].first_token_s(1000, line(1.0), 1.0, STALE_AFTER_S) == pytest.approx(1.0)


PART = st.floats(0.0, 3600.0)
LINES = st.lists(st.builds(StepTime, base_s=PART, prefill_s=PART, decode_s=PART), min_size=1, max_size=9)


@given(LINES, st.randoms())
def test_the_shared_line_is_one_of_them_with_half_on_either_side_whatever_their_order(lines, random):
    step_s = full_step_s(share_line(lines))
    random.shuffle(lines)
    found = share_line(lines)
    assert found in lines
    assert full_step_s(found) == step_s
    assert sum(full_step_s(row) < step_s for row in lines) <= len(lines) / 2
    assert sum(full_step_s(row) > step_s for row in lines) <= len(lines) / 2


@given(LINES)
def test_a_fleet_is_reckoned_by_lines_that_its_engines_told(lines):
    engines = shared(*(engine(Target(f"e{number}"), told) for number, told in enumerate(lines)))
    middle, common = share_line([books.line for books in engines if books.line is not None]), line(1.0)
    for books in engines:
        own = books.line or middle or common
        used = own if middle is None or not is_alike(own, middle) else middle
        expected = used.base_s + 1000 * used.prefill_s
        assert books.first_token_s(1000, common, 0.0, STALE_AFTER_S) == pytest.approx(expected)
