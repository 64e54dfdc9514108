"""What moving has come to since the beginning: the account, going back, and the bound on what is lost."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_scheduling.expert.decision import (
    Account,
    ExpertCosts,
    ExpertHistory,
    ExpertLoad,
    ExpertSettings,
    Move,
    Placement,
    Stay,
    StayReason,
    count_moves,
    initial_placement,
    plan_experts,
    score_placement,
)
from moe_scheduling.expert.regret_bound import Spell, book_spells, keep_account, plan_retreat

COSTS = ExpertCosts(token_s=1e-3, move_s=0.5, horizon_steps=1000)
HOT = ExpertLoad(tokens=[[[5.0, 5.0, 1.0, 1.0]]])


def placed(*rows):
    return Placement(physical_to_logical=np.array(rows), ranks=2)


START, SWAPPED = placed([0, 1, 2, 3]), placed([0, 2, 1, 3])


def keep(account, placement, load=HOT):
    return keep_account(account, load, placement, score_placement(load, placement, COSTS)[0].total_s, COSTS)


def test_the_account_counts_what_placements_win_against_the_first_and_what_moves_cost():
    first = keep(None, START)
    assert (first.won_s, first.paid_s, first.lived_s) == (0.0, 0.0, 10.0)
    moved = keep(replace(first, decided=SWAPPED), SWAPPED)
    assert (moved.won_s, moved.paid_s, moved.lived_s) == (4.0, 1.0, 16.0)
    back = keep(replace(moved, decided=START), START)
    assert (back.won_s, back.paid_s, back.lived_s) == (4.0, 2.0, 26.0)
    assert not back.in_the_red


def test_a_plan_that_is_not_carried_out_costs_nothing():
    history = None
    for _ in range(3):
        decision = plan_experts(HOT, START, COSTS, ExpertSettings(), history)
        assert isinstance(decision, Move)
        history = decision.history
    assert history.account.paid_s == 0.0


def test_a_group_of_other_slots_begins_anew():
    account = Account(began=START, seen=START, won_s=-5.0, lived_s=1.0)
    assert keep(account, placed([0, 1, 1, 2, 3, 3])).won_s == 0.0


def test_a_placement_that_a_person_chose_is_a_new_beginning():
    first = keep(None, START)
    assert keep(replace(first, won_s=-5.0, decided=START), SWAPPED).began is SWAPPED
    assert keep(replace(first, won_s=-5.0), SWAPPED).won_s == 0.0


HALF = placed([0, 2, 1, 3], [0, 1, 2, 3])
WHOLE = placed([0, 2, 1, 3], [0, 2, 1, 3])
TWO_LAYERS = placed([0, 1, 2, 3], [0, 1, 2, 3])
HOT_TWICE = ExpertLoad(tokens=[[[5.0, 5.0, 1.0, 1.0]] * 2])


@pytest.mark.parametrize(
    ("spells", "placement", "won_s", "paid_s"),
    [
        pytest.param([], TWO_LAYERS, 0.0, 0.0, id="nothing was carried out"),
        pytest.param([(WHOLE, 900)], WHOLE, 8.0, 2.0, id="carried out: its window books what it won"),
        pytest.param([(HALF, 900)], HALF, 4.0, 1.0, id="half carried out"),
        pytest.param([(WHOLE, 250), (TWO_LAYERS, 650)], TWO_LAYERS, 2.0, 4.0, id="taken back: what it had won"),
        pytest.param([(HALF, 250), (TWO_LAYERS, 650)], TWO_LAYERS, 1.0, 2.0, id="half carried out, taken back"),
        pytest.param([(WHOLE, 250), (HALF, 650)], HALF, 4.0 + 1.0, 3.0, id="half taken back"),
    ],
)
def test_what_came_between_two_decisions_is_booked(spells, placement, won_s, paid_s):
    first = replace(keep(None, TWO_LAYERS, HOT_TWICE), decided=WHOLE)
    made = [Spell(placement=where, steps=steps) for where, steps in spells]
    after = keep(book_spells(first, made, HOT_TWICE, placement, COSTS), placement, HOT_TWICE)
    assert (after.began, after.won_s, after.paid_s) == (TWO_LAYERS, pytest.approx(won_s), paid_s)


def test_what_a_placement_lost_before_it_was_taken_back_is_booked():
    turned = ExpertLoad(tokens=[[[5.0, 1.0, 5.0, 1.0]]])
    spells = [Spell(placement=SWAPPED, steps=500), Spell(placement=START, steps=500)]
    after = book_spells(keep(None, START), spells, turned, START, COSTS)
    assert (after.won_s, after.paid_s) == (pytest.approx(-2.0), 2.0)


def test_what_a_person_placed_after_a_spell_is_a_new_beginning_too():
    other = placed([3, 1, 2, 0])
    booked = book_spells(keep(None, START), [Spell(placement=SWAPPED, steps=10)], HOT, other, COSTS)
    assert keep(booked, other).began is other


def test_what_was_decided_is_told_to_the_next_decision():
    decision = plan_experts(HOT, START, COSTS, ExpertSettings())
    assert isinstance(decision, Move)
    after = plan_experts(HOT, decision.placement, COSTS, ExpertSettings(), decision.history)
    assert after.history.account.began is START
    assert after.history.account.won_s > 0.0


def lost(**figures):
    return ExpertHistory(account=Account(began=START, seen=SWAPPED, **figures))


def test_what_has_lost_more_than_going_back_costs_is_taken_back():
    """The load is the other way round now: apart the hot ones were, together they are."""
    load = ExpertLoad(tokens=[[[5.0, 1.0, 5.0, 1.0]]])
    decision = plan_experts(load, SWAPPED, COSTS, ExpertSettings(), lost(lived_s=100.0))
    assert isinstance(decision, Move)
    assert (decision.placement.physical_to_logical == START.physical_to_logical).all()
    assert decision.reasons == ("moving has lost 4 s since the first decision: back to where the experts lay then",)
    assert decision.gain_s == pytest.approx(4e-3)


def test_in_the_red_nothing_is_tried_until_time_has_passed():
    history = ExpertHistory(account=Account(began=START, seen=START, won_s=-2.0, lived_s=100.0))
    decision = plan_experts(HOT, START, COSTS, ExpertSettings(), history)
    assert isinstance(decision, Stay)
    assert decision.reason is StayReason.UNSTABLE
    later = ExpertHistory(account=replace(history.account, lived_s=1000.0))
    assert isinstance(plan_experts(HOT, START, COSTS, ExpertSettings(), later), Move)


def test_what_costs_more_to_take_back_than_it_lost_stays():
    account = Account(began=START, seen=SWAPPED, won_s=-0.9, lived_s=10.0)
    assert account.in_the_red
    assert plan_retreat(account, 10, COSTS) is SWAPPED


def test_going_back_keeps_the_budget_and_goes_on_in_the_next_round():
    began, seen = placed([0, 1, 2, 3], [0, 1, 2, 3]), placed([0, 2, 1, 3], [0, 2, 1, 3])
    account = Account(began=began, seen=seen, won_s=-9.0, lived_s=10.0)
    half = plan_retreat(account, 3, COSTS)
    assert count_moves(seen, half).tolist() == [2, 0]
    assert count_moves(half, plan_retreat(replace(account, seen=half), 3, COSTS)).tolist() == [0, 2]


def test_a_layer_that_exceeds_the_budget_keeps_no_other_from_going_back():
    began = placed([0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 4, 5, 6, 7])
    seen = placed([4, 5, 6, 7, 0, 1, 2, 3], [4, 1, 2, 3, 0, 5, 6, 7])
    account = Account(began=began, seen=seen, won_s=-99.0, lived_s=10.0)
    assert count_moves(seen, plan_retreat(account, 3, COSTS)).tolist() == [0, 2]


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
        decision = plan_experts(load, placement, costs, ExpertSettings(), history)
        history = decision.history
        if isinstance(decision, Move):
            placement, ours_s = decision.placement, ours_s + decision.cost_s
    # What may be lost, and one window's surprise and the way back on top of it.
    assert ours_s <= still_s * (1.005 + 1 / rounds)


@given(st.integers(0, 2**32 - 1), st.sampled_from([2e-3, 0.05, 0.5, 2.0]), st.sampled_from(["whole", "half", "any"]))
@settings(max_examples=40, deadline=None)
def test_whatever_is_taken_back_or_ends_half_way_little_is_lost_against_moving_nothing(seed, move_s, ends):
    """As the controller does: what does not win under the load that comes is taken back after half of it."""
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
        spells = []
        if tried is not None:
            spells = [Spell(placement=tried, steps=costs.horizon_steps)]
            if step_s(load, tried) >= step_s(load, placement):
                half = costs.horizon_steps // 2
                ours_s += (step_s(load, tried) - step_s(load, placement)) * half
                ours_s += count_moves(tried, placement).sum() * move_s
                spells = [Spell(placement=tried, steps=half), Spell(placement=placement, steps=half)]
            placement = spells[-1].placement
        ours_s += step_s(load, placement) * costs.horizon_steps
        if history is not None:
            history = replace(history, account=book_spells(history.account, spells, load, placement, costs))
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
            ours_s += count_moves(placement, tried).sum() * move_s
    assert history.account.began is start, "nothing of it is a new beginning"
    # What may be lost, and one window's surprise with the way there and back on top of it.
    assert ours_s <= still_s * (1.005 + 2 / rounds)
