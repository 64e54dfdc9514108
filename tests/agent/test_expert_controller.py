"""The state machine on an expert group's first rank, without vLLM: decide, move, measure, roll back, directives."""

from itertools import cycle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_agent.experts.bookkeeping import DecisionOutcome, ProblemKind
from moe_agent.experts.controller import GATHER_PASSES, MAX_SYNC_PASSES, MAX_SYNC_S, MIN_SYNC_PASSES
from moe_agent.experts.directive import DirectiveAction
from moe_agent.experts.planning import PlanRequest
from moe_agent.experts.sync_round import RoundAction
from moe_contract.routes import TAKE_TIMEOUT_S
from moe_scheduling.expert.decision import ExpertMode
from moe_scheduling.expert.placement import count_copies

from tests.agent.fake_expert_group import BETTER, COSTS, HOT, MOVES, SHAPE, START, Group, answer


def test_off_records_nothing_gathers_nothing_and_decides_nothing():
    group = Group(mode=ExpertMode.OFF)
    group.run(500)
    assert {(content.action, content.recording) for content in group.rounds} == {(RoundAction.NONE, False)}
    assert (group.planner.asked, list(group.controller.bookkeeping.rows), group.kinds()) == ([], [], set())


def test_observe_shows_the_load_and_decides_nothing():
    group = Group(mode=ExpertMode.OBSERVE)
    group.run(500)
    assert group.controller.window.tokens_a_step()[0, 0].tolist() == pytest.approx(HOT.tolist())
    assert group.controller.balance.mean == pytest.approx(1.0 + 0.1, abs=0.5)
    assert group.planner.asked == []


def test_the_dry_run_decides_at_each_interval_and_moves_nothing():
    group = Group(mode=ExpertMode.DRY_RUN)
    group.planner.answer = answer()
    group.run(700)
    assert 7 <= len(group.controller.bookkeeping.rows) <= 11
    assert {row.outcome for row in group.controller.bookkeeping.rows} == {DecisionOutcome.DRY_RUN}
    assert not any(content.action is RoundAction.MOVE for content in group.rounds)
    assert (group.held == START).all()
    assert group.newest.placement is not None
    assert all(row.placement is None for row in list(group.controller.bookkeeping.rows)[1:])
    assert (group.newest.cost_s, group.newest.predicted_gain_s) == (0.01, 0.001)


def test_a_question_carries_the_load_the_placement_and_the_horizon():
    group = Group()
    group.run(100)
    request = group.planner.asked[0]
    assert request.tokens[1, 2].tolist() == pytest.approx(HOT.tolist())
    assert (request.placement == START).all()
    assert request.horizon_steps == 64


def test_slow_steps_shorten_the_pause_between_rounds():
    """The agent answers a change of the settings with 504 when the group has not taken it in time."""
    group = Group(interval_steps=4096)
    passes = {}
    for step_s in (0.01, 0.1, 0.2, 30.0, 0.01):
        group.step_s = step_s
        group.run(3 * MAX_SYNC_PASSES)
        passes[step_s] = group.rounds[-1].next_in
    assert passes == {0.01: MAX_SYNC_PASSES, 0.1: 20, 0.2: 10, 30.0: MIN_SYNC_PASSES}
    assert 2 * MAX_SYNC_S < TAKE_TIMEOUT_S


def test_active_moves_what_pays_and_keeps_what_won():
    group = Group()
    group.planner.answer = answer()
    group.run_until(DecisionOutcome.MOVED)
    group.step_s = 0.008
    group.planner.answer = answer(BETTER, pays=False)
    group.run(60)
    assert (group.held == BETTER).all()
    moved = group.controller.bookkeeping.rows[-1]
    assert moved.measured_gain_s == pytest.approx(0.002)
    assert moved.moves == MOVES == group.controller.bookkeeping.totals.moves
    group.run(200)
    assert group.controller.bookkeeping.totals.won_s > 0.2
    assert group.controller.bookkeeping.totals.lost_s == pytest.approx(moved.cost_s)
    assert (group.kinds(), group.controller.version) == (set(), 2)


def test_a_move_that_won_nothing_is_rolled_back_and_the_pause_doubles_each_time():
    group = Group()
    group.planner.answer = answer()
    pauses, last = [], 0
    for _ in range(3):
        group.run_until(DecisionOutcome.MOVED)
        group.step_s = 0.012
        group.run_until(DecisionOutcome.ROLLED_BACK)
        group.step_s = 0.010
        group.run(5)
        assert (group.held == START).all()
        assert "nothing won" in group.newest.reason
        pauses.append(group.step - last)
        last = group.step
    assert pauses[0] < 0.75 * pauses[1] < 0.75 * pauses[2] * 0.75 * 1.34
    assert ProblemKind.BACKOFF in group.kinds()
    group.run_until(DecisionOutcome.MOVED)
    group.step_s = 0.008
    group.planner.answer = answer(pays=False)
    group.run(60)
    assert group.kinds() == set(), "what wins ends the back-off"


def test_a_move_within_the_noise_is_measured_for_longer_and_then_rolled_back_as_not_shown():
    group = Group()
    group.planner.answer = answer()
    noise = cycle([0.0, 0.004, 0.001, 0.003])
    steps = {}
    for loss_s in (0.004, 0.0001):
        group.controller.bookkeeping.move_gained()
        group.run_until_noisy(DecisionOutcome.MOVED, lambda: 0.010 + next(noise))
        moved_at = group.step
        group.run_until_noisy(DecisionOutcome.ROLLED_BACK, lambda loss_s=loss_s: 0.010 + loss_s + next(noise))
        steps[loss_s] = group.step - moved_at
    assert steps[0.0001] > 2 * steps[0.004]
    assert "no gain shown" in group.newest.reason


@pytest.mark.parametrize("mode", [ExpertMode.OBSERVE, ExpertMode.DRY_RUN])
def test_nothing_is_rolled_back_once_a_user_has_left_active(mode):
    group = Group()
    group.planner.answer = answer()
    group.run_until(DecisionOutcome.MOVED)
    while group.controller.bookkeeping.trial is None:
        group.run(1)
    group.step_s = 0.02
    group.put(mode=mode)
    group.planner.answer = answer(pays=False)
    group.run(200)
    assert (group.held == BETTER).all()
    assert group.controller.bookkeeping.rows[-1].measured_gain_s == pytest.approx(-0.01, rel=0.1)


def test_only_the_steps_just_before_a_move_are_compared():
    """What the machine did long before is no gain of the move."""
    group = Group(interval_steps=400, window_steps=32)
    group.planner.answer = answer(pays=False)
    group.step_s = 0.030
    group.run(300)
    group.step_s = 0.010
    group.planner.answer = answer()
    group.run_until(DecisionOutcome.MOVED)
    group.step_s = 0.009
    group.run(100)
    assert group.controller.bookkeeping.rows[-1].measured_gain_s == pytest.approx(0.001)


def test_a_directive_is_dealt_with_when_its_move_has_ended():
    group = Group(mode=ExpertMode.OBSERVE, max_stall_s=0.0001)
    group.run(10)
    group.direct(DirectiveAction.APPLY, BETTER)
    seen = []
    while group.controller.pending.settled == 0:
        group.run(1)
        seen.append(group.controller.version)
        assert len(seen) < 100
    assert (group.held == BETTER).all()
    assert group.controller.version == 2
    assert seen[0] == 1


@pytest.mark.parametrize("action", [DirectiveAction.PLAN, DirectiveAction.ROLLBACK])
def test_a_directive_that_comes_to_nothing_is_dealt_with_too(action):
    group = Group(mode=ExpertMode.OBSERVE)
    group.direct(action)
    group.run(40)
    assert group.controller.pending.settled == 1


def test_a_move_that_cannot_be_measured_stays_and_says_so():
    group = Group()
    group.planner.answer = answer()
    group.run_until(DecisionOutcome.MOVED)
    number = group.newest.number
    group.planner.answer = answer(pays=False)
    while group.controller.bookkeeping.trial is None:
        group.run(1)
    group.controller.step_took = lambda *_: None  # type: ignore[method-assign]
    group.run(60)
    (moved,) = (row for row in group.controller.bookkeeping.rows if row.number == number)
    assert moved.measured_gain_s is None
    assert moved.reason.endswith("not measured: no steps of the same load before and after")
    assert (group.held == BETTER).all()


@pytest.mark.parametrize(("max_stall_s", "layers_a_step"), [(1.0, [3]), (0.005, [2, 1]), (0.0001, [1, 1, 1])])
def test_a_move_is_cut_into_steps_by_the_bound_on_one(max_stall_s, layers_a_step):
    group = Group(max_stall_s=max_stall_s)
    group.planner.answer = answer()
    group.move_s = 0.00001
    group.run_until(DecisionOutcome.MOVED)
    group.run(20)
    moves = [content for content in group.rounds if content.action is RoundAction.MOVE]
    assert [content.layers for content in moves] == layers_a_step
    assert [content.next_in for content in moves] == [1] * len(moves)
    assert [content.version for content in moves] == [1] * (len(moves) - 1) + [2]


def test_a_round_that_only_changes_idle_slots_says_nothing_about_moves():
    idle = START.copy()
    idle[:, 5] = 0
    group = Group(mode=ExpertMode.OBSERVE)
    group.move_s = 5.0
    group.direct(DirectiveAction.APPLY, idle)
    group.run(100)
    assert (group.held == idle).all()
    assert group.controller.bookkeeping.totals.moves == 0
    assert group.controller.costs.move_s == COSTS.move_s


def test_the_time_of_a_round_is_divided_by_what_the_gate_counts():
    """Of two layers that change at once one moves two experts, the other one changes an idle slot."""
    target = START.copy()
    target[0], target[1, 5] = BETTER[0], 0
    group = Group(mode=ExpertMode.OBSERVE, max_stall_s=1.0)
    group.move_s = 0.3
    group.direct(DirectiveAction.APPLY, target)
    group.run(100)
    assert group.controller.bookkeeping.totals.moves == 2
    assert group.controller.costs.move_s == pytest.approx(0.5 * (COSTS.move_s + 0.3 / 3))


def test_a_move_longer_than_its_bound_is_reported_until_one_is_within_it():
    group = Group(max_stall_s=0.02)
    group.planner.answer = answer()
    group.move_s = 0.5
    group.run_until(DecisionOutcome.MOVED)
    group.run(20)
    assert ProblemKind.SLOW_MOVE in group.kinds()
    assert group.controller.costs.move_s > 10 * COSTS.move_s, "the next one is cut finer"
    group.move_s = 0.001
    group.direct(DirectiveAction.ROLLBACK)
    group.run(20)
    assert ProblemKind.SLOW_MOVE not in group.kinds()


def test_a_mode_switched_off_amid_a_move_lets_it_end_and_measures_nothing():
    group = Group(max_stall_s=0.0001)
    group.planner.answer = answer()
    group.run_until(DecisionOutcome.MOVED)
    group.put(mode=ExpertMode.OFF)
    group.run(50)
    assert (group.held == BETTER).all()
    assert group.newest.measured_gain_s is None
    assert not group.recording
    assert group.controller.window.steps == 0.0


def test_a_rank_that_cannot_take_part_ends_the_move_and_nothing_hangs():
    group = Group()
    group.planner.answer = answer()
    group.ok = False
    group.run_until(DecisionOutcome.FAILED)
    assert (group.held == START).all()
    assert group.newest.reason.endswith("a rank could not take part, and nothing more was moved")
    assert ProblemKind.BACKOFF in group.kinds()
    group.ok = True
    group.run_until(DecisionOutcome.MOVED)


def test_ranks_with_another_placement_are_reported_and_stop_all_decisions():
    group = Group()
    group.planner.answer = answer()
    group.stray = 1
    group.run(500)
    assert group.kinds() >= {ProblemKind.VERSION_SKEW}
    assert "ranks 1 hold" in dict(group.controller.problems())[ProblemKind.VERSION_SKEW]
    assert group.planner.asked == []


@pytest.mark.parametrize("mode", [ExpertMode.OBSERVE, ExpertMode.DRY_RUN, ExpertMode.ACTIVE])
@pytest.mark.parametrize("known", [True, False], ids=["known", "found at the gather"])
@pytest.mark.parametrize("action", [DirectiveAction.APPLY, DirectiveAction.PLAN, DirectiveAction.ROLLBACK])
def test_a_directive_to_ranks_with_different_placements_ends_with_the_reason(action, known, mode):
    group = Group(mode=mode, interval_steps=10**6)
    group.direct(DirectiveAction.APPLY, BETTER)
    group.run(200)
    group.stray = 1
    until_gathered = GATHER_PASSES + 3 * MAX_SYNC_PASSES
    group.run(until_gathered * known)
    group.direct(action, START if action is DirectiveAction.APPLY else None)
    group.run(until_gathered)
    assert group.controller.pending.settled == 2
    assert ProblemKind.VERSION_SKEW in group.kinds()
    if known or action is DirectiveAction.PLAN:
        assert group.newest.outcome is DecisionOutcome.FAILED
        assert group.newest.reason == (
            "directive 2 cannot be followed: ranks 1 hold another placement than 2; only a restart of the engine helps"
        )
        assert (group.held == BETTER).all()
    assert group.planner.asked == []


def test_what_was_decided_before_ranks_parted_is_not_carried_out():
    group = Group()
    group.planner.answer, group.planner.late = answer(), 10
    while not group.planner.asked:
        group.run(1)
    group.stray = 1
    group.run(300)
    assert (group.newest.outcome, group.newest.reason) == (
        DecisionOutcome.FAILED,
        "ranks 1 hold another placement than 1",
    )
    assert (group.held == START).all()


def test_nothing_is_rolled_back_while_ranks_hold_different_placements():
    group = Group()
    group.planner.answer = answer()
    group.run_until(DecisionOutcome.MOVED)
    group.step_s = 0.02
    group.run(10)
    group.controller.bookkeeping.skew = "ranks 1 hold another placement than 2"
    group.stray = 1
    group.run(200)
    assert (group.held == BETTER).all()
    group.stray = None
    group.planner.answer = answer(pays=False)
    group.run(70)
    assert (group.held == START).all(), "a move on trial is judged once the ranks agree again"


def next_request(group: Group, after: int) -> PlanRequest:
    """The request after the first `after`."""
    while len(group.planner.asked) <= after:
        group.run(1)
    return group.planner.asked[after]


def test_what_was_carried_out_and_rolled_back_is_accounted_with_its_moves_and_its_time():
    group = Group()
    # Expert 2 is on the first rank alone at the start, and on the second with BETTER.
    group.tokens = np.array([0, 0, 9, 1])
    group.planner.answer = answer()
    group.run_until(DecisionOutcome.MOVED)
    group.step_s = 0.02
    group.run_until(DecisionOutcome.ROLLED_BACK)
    moved, rolled_back = group.controller.bookkeeping.rows[1], group.newest
    group.planner.answer = answer(pays=False)
    regret = next_request(group, len(group.planner.asked)).regret
    assert (regret.began.physical_to_logical == START).all()
    assert regret.paid_s == pytest.approx(moved.cost_s + rolled_back.cost_s)
    assert moved.cost_s > 0.0
    assert regret.won_s != 0.0, "of the steps between the move and its rollback"
    assert regret.duration_s > 0.0


def test_a_move_that_ended_half_way_is_accounted():
    group = Group(max_stall_s=0.0001)
    group.planner.answer = answer()
    group.run_until(DecisionOutcome.MOVED)
    while not (group.held == BETTER).all(axis=1).any():
        group.run(1)
    group.ok = False
    group.run_until(DecisionOutcome.FAILED)
    failed = group.newest
    request = next_request(group, len(group.planner.asked))
    assert request.placement.tolist() not in (START.tolist(), BETTER.tolist())
    assert (request.regret.began.physical_to_logical == START).all()
    assert request.regret.paid_s == pytest.approx(failed.cost_s)
    assert failed.cost_s > 0.0


def test_what_a_person_placed_is_a_new_beginning():
    group = Group()
    group.planner.answer = answer()
    group.run_until(DecisionOutcome.MOVED)
    group.planner.answer = answer(pays=False)
    group.run(5)
    asked = len(group.planner.asked)
    group.direct(DirectiveAction.ROLLBACK)
    assert next_request(group, asked).regret is None


def test_steps_are_accounted_again_when_the_decision_failed():
    group = Group()
    group.planner.answer = answer()
    group.run_until(DecisionOutcome.MOVED)
    group.step_s = 0.008
    group.planner.answer = ValueError("no such load")
    group.run_until(DecisionOutcome.FAILED)
    failed = group.planner.asked[-1]
    group.planner.answer = answer(pays=False)
    again = next_request(group, len(group.planner.asked))
    assert again.regret is failed.regret
    assert again.accounted_steps == failed.accounted_steps + again.step - failed.step


def test_the_steps_of_a_decision_are_accounted_once():
    group = Group(mode=ExpertMode.DRY_RUN)
    first, second, third = (next_request(group, number) for number in range(3))
    assert (second.accounted_steps, third.accounted_steps) == (second.step - first.step, third.step - second.step)
    assert third.regret.duration_s > second.regret.duration_s > 0.0


def test_a_planner_that_never_answers_is_reported():
    group = Group()
    group.planner.late = 10**9
    group.run(64 * 4 + 2 * MIN_SYNC_PASSES)
    assert group.kinds() == {ProblemKind.NO_DECISION}


def test_a_planner_that_fails_is_a_failed_decision_and_is_asked_again():
    group = Group()
    group.planner.answer = ValueError("no such load")
    group.run(200)
    assert {row.outcome for row in group.controller.bookkeeping.rows} == {DecisionOutcome.FAILED}
    assert group.newest.reason == "the decision failed: no such load"
    assert len(group.planner.asked) >= 2


def test_an_answer_about_a_placement_that_is_no_more_is_not_followed():
    group = Group()
    group.planner.answer, group.planner.late = answer(), 3
    while not group.planner.asked:
        group.run(1)
    other = np.tile(np.array([3, 1, 2, 0, 0, 1]), (SHAPE.layers, 1))
    group.direct(DirectiveAction.APPLY, other)
    group.run(60)
    assert (group.held == other).all()
    assert DecisionOutcome.FAILED in {row.outcome for row in group.controller.bookkeeping.rows}


EVENTS = st.lists(
    st.tuples(
        st.integers(1, 60),
        st.sampled_from(["mode", "apply", "rollback", "plan", "answer", "refuse", "slow", "stall"]),
        st.integers(0, 2**16),
    ),
    max_size=25,
)


@given(events=EVENTS)
def test_whatever_happens_ranks_hold_what_is_believed_and_each_expert_has_a_slot(events):
    group = Group(interval_steps=32, window_steps=16)
    for steps, what, seed in events:
        dice = np.random.default_rng(seed)
        placement = np.array([dice.permutation([0, 1, 2, 3, *dice.integers(0, 4, 2)]) for _ in range(SHAPE.layers)])
        match what:
            case "mode":
                group.put(mode=list(ExpertMode)[seed % 4])
            case "apply":
                group.direct(DirectiveAction.APPLY, placement)
            case "rollback":
                group.direct(DirectiveAction.ROLLBACK)
            case "plan":
                group.direct(DirectiveAction.PLAN)
            case "answer":
                group.planner.answer = answer(placement)
            case "refuse":
                group.ok = bool(seed % 2)
            case "slow":
                group.step_s = 0.001 * (1 + seed % 20)
            case "stall":
                group.put(max_stall_s=0.0001 * (1 + seed % 100))
        group.run(steps)
        assert (group.held == group.controller.placement).all()
        assert (count_copies(group.held, SHAPE.experts) >= 1).all()
        assert all(0.0 < pressure < 3.0 for pressure in group.controller.balance.by_rank)
        assert group.controller.bookkeeping.totals.moves >= 0
