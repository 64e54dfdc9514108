"""Where a prompt and its answer are computed in fleets of many ranks, of many engines, and of several kinds of them."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_scheduling.engine.choice import Hold, HoldReason, Job
from moe_scheduling.engine.disaggregation import EngineRole, KvTransfer, LatencyTargets
from moe_scheduling.engine.pair_choice import NEAREST, PairContext, choose_placement
from moe_scheduling.engine.target_list import HOLDERS, SAMPLE, TargetList
from moe_scheduling.engine.target_state import TargetState
from moe_scheduling.engine.ttft_model import STEP_PREFILL_TOKENS
from moe_scheduling.signals import EngineSignal, StepTime, Target

NOW_S = 100.0
STEP_TIME = StepTime(base_s=0.008, prefill_s=0.00004, decode_s=0.0001)
CONTEXT = PairContext(transfer=KvTransfer(token_bytes=1e5, bytes_per_s=25e9))
LONG = Job(4000)
PREFILL, DECODE = EngineRole.PREFILL, EngineRole.DECODE


class CountedState(TargetState):
    """Counts how often a choice reads it."""

    __slots__ = ("reads",)

    def __init__(self, target):
        super().__init__(target)
        self.reads = 0

    def ahead_prefill_tokens(self, now_s, stale_after_s):
        self.reads += 1
        return super().ahead_prefill_tokens(now_s, stale_after_s)


class CountedShares(dict):
    """Counts the servers that a choice asks for."""

    asked = 0

    def get(self, server, default=None):
        self.asked += 1
        return super().get(server, default)


def engine(server, rank=0, *, kind=TargetState, decode=0, **signal):
    state = kind(Target(server, rank))
    state.observe(EngineSignal(step_time=STEP_TIME, decode_tokens=decode, running=decode, **signal), NOW_S)
    return state


def choose(states, context=CONTEXT, job=LONG, *, turn=0):
    return choose_placement(job, states, context, turn=turn, now_s=NOW_S)


def places(placement):
    return placement.prefill.server, placement.decode.server


# The ranks of a server.


@given(
    loads=st.lists(st.tuples(st.sampled_from([0, 100, 9000, 50_000]), st.integers(0, 3)), min_size=1, max_size=5),
    tokens=st.integers(1, 9000),
    share=st.floats(0.0, 0.9),
)
def test_the_terms_of_a_group_are_those_of_all_its_ranks(loads, tokens, share):
    states = [
        engine("a", rank, decode=decode, waiting_prefill_tokens=ahead) for rank, (ahead, decode) in enumerate(loads)
    ]
    placement = choose(states, PairContext(prefill_shares={"a": share}), Job(tokens))
    rank = placement.decode.rank
    ahead, here = loads[rank][0], loads[rank][1] + 1
    others = [(tokens, requests) for at, (tokens, requests) in enumerate(loads) if at != rank]
    others_ahead = max((tokens for tokens, _ in others), default=0)
    fullest = max(requests for _, requests in loads)
    delayed = sum(requests for _, requests in loads)
    step_s = STEP_TIME.base_s + STEP_TIME.decode_s * max(here, fullest)
    inter_token_s = min(step_s / (1 - share) ** len(loads), step_s + STEP_TIME.prefill_s * STEP_PREFILL_TOKENS)
    interrupted_s = delayed * STEP_TIME.prefill_s * (max(ahead + tokens, others_ahead) - max(ahead, others_ahead))
    crowded_s = delayed * STEP_TIME.decode_s * inter_token_s / step_s if here > fullest else 0.0
    ttft_s = min(state.first_token_s(tokens, STEP_TIME, NOW_S, 2.0) for state in states)
    assert placement.prediction.ttft_s == ttft_s
    assert placement.prediction.inter_token_s == pytest.approx(inter_token_s)
    assert placement.prediction.cost_s == pytest.approx(ttft_s + interrupted_s + 128 * (inter_token_s + crowded_s))


@pytest.mark.parametrize(("servers", "ranks"), [(2, 32), (32, 8)])
def test_a_choice_reads_each_rank_a_few_times_however_many_there_are(servers, ranks):
    names = [f"s{number}" for number in range(servers)]
    states = TargetList(engine(name, rank, kind=CountedState) for name in names for rank in range(ranks))
    for turn in range(10):
        choose(states, turn=turn)
    assert max(state.reads for state in states) <= 30


# Large fleets.


def test_of_a_large_fleet_a_sample_is_compared():
    states = TargetList(engine(f"s{number}", kind=CountedState) for number in range(300))
    shares = CountedShares()
    chosen = {choose(states, CONTEXT._replace(prefill_shares=shares), turn=turn).decode for turn in range(100)}
    assert sum(state.reads for state in states) <= 3 * 100 * SAMPLE
    assert shares.asked <= 100 * SAMPLE
    assert len(chosen) > SAMPLE


def test_the_few_engines_of_a_role_are_in_each_sample():
    states = TargetList([*(engine(f"d{number}", decode=5) for number in range(200)), engine("p0"), engine("p1")])
    roles = {state.target.server: PREFILL if state.target.server[0] == "p" else DECODE for state in states}
    found = Counter(choose(states, CONTEXT._replace(roles=roles), turn=turn).prefill.server for turn in range(40))
    assert min(found["p0"], found["p1"]) >= 15


def test_the_engine_that_holds_the_prompt_is_in_each_sample():
    states = TargetList(engine(f"s{number}") for number in range(300))
    job = Job(4000, {Target("s7"): 3900, Target("gone"): 4000})
    assert {choose(states, job=job, turn=turn).decode for turn in range(30)} == {Target("s7")}
    many = Job(4000, {state.target: 3900 for state in states[:100]})
    chosen = {choose(states, job=many, turn=turn).decode for turn in range(200)}
    assert chosen <= set(many.cached)
    assert len(chosen) > HOLDERS


def test_the_ranks_of_a_few_large_engines_are_one_group_each():
    """A draw of some ranks does not make the group smaller."""
    states = [engine("a", rank, decode=9) for rank in range(40)] + [engine("b", rank) for rank in range(40)]
    context = CONTEXT._replace(prefill_shares={"a": 0.01, "b": 0.01})
    whole, sampled = choose(states, context, turn=5), choose(TargetList(states), context, turn=5)
    assert whole.decode.server == sampled.decode.server
    assert whole.prediction == sampled.prediction


# Several kinds of engines, as in a rollout.


def test_pairs_of_each_kind_are_compared():
    """The nearest engines for prompts are all of one kind, and the nearest for answers of the other one."""
    states, peers, roles = [], {}, {}
    for kind, role, load in (("a", PREFILL, 0), ("b", PREFILL, 300), ("b", DECODE, 0), ("a", DECODE, 3)):
        for number in range(NEAREST):
            server = f"{kind}-{role}-{number}"
            peers[server], roles[server] = kind, role
            tokens = {"waiting_prefill_tokens": load} if role is PREFILL else {"decode": load}
            states.append(engine(server, **tokens))
    prefill, decode = places(choose(states, CONTEXT._replace(peers=peers, roles=roles)))
    assert peers[prefill] == peers[decode]
    assert (roles[prefill], roles[decode]) == (PREFILL, DECODE)


@pytest.mark.parametrize("peers", [{"old": "a", "new": "b"}, {"new": "b"}, {"old": "a"}, {}])
def test_an_engine_for_prompts_does_everything_where_no_other_one_can_decode_for_it(peers):
    """So the only engine of its kind is not idle while the others are full."""
    context = CONTEXT._replace(roles={"old": PREFILL}, peers=peers)
    states = [engine("old"), engine("new", waiting_prefill_tokens=20_000)]
    assert places(choose(states, context)) == ("old", "old")


def test_an_engine_for_prompts_never_gets_blocks():
    """Its engine may be able to send them alone."""
    context = CONTEXT._replace(roles=dict.fromkeys("ab", PREFILL), prefill_shares={"b": 0.9})
    assert not choose([engine("a", decode=60), engine("b")], context, Job(8000)).is_pair


# Saturation.

FULL = {"waiting": 9, "waiting_prefill_tokens": 1_000_000}


@pytest.mark.parametrize(
    ("roles", "transfer", "tokens", "holds"),
    [
        ({}, CONTEXT.transfer, 4000, False),
        # The idle engine decodes alone, or computes short prompts.
        ({"idle": DECODE}, CONTEXT.transfer, 4000, True),
        ({"idle": DECODE}, CONTEXT.transfer, 100, False),
        ({"idle": PREFILL}, CONTEXT.transfer, 4000, False),
        ({"idle": PREFILL}, None, 4000, True),
        ({"idle": PREFILL, "full": DECODE}, None, 4000, False),
    ],
)
def test_a_request_is_held_while_all_are_saturated_that_may_compute_its_prompt(roles, transfer, tokens, holds):
    context = PairContext(roles=roles, transfer=transfer, saturation_s=1.0)
    placement = choose([engine("idle"), engine("full", **FULL)], context, Job(tokens))
    assert (placement == Hold(HoldReason.SATURATED)) is holds
    assert not isinstance(choose([engine("full", **FULL)], context._replace(saturation_s=None)), Hold)


def test_bounds_do_not_send_to_a_saturated_fleet():
    context = PairContext(targets=LatencyTargets(ttft_s=0.1), saturation_s=1.0)
    assert choose([engine("full", **FULL)], context) == Hold(HoldReason.SATURATED)


def test_hundreds_of_ranks_that_compute_prompts_most_of_the_time_end_no_choice():
    states = TargetList([engine("large", rank, decode=1) for rank in range(512)])
    context = CONTEXT._replace(prefill_shares={"large": 1.0})
    assert choose(states, context).prediction.inter_token_s < 1.0
