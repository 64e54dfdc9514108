"""Prefills of a lockstep group: when they are held, how long at most, and what the group gains."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_scheduling.request.order import RequestSettings
from moe_scheduling.request.prefill_budget import (
    HeldPrefill,
    RankLoad,
    RooflineKnee,
    StepModel,
    StepTimeCurve,
    plan_prefill_tokens,
)

SETTINGS = RequestSettings(prefill_hold_s=0.5, first_token_weight=20.0)
# Utilisation 1/2: a lost second costs a second.
PACE = StepModel(token_s=0.0001, base_s=0.01, step_s=0.02)
IDLE = RankLoad()

DECODING = RankLoad(decoding=10)


@pytest.mark.parametrize(
    ("case", "ranks", "tokens"),
    [
        ("no ranks", [], 0),
        ("nothing to prefill", [DECODING, DECODING], 0),
        ("a rank alone never holds", [RankLoad(1000, decoding=50)], 1000),
        ("nobody decodes elsewhere", [RankLoad(1000, decoding=50), IDLE], 1000),
        ("a backlog beside one as large", [RankLoad(1000, decoding=5), RankLoad(1000, decoding=5)], 1000),
        ("as much as all have costs nothing", [RankLoad(1000, decoding=5), RankLoad(600, decoding=5)], 600),
        ("alone, just come", [RankLoad(1000, decoding=5), DECODING], 0),
        # 1000 tokens take 0.1 s from 10 decoding requests; 0.05 s at a weight of 20 are worth that.
        ("alone, waited almost enough", [RankLoad(1000, 0.049, 0.049, 5), DECODING], 0),
        ("alone, waited enough", [RankLoad(1000, 0.05, 0.05, 5), DECODING], 1000),
        ("two requests wait twice as much", [RankLoad(1000, 0.05, 0.025, 5), DECODING], 1000),
        ("what others have waited counts", [RankLoad(1000, 0.0, 0.0, 5), RankLoad(10, 0.05, 0.05, 10)], 1000),
        (
            "the smaller backlog is let in first",
            [RankLoad(4000, 0.05, 0.05, 5), RankLoad(900, decoding=5), DECODING],
            900,
        ),
        ("held for too long", [RankLoad(9000, 0.5, 0.5, 5), RankLoad(0, decoding=9000)], 9000),
    ],
)
def test_table(case, ranks, tokens):
    assert plan_prefill_tokens(ranks, PACE, SETTINGS) == tokens, case


def test_nothing_is_held_before_the_pace_is_known_or_where_holding_is_off():
    ranks = [RankLoad(1000, decoding=5), DECODING]
    assert plan_prefill_tokens(ranks, None, SETTINGS) == 1000
    assert plan_prefill_tokens(ranks, PACE, RequestSettings(prefill_hold_s=0.0)) == 1000


def test_a_lost_second_is_the_dearer_the_fuller_the_group():
    ranks = [RankLoad(1000, 0.05, 0.05, 5), DECODING]
    assert plan_prefill_tokens(ranks, PACE._replace(step_s=0.015), SETTINGS) == 1000
    assert plan_prefill_tokens(ranks, PACE._replace(step_s=0.03), SETTINGS) == 0


@pytest.mark.parametrize(
    "pace", [StepModel(0.0, 0.0, 0.0), StepModel(0.0001, 0.0, 0.01), StepModel(0.0001, 0.01, 0.001)]
)
def test_a_pace_without_a_base_or_without_work_is_no_error(pace):
    assert plan_prefill_tokens([RankLoad(1000, 9.9, 0.4, 5), DECODING], pace, SETTINGS) in (0, 1000)


# Where a step bends: from 1,000 tokens of all ranks on, each takes as long again.
BENT = PACE._replace(curve=StepTimeCurve(token_s=0.0001, floor_s=0.1, bends=(RooflineKnee(1000, 0.0001),)))


@pytest.mark.parametrize(
    ("case", "ranks", "tokens"),
    [
        ("few wait: cut at the bend", [RankLoad(4000, decoding=100, prefilling=1)], 900),
        ("many wait: what the step has is shared out", [RankLoad(4000, decoding=100, prefilling=100)], 4000),
        ("nobody decodes", [RankLoad(4000, prefilling=1)], 4000),
        ("all is before the bend", [RankLoad(800, decoding=100, prefilling=1)], 800),
        ("more decode than the bend has tokens", [RankLoad(4000, decoding=1000, prefilling=1)], 4000),
        ("ranks share the bend", [RankLoad(4000, decoding=50, prefilling=1)] * 2, 450),
        ("one leaves the other its part", [RankLoad(100, 0, 0, 50, 1), RankLoad(4000, 1, 1, 50, 1)], 800),
        ("nothing to prefill", [RankLoad(decoding=100)], 0),
    ],
)
def test_a_backlog_is_cut_where_the_step_bends(case, ranks, tokens):
    assert plan_prefill_tokens(ranks, BENT, SETTINGS) == tokens, case
    uncut = RequestSettings(prefill_hold_s=0.5, first_token_weight=20.0, cut_prefills=False)
    assert plan_prefill_tokens(ranks, BENT, uncut) >= tokens, case


def test_prefills_are_cut_where_they_are_not_held():
    settings = RequestSettings(prefill_hold_s=0.0, first_token_weight=20.0)
    ranks = [RankLoad(4000, decoding=100, prefilling=1), RankLoad(decoding=5000)]
    assert plan_prefill_tokens(ranks, PACE, settings) == 4000
    assert plan_prefill_tokens([ranks[0]], BENT, settings) == 900


loads = st.builds(
    RankLoad,
    st.integers(0, 100_000),
    st.floats(0, 1e6),
    st.floats(0, 1e3),
    st.integers(0, 4096),
    st.integers(0, 4096),
)
groups = st.lists(loads, max_size=16)
paces = st.builds(StepModel, st.floats(0, 1), st.floats(0, 1), st.floats(0, 10), st.none())
bends = st.lists(
    st.builds(RooflineKnee, st.integers(1, 10_000), st.floats(1e-9, 1)), max_size=4, unique_by=lambda bend: bend[0]
)
curves = st.builds(StepTimeCurve, st.floats(0, 1), st.floats(0, 1), bends.map(sorted).map(tuple))
bent_paces = st.builds(StepModel, st.floats(0, 1), st.floats(0, 1), st.floats(0, 10), curves)
settings_of_all_kinds = st.builds(
    RequestSettings, prefill_hold_s=st.floats(0, 10), first_token_weight=st.floats(0.01, 1e6)
)


@given(groups, paces, settings_of_all_kinds)
def test_what_is_planned_is_some_ranks_backlog(ranks, pace, settings):
    tokens = plan_prefill_tokens(ranks, pace, settings)
    assert tokens == 0 or tokens in {rank.prefill_tokens for rank in ranks}


@given(groups, paces, settings_of_all_kinds)
def test_a_backlog_is_never_held_longer_than_the_bound(ranks, pace, settings):
    tokens = plan_prefill_tokens(ranks, pace, settings)
    assert all(tokens >= rank.prefill_tokens for rank in ranks if rank.oldest_s >= settings.prefill_hold_s)


@given(groups, paces, settings_of_all_kinds, st.randoms(use_true_random=False))
def test_every_rank_makes_the_same_plan(ranks, pace, settings, shuffler):
    mixed = list(ranks)
    shuffler.shuffle(mixed)
    assert plan_prefill_tokens(mixed, pace, settings) == plan_prefill_tokens(ranks, pace, settings)


@given(st.lists(loads, min_size=1, max_size=8), paces, settings_of_all_kinds)
def test_what_all_ranks_have_is_never_held(ranks, pace, settings):
    tokens = plan_prefill_tokens(ranks, pace, settings)
    assert tokens >= min(rank.prefill_tokens for rank in ranks)


@given(groups, paces, settings_of_all_kinds, st.floats(1, 100))
def test_longer_waits_never_hold_more(ranks, pace, settings, factor):
    waited = [rank._replace(held_s=rank.held_s * factor, oldest_s=rank.oldest_s * factor) for rank in ranks]
    assert plan_prefill_tokens(waited, pace, settings) >= plan_prefill_tokens(ranks, pace, settings)


@given(groups, bent_paces, settings_of_all_kinds)
def test_what_is_cut_is_never_cut_to_nothing_and_never_more_than_without(ranks, pace, settings):
    cut = plan_prefill_tokens(ranks, pace, settings)
    whole = plan_prefill_tokens(ranks, pace._replace(curve=None), settings)
    assert min(1, whole) <= cut <= whole


@given(groups, bent_paces, settings_of_all_kinds, st.randoms(use_true_random=False))
def test_every_rank_cuts_alike(ranks, pace, settings, shuffler):
    mixed = list(ranks)
    shuffler.shuffle(mixed)
    assert plan_prefill_tokens(mixed, pace, settings) == plan_prefill_tokens(ranks, pace, settings)


@given(st.lists(loads, min_size=1, max_size=4), curves, st.integers(2, 50))
def test_more_that_wait_for_their_first_token_never_cut_more(ranks, curve, factor):
    pace = PACE._replace(curve=curve)
    settings = RequestSettings(prefill_hold_s=0.0, first_token_weight=1.0)
    more = [rank._replace(prefilling=rank.prefilling * factor) for rank in ranks]
    least = plan_prefill_tokens(ranks, pace, settings)
    assert plan_prefill_tokens(more, pace, settings) >= least * (1 - 1e-6) - 1


# How long prefills have been held.


def test_requests_are_held_from_when_they_were_first_seen():
    held = HeldPrefill()
    held.observe(2, 10.0)
    assert (held.held_s, held.oldest_s) == (0.0, 0.0)
    held.observe(3, 10.5)
    assert (held.held_s, held.oldest_s) == (1.0, 0.5)
    held.observe(3, 11.0)
    assert (held.held_s, held.oldest_s) == (2.5, 1.0)


def test_what_is_served_is_held_no_more():
    held = HeldPrefill()
    held.observe(4, 0.0)
    held.observe(4, 1.0)
    held.serve(0.25, 1.0)
    assert (held.held_s, held.oldest_s) == (3.0, 0.0)
    held.serve(2.0, 1.0)
    assert held.held_s == 0.0


def test_a_step_without_prefill_changes_nothing():
    held = HeldPrefill()
    held.observe(1, 0.0)
    held.observe(1, 1.0)
    held.serve(0.0, 1.0)
    assert (held.held_s, held.oldest_s) == (1.0, 1.0)


def test_a_backlog_that_has_gone_leaves_nothing_behind():
    held = HeldPrefill()
    held.observe(1, 0.0)
    held.observe(0, 5.0)
    assert held.oldest_s == 0.0
    held.observe(1, 6.0)
    assert (held.held_s, held.oldest_s) == (0.0, 0.0)


def test_a_clock_that_steps_back_takes_nothing_away():
    held = HeldPrefill()
    held.observe(1, 5.0)
    held.observe(1, 4.0)
    assert held.held_s == 0.0


# Closed loop: ranks in lockstep, prompts that come at random, one token for each decoding request and step.


class Group:
    """Two ranks with Poisson arrivals; a step takes as long as its fullest rank."""

    PACE_BASE_S, TOKEN_S = 0.006, 0.00004

    def __init__(self, settings: RequestSettings, rate: float, requests: int) -> None:
        source = random.Random(1)
        self.settings = settings
        self.waiting: list[list[tuple[float, int]]] = [[], []]
        self.decoding: list[list[int]] = [[], []]
        self.held = [HeldPrefill(), HeldPrefill()]
        self.first_token_s: list[float] = []
        self.steps_s: list[float] = []
        self.longest_hold_s = 0.0
        now_s, self.arrivals = 0.0, []
        for _ in range(requests):
            now_s += source.expovariate(rate)
            self.arrivals.append((now_s, source.randrange(100, 2000)))

    def run(self) -> None:
        now_s, mean_s, arrivals = 0.0, self.PACE_BASE_S, iter(self.arrivals)
        coming = next(arrivals, None)
        while coming is not None or any(self.waiting) or any(self.decoding):
            while coming is not None and coming[0] <= now_s:
                least = min((0, 1), key=lambda rank: sum(tokens for _, tokens in self.waiting[rank]))
                self.waiting[least].append(coming)
                coming = next(arrivals, None)
            step_s = self._step(now_s, StepModel(self.TOKEN_S, self.PACE_BASE_S, mean_s))
            mean_s += 0.02 * (step_s - mean_s)
            now_s += step_s

    def _step(self, now_s: float, pace: StepModel) -> float:
        loads = []
        for waiting, decoding, held in zip(self.waiting, self.decoding, self.held, strict=True):
            held.observe(len(waiting), now_s)
            tokens = sum(tokens for _, tokens in waiting)
            loads.append(RankLoad(tokens, held.held_s, held.oldest_s, len(decoding)))
        level = plan_prefill_tokens(loads, pace, self.settings)
        fullest = max(min(level, load.prefill_tokens) for load in loads)
        step_s = self.PACE_BASE_S + self.TOKEN_S * fullest
        for rank, load in enumerate(loads):
            self.longest_hold_s = max(self.longest_hold_s, load.oldest_s)
            self._compute(rank, min(level, load.prefill_tokens), now_s + step_s)
        self.steps_s += [step_s] * sum(load.decoding for load in loads)
        return step_s

    def _compute(self, rank: int, tokens: int, end_s: float) -> None:
        self.decoding[rank] = [left - 1 for left in self.decoding[rank] if left > 1]
        if tokens:
            self.held[rank].serve(tokens / sum(size for _, size in self.waiting[rank]), end_s)
        while tokens and self.waiting[rank]:
            arrival_s, size = self.waiting[rank].pop(0)
            if size > tokens:
                self.waiting[rank].insert(0, (arrival_s, size - tokens))
                return
            tokens -= size
            self.first_token_s.append(end_s - arrival_s)
            self.decoding[rank].append(100)


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def serve(rate: float, **settings: float) -> Group:
    group = Group(RequestSettings(**{"first_token_weight": 20.0, **settings}), rate, 1500)
    group.run()
    return group


def test_near_saturation_holding_shortens_the_wait_for_the_first_token_and_between_tokens():
    free, held = serve(37.0, prefill_hold_s=0.0), serve(37.0, prefill_hold_s=0.5)
    assert mean(held.first_token_s) < 0.75 * mean(free.first_token_s)
    assert mean(held.steps_s) < 0.7 * mean(free.steps_s)


def test_at_half_the_load_tokens_come_faster_and_the_first_one_is_no_later_than_a_tenth():
    free, held = serve(16.0, prefill_hold_s=0.0), serve(16.0, prefill_hold_s=0.5)
    assert mean(held.first_token_s) < 1.1 * mean(free.first_token_s)
    assert mean(held.steps_s) < mean(free.steps_s)


def test_all_are_served_and_none_is_held_beyond_the_bound_by_more_than_a_step():
    group = serve(33.0, prefill_hold_s=0.05, first_token_weight=0.01)
    assert len(group.first_token_s) == 1500
    assert group.longest_hold_s <= 0.05 + max(group.steps_s)
