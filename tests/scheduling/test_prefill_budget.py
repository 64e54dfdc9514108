"""Prompt tokens of the next step of a lockstep group: the whole backlog, or the part that ends at a roofline knee."""

import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from moe_scheduling.request.prefill_budget import (
    LEAST_CHUNK_TOKENS,
    RankLoad,
    RooflineKnee,
    StepTimeCurve,
    plan_prefill_tokens,
)

IDLE = RankLoad()
DECODING = RankLoad(decoding=10)


@pytest.mark.parametrize(
    ("case", "ranks", "tokens"),
    [
        ("no ranks", [], 0),
        ("nothing to prefill", [DECODING, DECODING], 0),
        ("a rank alone", [RankLoad(1000, decoding=50)], 1000),
        ("nobody decodes elsewhere", [RankLoad(1000, decoding=50), IDLE], 1000),
        ("backlogs of one size", [RankLoad(1000, decoding=5), RankLoad(1000, decoding=5)], 1000),
        ("the larger of two backlogs", [RankLoad(1000, decoding=5), RankLoad(600, decoding=5)], 1000),
        ("the others decode", [RankLoad(1000, decoding=5), DECODING], 1000),
    ],
)
@pytest.mark.parametrize("curve", [None, StepTimeCurve(token_s=0.0001, decode_only_s=0.1, knees=())])
def test_without_a_knee_nothing_is_cut(case, ranks, tokens, curve):
    assert plan_prefill_tokens(ranks, curve) == tokens, case


# From 1,000 tokens of all ranks on, each token takes twice as long.
CURVE = StepTimeCurve(token_s=0.0001, decode_only_s=0.1, knees=(RooflineKnee(1000, 0.0001),))


@pytest.mark.parametrize(
    ("case", "ranks", "tokens"),
    [
        ("few wait: cut at the knee", [RankLoad(4000, decoding=100, prefilling=1)], 900),
        ("many wait: large steps share out the floor", [RankLoad(4000, decoding=100, prefilling=100)], 4000),
        ("nobody decodes", [RankLoad(4000, prefilling=1)], 4000),
        ("all is before the knee", [RankLoad(800, decoding=100, prefilling=1)], 800),
        ("more decode than the knee has tokens", [RankLoad(4000, decoding=1000, prefilling=1)], 4000),
        ("ranks share the knee", [RankLoad(4000, decoding=50, prefilling=1)] * 2, 450),
        ("one leaves the other its part", [RankLoad(100, 50, 1), RankLoad(4000, 50, 1)], 800),
        ("nothing to prefill", [RankLoad(decoding=100)], 0),
    ],
)
def test_a_backlog_is_cut_at_the_knee(case, ranks, tokens):
    assert plan_prefill_tokens(ranks, CURVE) == tokens, case
    assert plan_prefill_tokens(ranks, None) >= tokens, case


loads = st.builds(RankLoad, st.integers(0, 100_000), st.integers(0, 4096), st.integers(0, 4096))
groups = st.lists(loads, max_size=16)
knees = st.lists(
    st.builds(RooflineKnee, st.integers(1, 10_000), st.floats(1e-9, 1)), max_size=4, unique_by=lambda knee: knee[0]
)
curves = st.builds(StepTimeCurve, st.floats(0, 1), st.floats(0, 1), knees.map(sorted).map(tuple))


@given(groups, st.none() | curves.map(lambda curve: curve._replace(knees=())))
def test_what_is_planned_without_a_knee_is_some_ranks_backlog(ranks, curve):
    tokens = plan_prefill_tokens(ranks, curve)
    assert tokens == 0 or tokens in {rank.prefill_tokens for rank in ranks}


@given(groups, st.none() | curves, st.randoms(use_true_random=False))
def test_every_rank_makes_the_same_plan(ranks, curve, shuffler):
    mixed = list(ranks)
    shuffler.shuffle(mixed)
    assert plan_prefill_tokens(mixed, curve) == plan_prefill_tokens(ranks, curve)


@given(groups, curves)
def test_what_is_cut_is_never_cut_to_nothing_and_never_more_than_without(ranks, curve):
    cut = plan_prefill_tokens(ranks, curve)
    whole = plan_prefill_tokens(ranks, None)
    assert min(1, whole) <= cut <= whole


# Each token costs the same whatever the step: the plan must not depend on rounding.
@example(
    [RankLoad(62), RankLoad(486, 8, 1)],
    StepTimeCurve(0.0, 0.0, (RooflineKnee(1, 1.0000000000000003e-09),)),
    2,
)
@given(st.lists(loads, min_size=1, max_size=4), curves, st.integers(2, 50))
def test_more_that_wait_for_their_first_token_never_cut_more(ranks, curve, factor):
    more = [rank._replace(prefilling=rank.prefilling * factor) for rank in ranks]
    least = plan_prefill_tokens(ranks, curve)
    assert plan_prefill_tokens(more, curve) >= least * (1 - 1e-6) - 1


@pytest.mark.parametrize("value", [0.0, math.ulp(0.0)])
def test_a_curve_without_a_slope_or_a_decoding_time_is_no_error(value):
    curve = StepTimeCurve(value, value, (RooflineKnee(1000, value),))
    assert 1 <= plan_prefill_tokens([RankLoad(4000, 10, 1), DECODING], curve) <= 4000


# A token takes 0.1 ms, a step of answers alone 100 ms.
LINE = StepTimeCurve(token_s=0.0001, decode_only_s=0.1, knees=())


@pytest.mark.parametrize(
    ("case", "ranks", "curve", "bound_s", "tokens"),
    [
        ("within the bound", [RankLoad(400, 10, 1)], LINE, 0.15, 400),
        ("cut at the bound", [RankLoad(4000, 10, 1)], LINE, 0.15, 500),
        ("nobody decodes", [RankLoad(4000, 0, 1)], LINE, 0.15, 4000),
        ("another rank decodes", [RankLoad(4000, 0, 1), DECODING], LINE, 0.15, 500),
        ("answers alone exceed it", [RankLoad(4000, 10, 1)], LINE, 0.05, LEAST_CHUNK_TOKENS),
        ("a backlog below the least chunk", [RankLoad(20, 10, 1)], LINE, 0.05, 20),
        ("nothing to prefill", [RankLoad(0, 10)], LINE, 0.05, 0),
        ("the time is not known", [RankLoad(4000, 10, 1)], None, 0.05, 4000),
        # Up to 900 prompt tokens are before the knee, where a step takes 190 ms; beyond it a token costs 0.2 ms.
        ("beyond the knee", [RankLoad(4000, 100, 100)], CURVE, 0.21, 1000),
        ("the knee is nearer than the bound", [RankLoad(4000, 100, 1)], CURVE, 0.21, 900),
        ("ranks share the knee", [RankLoad(4000, 50, 50)] * 2, CURVE, 0.16, 500),
    ],
)
def test_a_bound_of_the_step_cuts_a_backlog(case, ranks, curve, bound_s, tokens):
    assert plan_prefill_tokens(ranks, curve, bound_s) == pytest.approx(tokens, abs=1), case


def step_s(ranks: list[RankLoad], curve: StepTimeCurve, level: int) -> float:
    """Seconds of a step, where each rank computes this many tokens of its backlog."""
    decoding = sum(rank.decoding for rank in ranks)
    tokens = sum(min(level, rank.prefill_tokens) for rank in ranks)
    seconds = curve.decode_only_s + curve.token_s * level
    for knee in curve.knees:
        seconds += knee.token_s * (max(0, decoding + tokens - knee.tokens) - max(0, decoding - knee.tokens))
    return seconds


@given(groups, curves, st.floats(1e-6, 10))
def test_a_bounded_step_keeps_the_bound_or_computes_the_least_chunk(ranks, curve, bound_s):
    tokens = plan_prefill_tokens(ranks, curve, bound_s)
    whole = plan_prefill_tokens(ranks, None)
    assert min(whole, 1) <= tokens <= whole
    if any(rank.decoding for rank in ranks) and tokens > LEAST_CHUNK_TOKENS:
        assert step_s(ranks, curve, tokens) <= bound_s * (1 + 1e-6)


@given(groups, curves, st.floats(1e-6, 10), st.floats(1, 10))
def test_a_wider_bound_never_cuts_more_where_there_is_no_knee(ranks, curve, bound_s, factor):
    line = curve._replace(knees=())
    assert plan_prefill_tokens(ranks, line, bound_s) <= plan_prefill_tokens(ranks, line, bound_s * factor)
