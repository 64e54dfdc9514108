"""The regret bound: gains and costs since the beginning, the rollback, and the bound on the loss."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_scheduling.expert.decision import (
    ExpertCosts,
    ExpertHistory,
    ExpertLoad,
    ExpertSettings,
    Move,
    Placement,
    RegretBound,
    Stay,
    StayReason,
    add_steps,
    count_moves,
    initial_placement,
    plan_experts,
    score_placement,
)
from moe_scheduling.expert.regret_bound import plan_rollback

COSTS = ExpertCosts(token_s=1e-3, move_s=0.5, horizon_steps=1000)
HOT = ExpertLoad(tokens=[[[5.0, 5.0, 1.0, 1.0]]])
# The other two experts of the hot rank are hot: apart in START, together in SWAPPED.
TURNED = ExpertLoad(tokens=[[[5.0, 1.0, 5.0, 1.0]]])


def placed(*rows):
    return Placement(physical_to_logical=np.array(rows), ranks=2)


START, SWAPPED = placed([0, 1, 2, 3]), placed([0, 2, 1, 3])


def moved(history, seconds):
    return replace(history, regret=history.regret.add_moves(seconds))


def figures(regret):
    return regret.won_s, regret.paid_s, regret.duration_s


def test_the_regret_counts_what_placements_win_against_the_first_and_what_moves_cost():
    first = RegretBound(began=START).add_steps(HOT, START, COSTS, 1000)
    assert figures(first) == (0.0, 0.0, 10.0)
    there = first.add_moves(1.0).add_steps(HOT, SWAPPED, COSTS, 1000)
    assert figures(there) == (4.0, 1.0, 16.0)
    back = there.add_moves(1.0).add_steps(HOT, START, COSTS, 1000)
    assert figures(back) == (4.0, 2.0, 26.0)
    assert not back.budget_exhausted


def test_a_plan_that_is_not_carried_out_costs_nothing():
    history = None
    for _ in range(3):
        history = add_steps(history, HOT, START, COSTS, 1000)
        decision = plan_experts(HOT, START, COSTS, ExpertSettings(), history)
        assert isinstance(decision, Move)
        history = decision.history
    assert history.regret.paid_s == history.regret.won_s == 0.0


def test_a_group_of_other_slots_begins_anew():
    history = ExpertHistory(regret=RegretBound(began=START, won_s=-5.0, duration_s=1.0))
    other = placed([0, 1, 1, 2, 3, 3])
    regret = add_steps(history, HOT, other, COSTS, 1000).regret
    assert (regret.won_s, regret.began) == (0.0, other)


HALF = placed([0, 2, 1, 3], [0, 1, 2, 3])
WHOLE = placed([0, 2, 1, 3], [0, 2, 1, 3])
TWO_LAYERS = placed([0, 1, 2, 3], [0, 1, 2, 3])
HOT_TWICE = ExpertLoad(tokens=[[[5.0, 5.0, 1.0, 1.0]] * 2])


@pytest.mark.parametrize(
    ("stages", "won_s", "paid_s"),
    [
        pytest.param([(TWO_LAYERS, 1000)], 0.0, 0.0, id="nothing was carried out"),
        pytest.param([(WHOLE, 1000)], 8.0, 2.0, id="carried out"),
        pytest.param([(HALF, 1000)], 4.0, 1.0, id="half carried out"),
        pytest.param([(WHOLE, 250), (TWO_LAYERS, 750)], 2.0, 4.0, id="rolled back: what it had won"),
        pytest.param([(HALF, 250), (TWO_LAYERS, 750)], 1.0, 2.0, id="half carried out, rolled back"),
        pytest.param([(WHOLE, 250), (HALF, 750)], 2.0 + 3.0, 3.0, id="half rolled back"),
    ],
)
def test_each_placement_counts_for_the_steps_that_it_was_in_force(stages, won_s, paid_s):
    regret, before = RegretBound(began=TWO_LAYERS), TWO_LAYERS
    for placement, steps in stages:
        regret = regret.add_moves(float(count_moves(before, placement).sum()) * COSTS.move_s)
        regret, before = regret.add_steps(HOT_TWICE, placement, COSTS, steps), placement
    assert (regret.began, regret.won_s, regret.paid_s) == (TWO_LAYERS, pytest.approx(won_s), paid_s)


def test_what_a_placement_lost_before_it_was_rolled_back_counts():
    regret = RegretBound(began=START).add_steps(TURNED, SWAPPED, COSTS, 500).add_steps(TURNED, START, COSTS, 500)
    assert regret.won_s == pytest.approx(-2.0)


def test_the_regret_is_passed_on_to_the_next_decision():
    history = add_steps(None, HOT, START, COSTS, 1000)
    decision = plan_experts(HOT, START, COSTS, ExpertSettings(), history)
    assert isinstance(decision, Move)
    after = add_steps(moved(decision.history, decision.cost_s), HOT, decision.placement, COSTS, 1000).regret
    assert after.began is START
    assert after.won_s > 0.0
    assert after.paid_s == decision.cost_s


def test_what_has_lost_more_than_its_rollback_costs_is_rolled_back():
    """The load has turned: apart the hot experts were, together they are now."""
    history = ExpertHistory(regret=RegretBound(began=START, duration_s=100.0))
    history = add_steps(history, TURNED, SWAPPED, COSTS, 1000)
    decision = plan_experts(TURNED, SWAPPED, COSTS, ExpertSettings(), history)
    assert isinstance(decision, Move)
    assert (decision.placement.physical_to_logical == START.physical_to_logical).all()
    assert decision.reasons == ("moving has lost 4 s since the first decision: rollback to the placement of that time",)
    assert decision.gain_s == pytest.approx(4e-3)


def test_with_an_exhausted_budget_nothing_is_tried_until_time_has_passed():
    regret = RegretBound(began=START, won_s=-2.0, duration_s=110.0)
    decision = plan_experts(HOT, START, COSTS, ExpertSettings(), ExpertHistory(regret=regret))
    assert isinstance(decision, Stay)
    assert decision.reason is StayReason.UNSTABLE
    later = ExpertHistory(regret=replace(regret, duration_s=1010.0))
    assert isinstance(plan_experts(HOT, START, COSTS, ExpertSettings(), later), Move)


def test_what_costs_more_to_roll_back_than_it_lost_stays():
    regret = RegretBound(began=START, won_s=-0.9, duration_s=10.0)
    assert regret.budget_exhausted
    assert plan_rollback(regret, SWAPPED, 10, COSTS) is SWAPPED


def test_a_rollback_keeps_the_budget_and_goes_on_in_the_next_round():
    began, seen = placed([0, 1, 2, 3], [0, 1, 2, 3]), placed([0, 2, 1, 3], [0, 2, 1, 3])
    regret = RegretBound(began=began, won_s=-9.0, duration_s=10.0)
    half = plan_rollback(regret, seen, 3, COSTS)
    assert count_moves(seen, half).tolist() == [2, 0]
    assert count_moves(half, plan_rollback(regret, half, 3, COSTS)).tolist() == [0, 2]


def test_a_layer_that_exceeds_the_budget_keeps_no_other_from_its_rollback():
    began = placed([0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 4, 5, 6, 7])
    seen = placed([4, 5, 6, 7, 0, 1, 2, 3], [4, 1, 2, 3, 0, 5, 6, 7])
    regret = RegretBound(began=began, won_s=-99.0, duration_s=10.0)
    assert count_moves(seen, plan_rollback(regret, seen, 3, COSTS)).tolist() == [0, 2]


@given(st.integers(0, 2**32 - 1), st.sampled_from([2e-3, 0.05, 0.5, 2.0]))
@settings(max_examples=25, deadline=None)
def test_whatever_comes_little_is_lost_against_moving_nothing(seed, move_s):
    """Loads that know nothing of each other: a plan is right by chance alone."""
    generator = np.random.default_rng(seed)
    costs = ExpertCosts(token_s=2.2e-7, move_s=move_s)
    start = placement = initial_placement(layers=4, experts=16, redundant=2, ranks=2)
    weights, history, ours_s, still_s, rounds = np.arange(1, 17) ** -1.0, None, 0.0, 0.0, 40
    for _ in range(rounds):
        tokens = [[generator.permutation(weights) for _ in range(4)]]
        load = ExpertLoad(tokens=np.array(tokens) * 1e4)
        for name, where in (("ours", placement), ("still", start)):
            step_s = score_placement(load, where, costs)[0].total_s * costs.horizon_steps
            ours_s, still_s = (ours_s + step_s, still_s) if name == "ours" else (ours_s, still_s + step_s)
        history = add_steps(history, load, placement, costs, costs.horizon_steps)
        decision = plan_experts(load, placement, costs, ExpertSettings(), history)
        history = decision.history
        if isinstance(decision, Move):
            placement, ours_s = decision.placement, ours_s + decision.cost_s
            history = moved(history, decision.cost_s)
    # The regret bound, and on top one window's surprise and the way back.
    assert ours_s <= still_s * (1.005 + 1 / rounds)


@given(st.integers(0, 2**32 - 1), st.sampled_from([2e-3, 0.05, 0.5, 2.0]), st.sampled_from(["whole", "half", "any"]))
@settings(max_examples=40, deadline=None)
def test_whatever_is_rolled_back_or_ends_half_way_little_is_lost_against_moving_nothing(seed, move_s, ends):
    """As the controller does: what does not win under the load that comes is rolled back after half its steps."""
    generator = np.random.default_rng(seed)
    costs = ExpertCosts(token_s=2.2e-7, move_s=move_s)
    start = placement = initial_placement(layers=4, experts=16, redundant=2, ranks=2)
    weights, history, ours_s, still_s, rounds = np.arange(1, 17) ** -1.0, None, 0.0, 0.0, 40

    def step_s(load, where):
        return score_placement(load, where, costs)[0].total_s

    tried = None
    for _ in range(rounds):
        load = ExpertLoad(tokens=np.array([[generator.permutation(weights) for _ in range(4)]]) * 1e4)
        still_s += step_s(load, start) * costs.horizon_steps
        left = costs.horizon_steps
        if tried is not None:
            if step_s(load, tried) >= step_s(load, placement):
                left = costs.horizon_steps // 2
                ours_s += (step_s(load, tried) - step_s(load, placement)) * left
                back_s = count_moves(tried, placement).sum() * move_s
                ours_s += back_s
                history = moved(add_steps(history, load, tried, costs, left), back_s)
            else:
                placement = tried
        ours_s += step_s(load, placement) * costs.horizon_steps
        history = add_steps(history, load, placement, costs, left)
        decision = plan_experts(load, placement, costs, ExpertSettings(), history)
        history, tried = decision.history, None
        if isinstance(decision, Move):
            goes = generator.random(4) < 0.5 if ends == "half" or (ends == "any" and generator.random() < 0.5) else True
            table = np.where(
                np.broadcast_to(goes, 4)[:, None],
                decision.placement.physical_to_logical,
                placement.physical_to_logical,
            )
            tried = replace(placement, physical_to_logical=table, version=placement.version + 1)
            there_s = count_moves(placement, tried).sum() * move_s
            ours_s, history = ours_s + there_s, moved(history, there_s)
    assert history.regret.began is start, "no move is a new beginning"
    # The regret bound, and on top one window's surprise with the way there and back.
    assert ours_s <= still_s * (1.005 + 2 / rounds)
