"""Placement of experts: what holds for any load, placement, prices and history."""

import math
from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_scheduling.expert.decision import (
    ExpertCosts,
    ExpertHistory,
    ExpertLoad,
    ExpertSettings,
    Move,
    Placement,
    count_moves,
    plan_experts,
    score_placement,
)

PRICES = st.sampled_from([0.0, 1e-9, 1e-6, 1e-3, 1.0])
costs = st.builds(
    ExpertCosts,
    token_s=PRICES,
    expert_s=PRICES,
    remote_token_s=PRICES,
    internode_token_s=PRICES,
    move_s=PRICES,
    horizon_steps=st.integers(1, 5000),
)
choices = st.builds(ExpertSettings, move_budget=st.integers(0, 30), hysteresis=st.floats(0.0, 2.0))


@st.composite
def groups(draw):
    """A load and a placement that fit together."""
    nodes = draw(st.integers(1, 3))
    ranks = nodes * draw(st.integers(1, 4))
    places = draw(st.integers(1, 5))
    layers, slots = draw(st.integers(1, 3)), ranks * places
    experts = draw(st.integers(1, slots))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows = [
        np.concatenate([np.arange(experts), generator.integers(0, experts, slots - experts)]) for _ in range(layers)
    ]
    table = np.array([generator.permutation(row) for row in rows])
    sources = draw(st.sampled_from([count for count in range(1, ranks + 1) if ranks % count == 0]))
    shape = (sources, layers, experts)
    tokens = draw(st.sampled_from([1e-6, 1.0, 1e9])) * generator.pareto(draw(st.sampled_from([0.5, 1.5])), shape)
    tokens *= generator.random(shape) < draw(st.sampled_from([0.1, 0.9, 1.1]))
    return ExpertLoad(tokens=tokens), Placement(physical_to_logical=table, ranks=ranks, nodes=nodes)


@st.composite
def histories(draw, load):
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    earlier = ExpertLoad(tokens=load.tokens * generator.random(load.tokens.shape)) if draw(st.booleans()) else None
    return ExpertHistory(load=earlier, hit_rate=draw(st.floats(-1.0, 1.0)))


@given(groups(), costs, choices, st.data())
def test_each_expert_keeps_a_slot_and_no_rank_gets_one_more(group, costs, choices, data):
    load, placement = group
    decision = plan_experts(load, placement, costs, choices, data.draw(histories(load)))
    table = decision.candidate.physical_to_logical
    assert table.shape == placement.physical_to_logical.shape
    for row in table:
        assert set(row) == set(range(load.experts))


@given(groups(), costs, choices)
def test_the_figures_of_a_decision_are_those_of_its_placement(group, costs, choices):
    load, placement = group
    decision = plan_experts(load, placement, costs, choices)
    terms, balance = score_placement(load, decision.candidate, costs)
    assert decision.moves == count_moves(placement, decision.candidate).sum()
    assert decision.terms_after == terms
    assert decision.balance_after.mean == balance.mean
    assert decision.gain_s == max(decision.terms_before.total_s - terms.total_s, 0.0)
    assert 0.0 <= decision.stability <= 1.0


@given(groups(), costs, choices, st.data())
def test_nothing_moves_unless_it_pays(group, costs, choices, data):
    load, placement = group
    decision = plan_experts(load, placement, costs, choices, data.draw(histories(load)))
    if isinstance(decision, Move):
        won_s = decision.gain_s * decision.stability * costs.horizon_steps
        assert decision.gain_s > 0
        assert won_s >= (1 + choices.hysteresis) * decision.moves * costs.move_s
        assert decision.reasons


@given(groups(), costs, st.integers(1, 30))
def test_the_budget_is_kept(group, costs, budget):
    load, placement = group
    assert plan_experts(load, placement, costs, ExpertSettings(move_budget=budget)).moves <= budget


@given(groups(), costs, choices)
def test_what_stays_on_its_rank_stays_in_its_slot(group, costs, choices):
    load, placement = group
    decision = plan_experts(load, placement, costs, choices)
    shape = (placement.layers, placement.ranks, -1)
    old = placement.physical_to_logical.reshape(shape)
    new = decision.candidate.physical_to_logical.reshape(shape)
    for was, now in zip(old.reshape(-1, old.shape[2]), new.reshape(-1, new.shape[2]), strict=True):
        common = sum(min((was == expert).sum(), (now == expert).sum()) for expert in set(was))
        assert (was == now).sum() == common


@given(groups(), costs, choices, st.data())
def test_the_same_arguments_give_the_same_decision(group, costs, choices, data):
    load, placement = group
    history = data.draw(histories(load))
    first, second = (plan_experts(load, placement, costs, choices, history) for _ in range(2))
    assert type(first) is type(second)
    assert (first.candidate.physical_to_logical == second.candidate.physical_to_logical).all()
    assert (first.gain_s, first.history.hit_rate) == (second.gain_s, second.history.hit_rate)


@given(groups(), choices, st.sampled_from([2.0, 1024.0]))
def test_units_do_not_matter(group, choices, factor):
    load, placement = group
    prices = ExpertCosts(token_s=1e-3, remote_token_s=1e-4, internode_token_s=1e-3, move_s=1e-3)
    scaled = ExpertCosts(
        token_s=1e-3 * factor, remote_token_s=1e-4 * factor, internode_token_s=1e-3 * factor, move_s=1e-3 * factor
    )
    first, second = (plan_experts(load, placement, costs, choices) for costs in (prices, scaled))
    assert type(first) is type(second)
    assert (first.candidate.physical_to_logical == second.candidate.physical_to_logical).all()


@given(groups(), st.integers(2, 6))
@settings(max_examples=50)
def test_moving_on_under_the_same_load_comes_to_rest(group, rounds):
    load, placement = group
    prices = ExpertCosts(token_s=1e-3, remote_token_s=1e-3, internode_token_s=1e-3, move_s=1e-6)
    history, last_s = None, math.inf
    for _ in range(rounds):
        decision = plan_experts(load, placement, prices, ExpertSettings(), history)
        assert decision.terms_before.total_s <= last_s
        last_s, history = decision.terms_before.total_s, decision.history
        if isinstance(decision, Move):
            placement = replace(decision.placement)
