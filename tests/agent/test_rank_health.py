"""Which rank keeps its group from going on: a table, and invariants on random groups."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_agent.supervisor.rank_health import SILENT_S, SLOWEST_STEPS, ProcessLife, RankSight, StepPace, judge_ranks
from moe_contract.agent_state import RankTrouble

NOW_S = 1000.0
ENDED, SUSPENDED, BEHIND, SILENT = RankTrouble


def busy(age_s: float, **more: object) -> RankSight:
    """A rank with requests whose last step was this long ago."""
    return RankSight(idle=False, written_s=NOW_S - age_s, **more)


def at(turn: int, since_s: float, sight: RankSight | None = None) -> RankSight:
    """A rank that has been in a turn for this long."""
    return replace(sight or RankSight(), turn=turn, entered_s=NOW_S - since_s)


@pytest.mark.parametrize(
    ("ranks", "troubles"),
    [
        ([], {}),
        ([RankSight()], {}),
        ([busy(2.9)], {}),
        ([busy(3.1)], {0: SILENT}),
        ([busy(3.1), busy(0.1)], {0: SILENT}),
        ([busy(3.1, warm=False)], {}),
        # Three times its slowest step more.
        ([busy(5.9, slowest_step_s=1.0)], {}),
        ([busy(6.1, slowest_step_s=1.0)], {0: SILENT}),
        # Of any rank: they step together.
        ([busy(5.9), RankSight(slowest_step_s=1.0)], {}),
        # The process speaks at once, and for a rank that is idle too; those that wait for it are not named.
        ([busy(9.0), RankSight(life=ProcessLife.SUSPENDED)], {1: SUSPENDED}),
        ([busy(9.0), RankSight(life=ProcessLife.ENDED)], {1: ENDED}),
        ([busy(0.0, life=ProcessLife.ENDED, warm=False)], {0: ENDED}),
        # The one that has not begun the step of the others, though it has no request, and they have.
        ([at(7, 3.1, busy(3.1)), at(6, 3.1)], {1: BEHIND}),
        ([at(7, 2.9, busy(2.9)), at(6, 2.9)], {}),
        ([at(7, 3.1, busy(3.1)), at(6, 3.1), at(5, 9.0), at(7, 0.1)], {1: BEHIND, 2: BEHIND}),
        # All are in the same one: the rank that has requests is named.
        ([at(7, 9.0, busy(9.0)), at(7, 9.0)], {0: SILENT}),
        # All are idle, after the same step, or one after a step more: it had a request to clear when its group stopped.
        ([at(7, 900.0), at(7, 900.0)], {}),
        ([at(8, 900.0), at(7, 900.0)], {}),
        # The next request has come to one of them, whose core has not begun the step yet.
        ([at(8, 900.0), at(7, 900.0, busy(0.1))], {}),
        # A rank without turns is judged by its steps alone.
        ([at(7, 9.0, busy(9.0)), RankSight()], {0: SILENT}),
    ],
)
def test_the_rank_that_the_others_wait_for_is_named(ranks, troubles):
    assert judge_ranks(dict(enumerate(ranks)), NOW_S) == troubles


sights = st.builds(
    RankSight,
    life=st.sampled_from(ProcessLife),
    idle=st.booleans(),
    warm=st.booleans(),
    written_s=st.floats(NOW_S - 20.0, NOW_S),
    turn=st.none() | st.integers(0, 3),
    entered_s=st.floats(NOW_S - 20.0, NOW_S),
    slowest_step_s=st.floats(0.0, 3.0),
)


@given(st.lists(sights, max_size=6))
def test_a_trouble_has_its_cause(ranks):
    found = judge_ranks(dict(enumerate(ranks)), NOW_S)
    turns = [sight.turn for sight in ranks if sight.turn is not None]
    for rank, trouble in found.items():
        sight = ranks[rank]
        match trouble:
            case RankTrouble.ENDED:
                assert sight.life is ProcessLife.ENDED
            case RankTrouble.SUSPENDED:
                assert sight.life is ProcessLife.SUSPENDED
            case RankTrouble.BEHIND:
                assert sight.turn < max(turns)
            case RankTrouble.SILENT:
                assert not sight.idle
                assert sight.written_s < NOW_S - SILENT_S
    if any(sight.life is not ProcessLife.RUNS for sight in ranks):
        assert found.keys() == {rank for rank, sight in enumerate(ranks) if sight.life is not ProcessLife.RUNS}


@given(st.lists(sights, min_size=1, max_size=6))
def test_with_time_a_busy_group_that_stands_still_is_always_noticed(ranks):
    far_s = NOW_S + SILENT_S + SLOWEST_STEPS * max(sight.slowest_step_s for sight in ranks) + 0.1
    if any(sight.warm and not sight.idle for sight in ranks):
        assert judge_ranks(dict(enumerate(ranks)), far_s)


def test_the_slowest_step_is_that_of_a_busy_rank_and_is_forgotten():
    pace = StepPace()
    for step, written_s, idle in ((1, 10.0, False), (3, 12.0, True), (4, 90.0, False), (5, 90.5, False)):
        pace = pace.observe(step, written_s, idle=idle)
    assert 0.8 < pace.slowest_s < 1.0, "two steps in two seconds; the pause of 78 s was none"
    assert pace.observe(5, 400.0, idle=False).slowest_s == pace.slowest_s, "no step, no time of one"
    for turn in range(10):
        pace = pace.observe(10_000 * (turn + 1), 100.0 + 300.0 * (turn + 1), idle=False)
    assert pace.slowest_s < 0.04
