"""The time of a layer by the distinct experts that its tokens meet, idle slots, and decisions on them."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_scheduling.expert.candidates import search_candidates
from moe_scheduling.expert.cost import load_of_ranks, seconds_of_layers
from moe_scheduling.expert.decision import (
    ExpertCosts,
    ExpertLoad,
    ExpertSettings,
    Move,
    Placement,
    RegretBound,
    StepSizes,
    count_moves,
    initial_placement,
    plan_experts,
    score_placement,
)
from moe_scheduling.expert.idle_slots import drop_copies, fill_idle, park_idle, serving_copies, serving_slots
from moe_scheduling.expert.placement import count_charged, count_copies
from moe_scheduling.expert.regret_bound import plan_rollback

# Reading an expert takes as long as computing 400 of its tokens.
KERNEL = ExpertCosts(token_s=1e-8, expert_s=4e-6)
SETTINGS = ExpertSettings()


def placed(*rows, ranks=2):
    return Placement(physical_to_logical=np.array(rows), ranks=ranks)


def seconds(tokens, placement, costs=KERNEL, sizes=None):
    return score_placement(ExpertLoad(tokens=[[tokens]], sizes=sizes), placement, costs)[0].load_s


@pytest.mark.parametrize(
    ("tokens", "expected_s", "why"),
    [
        ([0.0, 0.0, 0.0, 0.0], 0.0, "nothing to do"),
        ([9.0, 9.0, 9.0, 9.0], 8.18e-6, "both experts of each rank are read"),
        ([90.0, 0.0, 0.0, 0.0], 4.9e-6, "one expert is read, however skewed the load"),
        ([0.001, 0.0, 0.0, 0.0], 4.01e-9, "seldom read"),
        ([4000.0, 4000.0, 0.0, 0.0], 8.8e-5, "8,000 tokens, and two experts"),
    ],
)
def test_a_rank_reads_its_experts_and_computes_their_tokens(tokens, expected_s, why):
    assert seconds(tokens, placed([0, 1, 2, 3])) == pytest.approx(expected_s, rel=1e-3, abs=1e-15), why


def test_a_copy_of_a_hot_expert_costs_in_small_steps_and_saves_in_large_ones():
    shared, alone = placed([0, 1, 2, 0, 3, 3]), placed([0, 1, 1, 2, 3, 3])
    assert seconds([40, 20, 20, 20], shared) > 1.3 * seconds([40, 20, 20, 20], alone) > 0
    assert seconds([60e3, 5e3, 5e3, 10e3], shared) < 0.7 * seconds([60e3, 5e3, 5e3, 10e3], alone)


def test_the_sizes_of_steps_are_counted_apart():
    """The mean of few large and many small steps would be read like neither."""
    sizes = StepSizes(tokens=(1.0, 1000.0), parts=(0.9, 0.1))
    mean = 0.9 * 1.0 + 0.1 * 1000.0
    tokens = np.array([50.0, 50.0, 50.0, 50.0])
    by_size = [seconds(tokens * size / mean, placed([0, 1, 2, 3])) for size in (1.0, 1000.0)]
    together = seconds(tokens, placed([0, 1, 2, 3]), sizes=sizes)
    assert together == pytest.approx(0.9 * by_size[0] + 0.1 * by_size[1])


@pytest.mark.parametrize(
    ("tokens", "parts", "message"),
    [
        ((), (), "at least one"),
        ((1.0,), (0.5, 0.5), "as many parts"),
        ((0.0,), (1.0,), "positive and finite"),
        ((float("inf"),), (1.0,), "positive and finite"),
        ((1.0, 2.0), (0.5, 0.4), "add up to 1"),
    ],
)
def test_impossible_sizes_are_refused(tokens, parts, message):
    with pytest.raises(ValueError, match=message):
        StepSizes(tokens=tokens, parts=parts)


# --- idle slots


@pytest.mark.parametrize(
    ("row", "serving"),
    [
        ([0, 1, 2, 3], [1, 1, 1, 1]),
        ([0, 0, 1, 2], [1, 0, 1, 1]),
        ([0, 1, 1, 0], [1, 1, 1, 1]),
        ([2, 2, 1, 0, 0, 0], [1, 0, 1, 1, 0, 0]),
    ],
)
def test_a_second_slot_on_a_rank_is_idle(row, serving):
    assert serving_slots(np.array([row]), 2).astype(int).tolist() == [serving]


def test_an_idle_slot_takes_no_tokens_from_the_other_ranks():
    load = ExpertLoad(tokens=[[[8.0, 4.0]]])
    assert load_of_ranks(load, placed([0, 0, 0, 1])).tolist() == [[4.0, 8.0]]


@st.composite
def tables(draw):
    """Placements with copies anywhere, on the same rank too, and a load."""
    ranks, places, layers = draw(st.integers(1, 6)), draw(st.integers(1, 5)), draw(st.integers(1, 3))
    slots = ranks * places
    experts = draw(st.integers(1, slots))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows = [
        np.concatenate([np.arange(experts), generator.integers(0, experts, slots - experts)]) for _ in range(layers)
    ]
    table = np.array([generator.permutation(row) for row in rows])
    return table, generator.random((layers, experts)) * draw(st.sampled_from([0.0, 1.0, 1e4])), ranks


@given(tables())
def test_parking_idle_slots_and_filling_them_again_moves_nothing(given_table):
    table, work, ranks = given_table
    parked = park_idle(table, work.shape[1], ranks)
    assert (fill_idle(parked, table, work, ranks) == table).all()
    copies = count_copies(parked, parked.max() + 1)
    assert (copies[:, : work.shape[1]] == serving_copies(table, work.shape[1], ranks)).all()
    assert copies[:, work.shape[1] :].max(initial=0) <= 1


@given(tables())
def test_without_copies_each_expert_has_one_slot_and_nothing_moved(given_table):
    table, work, ranks = given_table
    experts = work.shape[1]
    dropped = drop_copies(table, work, experts, ranks)
    assert (count_copies(dropped, int(dropped.max()) + 1)[:, :experts] == 1).all()
    filled = fill_idle(dropped, table, work, ranks)
    assert (count_copies(filled, experts) >= 1).all()
    before, after = (Placement(physical_to_logical=rows, ranks=ranks) for rows in (table, filled))
    assert not count_moves(before, after).any()


# --- decisions


def test_rounding_makes_no_traffic_negative():
    tokens = [
        [[5.03420920e-07, 5.90712701e-06, 3.39085788e-07]],
        [[2.54967635e-07, 0.0, 3.74449161e-08]],
        [[1.71529430e-07, 1.46150728e-06, 6.27491752e-07]],
    ]
    generator, costs = np.random.default_rng(0), ExpertCosts(token_s=0.0, internode_token_s=1.0)
    for scale in generator.random(200):
        load = ExpertLoad(tokens=np.array(tokens) * scale)
        assert score_placement(load, placed([2, 1, 0], ranks=3), costs)[0].traffic_s >= 0.0


def test_layers_are_timed_alike_with_and_without_the_time_to_read_an_expert():
    load, placement = decode([[[30.0, 10.0, 10.0, 10.0]]]), placed([0, 1, 2, 3])
    assert seconds_of_layers(load, placement, ExpertCosts(token_s=1e-8)).tolist() == pytest.approx([40e-8])
    assert seconds_of_layers(load, placement, KERNEL).tolist() == pytest.approx([8e-6 + 40e-8], rel=1e-3)


def decode(tokens, requests=32.0):
    return ExpertLoad(tokens=np.asarray(tokens), sizes=StepSizes(tokens=(requests,), parts=(1.0,)))


def real_like(layers, experts, requests, seed=0):
    """Six experts a token; the hottest has more tokens than an eighth of all, so that eight ranks need a copy."""
    generator = np.random.default_rng(seed)
    parts = np.array([generator.permutation(np.arange(2, experts + 2) ** -1.3) for _ in range(layers)])
    return (parts / parts.sum(1, keepdims=True) * 6 * requests)[None]


@pytest.mark.parametrize("requests", [32, 64, 128, 256])
def test_a_decode_group_leaves_its_copies_idle_and_a_prefill_group_uses_them(requests):
    start = initial_placement(layers=6, experts=64, redundant=16, ranks=8)
    small = plan_experts(decode(real_like(6, 64, requests)), start, KERNEL, SETTINGS)
    assert isinstance(small, Move)
    assert serving_copies(small.candidate.physical_to_logical, 64, 8).max() == 1
    assert small.terms_after.load_s < 0.85 * small.terms_before.load_s
    large = plan_experts(decode(real_like(6, 64, 200 * requests)), start, KERNEL, SETTINGS)
    assert serving_copies(large.candidate.physical_to_logical, 64, 8).max() > 1
    assert large.terms_after.load_s < 1.05 * large.terms_after.balanced_s


def test_where_all_experts_are_read_anyway_nothing_moves():
    start = initial_placement(layers=4, experts=64, redundant=0, ranks=8)
    decision = plan_experts(decode(real_like(4, 64, 1000)), start, replace(KERNEL, token_s=1e-12), SETTINGS)
    assert not isinstance(decision, Move)


def test_leaving_a_copy_idle_is_no_move_and_costs_as_much_as_one():
    """Ranks with as many experts each: only the copy's tokens go elsewhere, but the layer has to change."""
    placement, costs = placed([0, 1, 2, 2, 3, 0]), replace(KERNEL, move_s=1e-3)
    decision = plan_experts(decode([[[50.0, 50.0, 50.0, 50.0]]]), placement, costs, SETTINGS)
    assert isinstance(decision, Move)
    assert decision.moves == 0
    assert decision.cost_s == pytest.approx(1e-3)
    assert decision.gain_s == pytest.approx(4e-6, rel=1e-3)
    dear = plan_experts(decode([[[50.0, 50.0, 50.0, 50.0]]]), placement, replace(costs, move_s=0.02), SETTINGS)
    assert not isinstance(dear, Move)


def test_a_layer_whose_idle_slots_gain_less_than_they_cost_stays():
    placement, costs = placed([0, 1, 2, 2, 3, 0], [0, 1, 2, 2, 3, 0]), replace(KERNEL, move_s=1e-3)
    load = decode([[[50.0, 50.0, 50.0, 50.0], [0.001, 0.001, 0.001, 0.001]]])
    decision = plan_experts(load, placement, costs, SETTINGS)
    assert isinstance(decision, Move)
    assert decision.cost_s == pytest.approx(1e-3)
    changed = (decision.candidate.physical_to_logical != placement.physical_to_logical).any(1)
    assert changed.tolist() == [True, False]


def test_what_idle_slots_lose_is_in_the_regret_bound():
    began, now = placed([0, 1, 2, 2, 3, 3]), placed([0, 1, 0, 2, 3, 3])
    assert count_charged(began, now).tolist() == [1]
    assert not count_moves(began, now).any()
    large = ExpertLoad(tokens=[[[0.0, 0.0, 90e3, 10e3]]])
    lost = RegretBound(began=began).add_steps(large, now, KERNEL, 1000)
    assert lost.won_s == pytest.approx(-(100e3 - 55e3) * KERNEL.token_s * 1000, rel=0.02)
    assert plan_rollback(lost, now, 10, replace(KERNEL, move_s=0.1)) is not now
    assert plan_rollback(lost, now, 10, replace(KERNEL, move_s=1.0)) is now, "it would cost more"


def test_a_group_that_changes_from_decode_to_prefill_uses_its_copies_again():
    start = initial_placement(layers=4, experts=64, redundant=16, ranks=8)
    idle = plan_experts(decode(real_like(4, 64, 64)), start, KERNEL, SETTINGS).candidate
    again = plan_experts(decode(real_like(4, 64, 8192)), idle, KERNEL, SETTINGS)
    assert serving_copies(again.candidate.physical_to_logical, 64, 8).max() > 1
    assert again.terms_after.load_s < 1.05 * again.terms_after.balanced_s


def test_without_the_time_to_read_an_expert_there_is_one_candidate():
    load, start = decode(real_like(2, 64, 64)), initial_placement(layers=2, experts=64, redundant=16, ranks=8)
    assert len(list(search_candidates(load, start, ExpertCosts(token_s=1e-8), SETTINGS))) == 1
    assert len(list(search_candidates(load, start, KERNEL, SETTINGS))) == 4


def test_each_layer_takes_the_candidate_that_is_best_for_it():
    """One layer has an expert that is hotter than a rank's share, which needs its copies in large steps; the other is
    even, and its copies are only read for nothing."""
    hot = np.full(16, 100.0)
    hot[0] = 20_000.0
    load = ExpertLoad(tokens=np.stack([hot, np.full(16, 100.0)])[None])
    start = initial_placement(layers=2, experts=16, redundant=8, ranks=8)
    decision = plan_experts(load, start, KERNEL, SETTINGS)
    copies = serving_copies(decision.candidate.physical_to_logical, 16, 8)
    assert copies[0].max() > 1
    assert copies[1].max() == 1


@pytest.mark.parametrize("seed", range(4))
def test_where_the_best_of_all_layers_exceed_the_budget_it_is_kept_and_used(seed):
    generator = np.random.default_rng(seed)
    sizes = StepSizes(tokens=(8.0, 2048.0), parts=(0.9, 0.1))
    load = ExpertLoad(tokens=generator.pareto(1.0, (1, 6, 24)) * 300.0, sizes=sizes)
    start = initial_placement(layers=6, experts=24, redundant=8, ranks=4)
    gains = []
    for budget in (1, 2, 3, 4, 6, 8, 12, 1000):
        decision = plan_experts(load, start, KERNEL, ExpertSettings(move_budget=budget))
        assert decision.moves <= budget
        gains.append(decision.gain_s)
    assert 0.0 < gains[0] < gains[-1] == max(gains)


@pytest.mark.parametrize("redundant", [0, 8])
def test_small_steps_do_not_keep_large_ones_among_them_uneven(redundant):
    """Even in sum is not even in each: a rank with many tokens can have the experts that small steps seldom read."""
    generator = np.random.default_rng(2)
    parts = np.array([generator.permutation(np.arange(1, 65) ** -0.5) for _ in range(8)])
    tokens, costs = 6 * parts / parts.sum(1, keepdims=True), replace(KERNEL, token_s=1.6e-8)
    sizes = StepSizes(tokens=(64.0, 2048.0), parts=(7 / 8, 1 / 8))
    mixed = ExpertLoad(tokens=tokens[None] * (64 * 7 + 2048) / 8, sizes=sizes)
    placement = initial_placement(layers=8, experts=64, redundant=redundant, ranks=8)
    for _ in range(6):
        placement = plan_experts(mixed, placement, costs, SETTINGS).candidate
    for requests, ratio in ((64, 1.01), (2048, 1.03)):
        terms = score_placement(decode(tokens[None] * requests), placement, costs)[0]
        assert terms.load_s < ratio * terms.balanced_s


@given(tables(), st.sampled_from([0.1, 3.0, 3000.0]), st.floats(0.0, 1e-5), st.data())
def test_a_decision_is_never_slower_than_what_it_leaves(given_table, scale, move_s, data):
    table, work, ranks = given_table
    part = data.draw(st.floats(0.01, 0.99))
    sizes = StepSizes(tokens=(8.0, 2048.0), parts=(part, 1 - part))
    load = ExpertLoad(tokens=work[None] * scale, sizes=sizes)
    placement = Placement(physical_to_logical=table, ranks=ranks)
    budget = data.draw(st.integers(0, 12))
    decision = plan_experts(load, placement, replace(KERNEL, move_s=move_s), ExpertSettings(move_budget=budget))
    before, after = (score_placement(load, place, KERNEL)[0] for place in (placement, decision.candidate))
    assert after.load_s <= before.load_s
    assert (count_copies(decision.candidate.physical_to_logical, work.shape[1]) >= 1).all()
    assert decision.moves == count_moves(placement, decision.candidate).sum()
    assert not budget or decision.moves <= budget
