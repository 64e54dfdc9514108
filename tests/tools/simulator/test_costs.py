"""Step times: lines, rooflines, and the experts' slowest rank."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_scheduling.expert.placement import Placement, initial_placement
from moe_tools.simulator.costs import IDLE, LinearCost, Work
from moe_tools.simulator.experts import PlacementPolicy, balance_of, draw_traffic, even_balance, place
from moe_tools.simulator.hardware import PRESETS

COUNT = st.integers(0, 5000)
WORK = st.builds(Work, COUNT, COUNT, st.integers(0, 10**6), st.integers(0, 10**7))
# Experts are spread over ranks that divide them.
WORKS = st.sampled_from([1, 2, 4]).flatmap(lambda ranks: st.lists(WORK, min_size=ranks, max_size=ranks))
PRESET = st.sampled_from(sorted(PRESETS))


def test_a_line_is_a_line_and_a_group_as_slow_as_its_slowest_rank():
    line = LinearCost(base_s=1.0, prefill_s=0.1, decode_s=0.01, context_s=0.001, pair_s=0.0001)
    assert line.group_step_s([Work(2, 3, 4, 5)]) == pytest.approx(1.0 + 0.2 + 0.03 + 0.004 + 0.0005)
    assert line.group_step_s([Work(10, 0, 0, 0), IDLE]) == pytest.approx(2.0)
    assert line.group_step_s([IDLE, IDLE]) == 1.0


@given(name=PRESET, works=WORKS, extra=WORK)
def test_more_work_never_takes_less_time(name, works, extra):
    cost = PRESETS[name].cost(len(works))
    more = [Work(*(a + b for a, b in zip(works[0], extra, strict=True))), *works[1:]]
    assert 0 < cost.group_step_s(works) <= cost.group_step_s(more) < math.inf


@given(name=PRESET, works=WORKS)
def test_the_order_of_the_ranks_does_not_matter(name, works):
    cost = PRESETS[name].cost(len(works))
    assert cost.group_step_s(works) == pytest.approx(cost.group_step_s(works[::-1]))


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_preset_fits_into_its_memory_and_says_that_it_is_modelled(name):
    preset = PRESETS[name]
    cost = preset.cost(preset.ranks)
    assert cost.kv_blocks(preset.ranks) * 16 > 32_768
    assert cost.source.startswith("modelled")


def test_the_model_of_deepseek_v3_comes_near_its_published_prefill():
    # SGLang, 2025-05-05: 52,300 input tokens a second and node of 8 GPUs, experts balanced, prompts of 2,000 tokens.
    preset = PRESETS["h100-deepseek-v3"]
    work = Work(prefill_tokens=16_384, prefill_pairs=16_384 * 1000)
    step_s = preset.cost(16, placement=PlacementPolicy.EVEN).group_step_s([work] * 16)
    assert 8 * 16_384 / step_s == pytest.approx(52_300, rel=0.1)


def test_uneven_experts_cost_time_and_even_ones_none():
    preset = PRESETS["h100-deepseek-v3"]
    works = [Work(prefill_tokens=2048)] * 16
    assert preset.cost(16).group_step_s(works) > 1.1 * preset.cost(16, placement=PlacementPolicy.EVEN).group_step_s(
        works
    )


def placed(*rows, ranks=2):
    return Placement(physical_to_logical=np.array(rows), ranks=ranks)


def test_a_placement_of_equal_ranks_is_balanced_and_a_skewed_one_is_not():
    shares = np.array([[0.4, 0.4, 0.1, 0.1]])
    together = balance_of(shares, placed([0, 1, 2, 3]))
    assert together.by_rank == pytest.approx((1.6, 0.4))
    assert together.slowest == pytest.approx(1.6)
    assert balance_of(shares, placed([0, 2, 1, 3])).slowest == pytest.approx(1.0)


def test_replicas_share_the_tokens_of_their_expert():
    balance = balance_of(np.array([[0.5, 0.3, 0.2]]), placed([0, 1, 0, 2]))
    assert balance.by_rank == pytest.approx((2 * 0.55, 2 * 0.45))


def test_an_expert_without_a_slot_is_refused():
    with pytest.raises(ValueError, match="expert 1 has no slot"):
        balance_of(np.full((1, 2), 0.5), placed([0, 0]))


@given(
    st.integers(1, 5), st.sampled_from([4, 8, 32]), st.floats(0, 2), st.integers(0, 1000), st.sampled_from([1, 2, 4])
)
def test_the_fullest_rank_has_at_least_the_mean_and_at_most_all(layers, experts, spread, seed, ranks):
    shares = draw_traffic(layers=layers, experts=experts, spread=spread, seed=seed)
    assert shares.sum(axis=1) == pytest.approx(np.ones(layers))
    balance = balance_of(shares, initial_placement(layers=layers, experts=experts, redundant=0, ranks=ranks))
    assert 1.0 - 1e-9 <= balance.worst <= balance.slowest + 1e-9 <= ranks + 1e-6
    assert sum(balance.by_rank) == pytest.approx(ranks)


def test_no_spread_is_even():
    shares = draw_traffic(layers=2, experts=8, spread=0.0, seed=1)
    placement = initial_placement(layers=2, experts=8, redundant=0, ranks=4)
    assert balance_of(shares, placement).by_rank == pytest.approx(even_balance(4).by_rank)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("redundant", [0, 8])
def test_the_products_decisions_and_vllms_balancer_both_balance(redundant):
    shares = draw_traffic(layers=4, experts=64, spread=0.8, seed=1)
    slowest = {
        policy: balance_of(shares, place(shares, policy, ranks=8, nodes=1, redundant=redundant)).slowest
        for policy in (PlacementPolicy.INITIAL, PlacementPolicy.PLANNED, PlacementPolicy.VLLM)
    }
    gap = slowest[PlacementPolicy.INITIAL] - 1.0
    assert slowest[PlacementPolicy.PLANNED] - 1.0 < 0.3 * gap
    assert slowest[PlacementPolicy.VLLM] - 1.0 < 0.3 * gap


def test_slots_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="must divide evenly by ranks"):
        PRESETS["h100-qwen3-30b-a3b"].cost(2, redundant=1)
