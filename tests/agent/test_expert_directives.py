"""What a person asks of an expert group, while decisions go on: apply, plan, roll back, and refusals with a reason."""

import pytest
from moe_agent.experts.bookkeeping import DecisionOutcome
from moe_agent.experts.controller import MAX_SYNC_PASSES
from moe_agent.experts.directive import DirectiveAction
from moe_agent.experts.sync_round import RoundAction
from moe_scheduling.expert.decision import ExpertMode

from tests.agent.fake_expert_group import BETTER, START, Group, answer


@pytest.mark.parametrize("mode", [ExpertMode.OBSERVE, ExpertMode.DRY_RUN, ExpertMode.ACTIVE])
def test_a_person_applies_a_placement_and_takes_it_back(mode):
    group = Group(mode=mode, interval_steps=10**6)
    group.direct(DirectiveAction.APPLY, BETTER)
    group.run(40)
    assert (group.held == BETTER).all()
    assert group.newest.outcome is DecisionOutcome.APPLIED
    assert group.newest.reason.startswith("asked for by directive 1")
    group.direct(DirectiveAction.ROLLBACK)
    group.run(40)
    assert (group.held == START).all()
    assert (group.newest.outcome, group.controller.version) == (DecisionOutcome.ROLLED_BACK, 3)


def test_what_a_user_applied_is_measured_and_not_rolled_back():
    group = Group(mode=ExpertMode.OBSERVE, interval_steps=100)
    group.run(30)
    group.direct(DirectiveAction.APPLY, BETTER)
    group.run(5)
    group.step_s = 0.02
    group.run(100)
    assert group.controller.bookkeeping.rows[-1].measured_gain_s == pytest.approx(-0.01, rel=0.1)
    assert (group.held == BETTER).all()


def test_a_rollback_without_a_move_is_refused():
    group = Group(mode=ExpertMode.OBSERVE)
    group.direct(DirectiveAction.ROLLBACK)
    group.run(20)
    assert (group.newest.outcome, group.newest.reason) == (DecisionOutcome.FAILED, "there is no move to roll back")


@pytest.mark.parametrize(
    ("mode", "outcome"),
    [
        (ExpertMode.OBSERVE, DecisionOutcome.DRY_RUN),
        (ExpertMode.DRY_RUN, DecisionOutcome.DRY_RUN),
        (ExpertMode.ACTIVE, DecisionOutcome.MOVED),
    ],
)
def test_a_person_has_a_decision_made_now(mode, outcome):
    group = Group(mode=mode, interval_steps=10**6)
    group.planner.answer = answer()
    group.run(20)
    group.direct(DirectiveAction.PLAN)
    group.run(3 * MAX_SYNC_PASSES)
    assert group.controller.bookkeeping.rows[-1].outcome is outcome


@pytest.mark.parametrize("action", [DirectiveAction.APPLY, DirectiveAction.PLAN, DirectiveAction.ROLLBACK])
def test_a_directive_in_the_mode_off_is_refused_and_not_kept_for_later(action):
    group = Group(mode=ExpertMode.OFF, interval_steps=10**6)
    group.direct(action, BETTER if action is DirectiveAction.APPLY else None)
    group.run(20)
    group.put(mode=ExpertMode.OBSERVE)
    group.run(100)
    assert [row.outcome for row in group.controller.bookkeeping.rows] == [DecisionOutcome.FAILED]
    assert group.newest.reason == "directive 1 came in the mode off"
    assert (group.held == START).all()
    assert group.planner.asked == []


@pytest.mark.parametrize("action", [DirectiveAction.APPLY, DirectiveAction.PLAN])
def test_a_directive_that_waits_when_the_mode_becomes_off_ends_with_the_reason(action):
    group = Group(max_stall_s=0.0001)
    group.planner.answer = answer()
    group.run_until(DecisionOutcome.MOVED)
    group.direct(action, START if action is DirectiveAction.APPLY else None)
    group.put(mode=ExpertMode.OFF)
    group.run(60)
    assert group.controller.pending.settled == 1
    assert group.newest.outcome is DecisionOutcome.FAILED
    assert group.newest.reason == "directive 1 cannot be followed: the mode is off"
    assert (group.held == BETTER).all(), "what was under way is carried to its end"


def test_a_directive_that_cannot_be_read_ends_with_the_reason_and_leaves_the_one_before_it():
    group = Group(max_stall_s=0.0001)
    group.planner.answer = answer()
    group.run_until(DecisionOutcome.MOVED)
    group.direct(DirectiveAction.APPLY, START)
    group.controller.refuse(2, "no directive can be read")
    assert group.newest.reason == "directive 2 cannot be followed: no directive can be read"
    group.run(1)
    assert group.controller.pending.settled == 0
    while group.controller.pending.settled == 0:
        group.run(1)
        assert group.step < 500
    assert (group.controller.pending.settled, group.held.tolist()) == (2, START.tolist())


def test_the_same_placement_again_is_no_move():
    group = Group(mode=ExpertMode.OBSERVE)
    group.direct(DirectiveAction.APPLY, START)
    group.run(40)
    assert (group.newest.moves, group.controller.version) == (0, 1)
    assert not any(content.action is RoundAction.MOVE for content in group.rounds)
