"""The choice between one target for a request and a pair of them: prefill here, decode there."""

import math
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_scheduling.engine.choice import EngineSettings, Job, Refuse, RefuseReason, choose_target
from moe_scheduling.engine.disaggregation import EngineRole, KvTransfer, LatencyTargets
from moe_scheduling.engine.pair_choice import (
    DECODE_COMPUTES_TOKENS,
    NEAREST,
    PairContext,
    PlacementReason,
    RequestPlacement,
    choose_placement,
)
from moe_scheduling.engine.target_state import TargetState
from moe_scheduling.signals import EngineSignal, StepTime, Target

A, B, C = Target("a"), Target("b"), Target("c")
NOW_S = 100.0
STEP_TIME = StepTime(base_s=0.008, prefill_s=0.00004, decode_s=0.0001)
# 100 kB a token at 25 GB/s: 4 us a token.
LINK = KvTransfer(token_bytes=1e5, bytes_per_s=25e9)
MET = frozenset(product("abcd", repeat=2))
CONTEXT = PairContext(transfer=LINK, met=MET)
LONG = Job(4000)


def engine(target, *, accepting=True, decode=0, observed_s=NOW_S, step_time=STEP_TIME, **signal):
    state = TargetState(target, accepting=accepting)
    state.observe(EngineSignal(step_time=step_time, decode_tokens=decode, running=decode, **signal), observed_s)
    return state


def choose(states, job=LONG, context=CONTEXT, *, turn=0, exclude=()):
    return choose_placement(job, states, context, turn=turn, now_s=NOW_S, exclude=exclude)


def places(placement):
    return placement.prefill.server, placement.decode.server


# Whole requests and pairs.


def test_an_idle_fleet_takes_requests_whole():
    assert places(choose([engine(A), engine(B)])) == ("a", "a")


def test_a_long_prompt_is_not_computed_beside_many_answers():
    assert places(choose([engine(A, decode=60), engine(B)], Job(8000))) == ("b", "b")
    # The engine without answers is busy with prompts in future, too: its answers would be interrupted there.
    busy = CONTEXT._replace(prefill_shares={"b": 0.9})
    assert places(choose([engine(A, decode=60), engine(B)], Job(8000), busy)) == ("b", "a")


def test_without_a_transfer_requests_stay_whole():
    busy = PairContext(prefill_shares={"b": 0.9})
    assert not choose([engine(A, decode=60), engine(B)], Job(8000), busy).is_pair


@pytest.mark.parametrize("peers", [{}, {"a": "x"}, {"a": "x", "b": "y"}])
def test_servers_that_are_no_peers_make_no_pair(peers):
    busy = CONTEXT._replace(prefill_shares={"b": 0.9})
    states = [engine(A, decode=60), engine(B)]
    assert not choose(states, Job(8000), busy._replace(peers=peers)).is_pair
    assert choose(states, Job(8000), busy._replace(peers={"a": "x", "b": "x"})).is_pair


def test_a_slow_link_keeps_requests_whole():
    slow = CONTEXT._replace(prefill_shares={"b": 0.9}, transfer=KvTransfer(token_bytes=1e5, bytes_per_s=1e8))
    assert not choose([engine(A, decode=60), engine(B)], Job(8000), slow).is_pair


def test_a_pair_that_meets_first_pays_for_the_handshake():
    roles = {"a": EngineRole.PREFILL, "b": EngineRole.DECODE, "c": EngineRole.DECODE}
    context = CONTEXT._replace(roles=roles, met={("a", "b")})
    placement = choose([engine(A), engine(C), engine(B)], context=context)
    assert places(placement) == ("a", "b")
    assert placement.prediction.transfer_s == pytest.approx(LINK.fixed_s + 4000 * 4e-6)
    stranger = choose([engine(A), engine(C)], context=context)
    assert stranger.prediction.transfer_s == pytest.approx(LINK.fixed_s + 4000 * 4e-6 + LINK.handshake_s)


def test_cached_tokens_are_neither_computed_nor_moved():
    roles = {"a": EngineRole.PREFILL, "b": EngineRole.DECODE, "c": EngineRole.DECODE}
    context = CONTEXT._replace(roles=roles, transfer=KvTransfer(token_bytes=1e5, bytes_per_s=1e9))
    states = [engine(A), engine(B), engine(C)]
    placement = choose(states, Job(4000, {C: 3968}), context)
    assert places(placement) == ("c", "c")
    placement = choose(states, Job(4000, {C: 3600}), context)
    assert places(placement) == ("a", "c")
    assert placement.prediction.transfer_s == pytest.approx(LINK.fixed_s + 400 * 1e-4)
    at_a = choose(states, Job(4000, {A: 3600, C: 3600}), context)
    assert at_a.prediction.ttft_s == pytest.approx(placement.prediction.ttft_s - 3600 * STEP_TIME.prefill_s, abs=0.01)


def test_more_cached_tokens_than_the_prompt_has_move_none():
    roles = {"a": EngineRole.PREFILL, "b": EngineRole.DECODE}
    bounded = CONTEXT._replace(roles=roles, targets=LatencyTargets(inter_token_s=0.01))
    held = choose([engine(A), engine(B, decode=9)], Job(4000, {B: 9000}), bounded)
    assert held.prediction.transfer_s in (0.0, LINK.fixed_s)


@pytest.mark.parametrize(("tokens", "expected"), [(DECODE_COMPUTES_TOKENS, "b"), (DECODE_COMPUTES_TOKENS + 1, "a")])
def test_a_decode_engine_computes_short_prompts_itself(tokens, expected):
    roles = CONTEXT._replace(roles={"a": EngineRole.PREFILL, "b": EngineRole.DECODE})
    assert choose([engine(A), engine(B)], Job(tokens), roles).prefill.server == expected


def test_a_prompt_behind_a_longer_one_of_its_group_interrupts_nobody():
    """Rank 1 computes for long anyway; what rank 0 computes meanwhile ends with it."""
    group = [
        engine(Target("a", 0), decode=20),
        engine(Target("a", 1), decode=20, waiting_prefill_tokens=9000),
    ]
    hidden = choose([group[0], group[1]], Job(4000)).prediction
    exposed = choose([engine(Target("a", 0), decode=20), engine(Target("a", 1), decode=20)], Job(4000)).prediction
    assert hidden.cost_s < exposed.cost_s - 10 * 4000 * STEP_TIME.prefill_s


def test_answers_go_to_the_rank_with_the_fewest():
    roles = {"a": EngineRole.PREFILL, "b": EngineRole.DECODE}
    states = [engine(A), engine(Target("b", 0), decode=30), engine(Target("b", 1), decode=10)]
    assert choose(states, context=CONTEXT._replace(roles=roles)).decode == Target("b", 1)


def test_the_ranks_of_one_server_are_no_pair():
    roles = CONTEXT._replace(prefill_shares={"a": 0.5})
    assert not choose([engine(Target("a", 0)), engine(Target("a", 1), decode=50)], context=roles).is_pair


def test_an_engine_without_kv_blocks_is_no_place_to_decode():
    roles = {"a": EngineRole.PREFILL, "b": EngineRole.DECODE, "c": EngineRole.DECODE}
    states = [engine(A), engine(B, decode=10, kv_usage=0.99), engine(C, decode=14)]
    assert places(choose(states, context=CONTEXT._replace(roles=roles))) == ("a", "c")


# The exchange of TTFT for the time between tokens.


def test_the_weight_is_the_exchange_of_ttft_for_answers():
    # Beside the answers the first token comes sooner; apart from them no answer is interrupted.
    states = [engine(A, decode=40), engine(B, waiting_prefill_tokens=20_000)]
    for weight, expected in ((0.0, "a"), (10.0, "b")):
        context = CONTEXT._replace(targets=LatencyTargets(answer_weight=weight, ttft_growth=100.0))
        assert choose(states, context=context).prefill.server == expected


def test_ttft_grows_no_more_than_declared_for_the_sake_of_answers():
    states = [engine(A, decode=60), engine(B, waiting_prefill_tokens=8000)]
    for growth, expected in ((0.0, "a"), (0.2, "a"), (100.0, "b")):
        targets = LatencyTargets(answer_weight=10.0, ttft_growth=growth)
        assert choose(states, context=CONTEXT._replace(targets=targets)).prefill.server == expected


def test_a_pair_whose_transfer_delays_the_first_token_too_much_is_not_chosen():
    busy = CONTEXT._replace(prefill_shares={"b": 0.9})
    states = [engine(A, decode=60), engine(B)]
    for growth, expected in ((0.5, ("b", "a")), (0.0, ("b", "b"))):
        targets = LatencyTargets(ttft_growth=growth)
        assert places(choose(states, Job(8000), busy._replace(targets=targets))) == expected


def test_the_plan_of_the_roles_says_how_long_a_prompt_may_wait_at_a_prefill_engine():
    """The engine that decodes has no queue of prompts, for they all go to the other: it is no measure of the growth."""
    states = [engine(A, waiting_prefill_tokens=20_000), engine(B, decode=60)]
    context = CONTEXT._replace(roles={"a": EngineRole.PREFILL})
    wait_s = 20_000 * STEP_TIME.prefill_s + 9 * STEP_TIME.base_s
    assert not choose(states, Job(8000), context._replace(prefill_wait_s=0.99 * wait_s)).is_pair
    assert places(choose(states, Job(8000), context._replace(prefill_wait_s=1.01 * wait_s))) == ("a", "b")
    # It is a bound, not a preference: where the whole request costs less, it stays whole.
    few = [engine(A, waiting_prefill_tokens=20_000), engine(B, decode=0)]
    assert not choose(few, Job(8000), context._replace(prefill_wait_s=1.01 * wait_s)).is_pair
    # Engines without the role are compared as before.
    unified = context._replace(roles={}, prefill_wait_s=1.01 * wait_s)
    assert places(choose(states, Job(8000), unified)) != ("a", "b")


@pytest.mark.parametrize("prefill_wait_s", [0.0, 1.0, math.inf])
def test_a_prompt_that_is_cached_elsewhere_is_not_computed_again_for_much_longer(prefill_wait_s):
    context = CONTEXT._replace(roles={"a": EngineRole.PREFILL}, prefill_wait_s=prefill_wait_s)
    for cached, expected in (({B: 7500}, "b"), ({A: 7500, B: 7500}, "a")):
        assert choose([engine(A), engine(B, decode=60)], Job(8000, cached), context).prefill.server == expected


def test_prompts_that_leave_when_they_are_computed_wait_for_no_other():
    """Those ahead at a prefill engine answer elsewhere; at any other engine they would decode, and be interrupted."""
    cost_s = {}
    for role, waiting in product((EngineRole.PREFILL, EngineRole.UNIFIED), (0, 4)):
        states = [engine(A, waiting=waiting, waiting_prefill_tokens=2000), engine(B, decode=60)]
        context = CONTEXT._replace(roles={"a": role, "b": EngineRole.DECODE})
        cost_s[role, waiting] = choose(states, Job(8000), context).prediction.cost_s
    assert cost_s[EngineRole.PREFILL, 4] == cost_s[EngineRole.PREFILL, 0]
    assert cost_s[EngineRole.UNIFIED, 4] > cost_s[EngineRole.UNIFIED, 0] + 8000 * STEP_TIME.prefill_s


def test_what_any_prompt_tokens_add_to_a_step_interrupts_answers_too():
    slow = StepTime(base_s=0.008, prefill_s=0.00004, decode_s=0.0001, prefill_base_s=0.03)
    (line,), (piece,) = ([engine(A, decode=60, step_time=each)] for each in (STEP_TIME, slow))
    before, after = (choose([state], Job(1000)).prediction for state in (line, piece))
    assert after.ttft_s == pytest.approx(before.ttft_s + 0.03)
    assert after.cost_s == pytest.approx(before.cost_s + 0.03 + 60 * 0.03)
    # A prompt that fits into the last step of those ahead adds no step.
    ahead = [[engine(A, decode=60, step_time=each, waiting_prefill_tokens=500)] for each in (STEP_TIME, slow)]
    before, after = (choose(states, Job(1000)).prediction for states in ahead)
    assert after.cost_s == pytest.approx(before.cost_s + 0.03)


def test_fixed_roles_leave_no_whole_request_to_compare_with():
    roles = CONTEXT._replace(
        roles={"a": EngineRole.PREFILL, "b": EngineRole.DECODE}, targets=LatencyTargets(ttft_growth=0.0)
    )
    assert places(choose([engine(A, waiting_prefill_tokens=50_000), engine(B)], context=roles)) == ("a", "b")


def test_bounds_replace_the_growth_of_ttft():
    """A declared bound says itself how long a first token may take."""
    states = [engine(A, decode=40), engine(B, waiting_prefill_tokens=30_000)]
    targets = LatencyTargets(inter_token_s=0.05, ttft_growth=0.0)
    assert choose(states, context=CONTEXT._replace(targets=targets)).prefill.server == "b"


@given(
    loads=st.lists(
        st.tuples(st.integers(0, 50_000), st.integers(0, 200), st.sampled_from(EngineRole)), min_size=1, max_size=6
    ),
    tokens=st.integers(1, 20_000),
    growth=st.floats(0.0, 3.0),
)
def test_no_choice_is_later_than_the_growth_allows(loads, tokens, growth):
    states = [
        engine(Target(str(number)), waiting_prefill_tokens=ahead, decode=decode)
        for number, (ahead, decode, _) in enumerate(loads)
    ]
    roles = {str(number): role for number, (_, _, role) in enumerate(loads)}
    context = PairContext(
        targets=LatencyTargets(ttft_growth=growth), transfer=LINK, met=set(product("012345", repeat=2)), roles=roles
    )
    soonest = choose(states, Job(tokens), context._replace(transfer=None, targets=LatencyTargets(answer_weight=0.0)))
    chosen = choose(states, Job(tokens), context)
    if EngineRole.UNIFIED not in roles.values():
        return
    has_role = roles[chosen.prefill.server] is EngineRole.PREFILL
    waits_s = chosen.prediction.prefill_s if has_role else chosen.prediction.ttft_s
    assert waits_s <= (1.0 + growth) * soonest.prediction.ttft_s + 1e-9
    if not chosen.is_pair:
        assert chosen.prediction.ttft_s == soonest.prediction.ttft_s


def test_the_blocks_of_a_prefill_engine_may_take_their_time():
    """Its plan has weighed the transfer; the queue before it may still not grow."""
    context = CONTEXT._replace(roles={"a": EngineRole.PREFILL}, targets=LatencyTargets(ttft_growth=0.2))
    states = [engine(A), engine(B, decode=60), engine(C, decode=60)]
    placement = choose(states, Job(8000), context)
    assert placement.prefill == A
    assert placement.is_pair
    full = [engine(A, waiting_prefill_tokens=20_000), engine(B, decode=60), engine(C, decode=60)]
    assert not choose(full, Job(8000), context).is_pair
    without = context._replace(roles={})
    assert not choose(full, Job(8000), without).is_pair


@given(
    loads=st.lists(st.tuples(st.integers(0, 50_000), st.integers(0, 200)), min_size=1, max_size=6),
    tokens=st.integers(1, 20_000),
    turn=st.integers(0, 10),
)
def test_without_transfers_the_choice_is_that_of_whole_requests(loads, tokens, turn):
    states = [
        engine(Target(str(number // 2), number % 2), waiting_prefill_tokens=ahead, decode=decode)
        for number, (ahead, decode) in enumerate(loads)
    ]
    placement = choose(states, Job(tokens), PairContext(), turn=turn)
    sent = choose_target(Job(tokens), states, EngineSettings(), turn=turn, now_s=NOW_S)
    assert placement.decode == sent.target


@pytest.mark.parametrize(("ranks", "share"), [(1, 0.3), (4, 0.3), (4, 0.0)])
def test_each_rank_that_computes_prompts_interrupts_the_whole_group(ranks, share):
    group = [engine(Target("a", rank), decode=10) for rank in range(ranks)]
    step_s = STEP_TIME.base_s + 11 * STEP_TIME.decode_s
    expected_s = min(step_s / (1.0 - share) ** ranks, step_s + 2048 * STEP_TIME.prefill_s)
    placement = choose(group, context=CONTEXT._replace(prefill_shares={"a": share}))
    assert placement.prediction.inter_token_s == pytest.approx(expected_s)


@pytest.mark.parametrize("base_s", [0.0, 0.008])
@pytest.mark.parametrize("prefill_s", [0.0, 0.00004])
@pytest.mark.parametrize("decode_s", [0.0, 0.0001])
def test_a_fitted_line_may_lack_any_of_its_parts(base_s, prefill_s, decode_s):
    """The first steps of an engine may show no cost of answers, or none but that of prompts."""
    step_time = StepTime(base_s=base_s, prefill_s=prefill_s, decode_s=decode_s)
    states = [engine(target, decode=5, step_time=step_time) for target in (A, B)]
    for roles in ({}, {"a": EngineRole.PREFILL, "b": EngineRole.DECODE}):
        prediction = choose(states, context=CONTEXT._replace(roles=roles, prefill_shares={"b": 0.5})).prediction
        assert all(0.0 <= value < math.inf for value in prediction)


# Bounds.


def test_a_bound_between_tokens_moves_the_prompt_elsewhere():
    states = [engine(A, decode=40), engine(B, waiting_prefill_tokens=30_000)]
    context = CONTEXT._replace(targets=LatencyTargets(answer_weight=0.0))
    assert places(choose(states, context=context)) == ("a", "a")
    bounded = CONTEXT._replace(targets=LatencyTargets(inter_token_s=0.05, answer_weight=0.0))
    placement = choose(states, context=bounded)
    assert places(placement) == ("b", "a")
    assert placement.reason is PlacementReason.WITHIN_BOUNDS
    assert placement.prediction.longest_step_s <= 0.05


def test_a_bound_that_nothing_keeps_is_exceeded_by_the_least():
    states = [engine(A, decode=40), engine(B, decode=4)]
    placement = choose(states, context=CONTEXT._replace(targets=LatencyTargets(inter_token_s=0.01)))
    assert placement.reason is PlacementReason.LEAST_OVERRUN
    assert placement.prefill.server == "b"


def test_under_a_bound_of_ttft_the_least_cost_is_chosen():
    states = [engine(A, decode=40), engine(B, waiting_prefill_tokens=20_000)]
    for bound_s, expected in ((0.3, "a"), (5.0, "b")):
        context = CONTEXT._replace(targets=LatencyTargets(ttft_s=bound_s, answer_weight=10.0))
        placement = choose(states, context=context)
        assert (placement.prefill.server, placement.reason) == (expected, PlacementReason.WITHIN_BOUNDS)


# Roles.


@pytest.mark.parametrize(
    ("roles", "expected"),
    [
        ({"a": EngineRole.PREFILL}, ("b", "b")),
        ({"a": EngineRole.DECODE}, ("b", "b")),
        ({"a": EngineRole.DECODE, "b": EngineRole.PREFILL}, ("b", "a")),
        ({"a": EngineRole.DECODE, "b": EngineRole.DECODE}, ("a", "a")),
        ({"a": EngineRole.PREFILL, "b": EngineRole.PREFILL}, ("a", "a")),
    ],
)
def test_roles_are_kept_and_ignored_where_they_leave_nothing(roles, expected):
    placement = choose([engine(A), engine(B)], Job(1000), CONTEXT._replace(roles=roles))
    assert places(placement) == expected


def test_where_nothing_can_travel_roles_leave_whole_requests():
    roles = {"a": EngineRole.DECODE, "b": EngineRole.PREFILL}
    assert not choose([engine(A), engine(B)], context=PairContext(roles=roles)).is_pair


# Adversarial cases.


def test_no_target_is_a_refusal():
    assert choose([]) == Refuse(RefuseReason.NO_ENGINE)
    assert choose([engine(A, accepting=False)]) == Refuse(RefuseReason.NO_ENGINE)
    assert choose([engine(A)], exclude=[A]) == Refuse(RefuseReason.NO_OTHER_ENGINE)


def test_one_engine_left_of_a_pair_does_everything():
    roles = {"a": EngineRole.PREFILL, "b": EngineRole.DECODE}
    context = CONTEXT._replace(roles=roles)
    assert places(choose([engine(A), engine(B)], exclude=[A], context=context)) == ("b", "b")
    assert places(choose([engine(A, accepting=False), engine(B)], context=context)) == ("b", "b")


def test_engines_without_a_signal_count_their_own_requests():
    states = [TargetState(A), TargetState(B)]
    for number in range(5):
        states[0].sent(number, 10, NOW_S)
        states[0].first_token(number, NOW_S)
    assert states[0].decoding(NOW_S, 2.0) == 5
    assert places(choose(states)) == ("b", "b")


def test_ties_go_round():
    states = [engine(Target(name)) for name in "abcd"]
    assert {choose(states, turn=turn).prefill.server for turn in range(4)} == set("abcd")


def test_a_large_fleet_combines_the_nearest_alone():
    states = [engine(Target(f"p{number:02}"), waiting_prefill_tokens=number * 100) for number in range(40)]
    states += [engine(Target(f"d{number:02}"), decode=number) for number in range(40)]
    roles = {
        state.target.server: EngineRole.PREFILL if state.target.server[0] == "p" else EngineRole.DECODE
        for state in states
    }
    assert places(choose(states, context=CONTEXT._replace(roles=roles))) == ("p00", "d00")
    assert NEAREST < 40


@pytest.mark.parametrize("share", [math.nan, -1.0, 5.0, math.inf])
def test_implausible_shares_give_finite_predictions(share):
    placement = choose([engine(A), engine(B)], context=CONTEXT._replace(prefill_shares={"a": share, "b": share}))
    assert all(math.isfinite(value) for value in placement.prediction)


COUNTS = st.integers(0, 200)
TOKENS = st.integers(0, 50_000)


@st.composite
def fleets(draw):
    targets = [
        Target(server, rank)
        for server in draw(st.sets(st.sampled_from("abcd"), min_size=1))
        for rank in range(draw(st.integers(1, 3)))
    ]
    return [
        engine(
            target,
            accepting=draw(st.booleans()),
            decode=draw(COUNTS),
            waiting_prefill_tokens=draw(TOKENS),
            kv_usage=draw(st.floats(0, 1)),
            observed_s=draw(st.sampled_from([NOW_S, NOW_S - 50])),
            step_time=draw(st.sampled_from([STEP_TIME, None])),
        )
        for target in targets
    ]


CONTEXTS = st.builds(
    PairContext,
    targets=st.builds(
        LatencyTargets,
        ttft_s=st.none() | st.floats(0.01, 5),
        inter_token_s=st.none() | st.floats(0.001, 0.5),
        answer_weight=st.floats(0, 10),
    ),
    transfer=st.none() | st.just(LINK),
    roles=st.dictionaries(st.sampled_from("abcd"), st.sampled_from(EngineRole)),
    prefill_shares=st.dictionaries(st.sampled_from("abcd"), st.floats(0, 1)),
    met=st.just(MET) | st.just(frozenset()),
    answer_tokens=st.floats(1, 2000),
    saturation_s=st.none(),
)


@given(fleets(), CONTEXTS, st.integers(1, 50_000), st.integers(0, 1000), st.data())
def test_a_placement_is_allowed_finite_and_depends_on_the_arguments_alone(states, context, tokens, turn, data):
    known = [state.target for state in states]
    exclude = data.draw(st.sets(st.sampled_from(known)))
    first, again = (choose(states, Job(tokens), context, turn=turn, exclude=exclude) for _ in range(2))
    assert first == again
    open_targets = {state.target for state in states if state.accepting} - exclude
    if not open_targets:
        assert isinstance(first, Refuse)
        return
    assert isinstance(first, RequestPlacement)
    assert {first.prefill, first.decode} <= open_targets
    assert all(math.isfinite(value) and value >= 0 for value in first.prediction)
    if first.is_pair:
        assert first.prefill.server != first.decode.server
        assert context.transfer is not None
        assert context.roles.get(first.prefill.server) is not EngineRole.DECODE
        assert context.roles.get(first.decode.server) is not EngineRole.PREFILL


@given(fleets(), CONTEXTS, st.integers(1, 50_000))
def test_a_placement_within_its_bounds_keeps_them(states, context, tokens):
    placement = choose(states, Job(tokens), context)
    if isinstance(placement, RequestPlacement) and placement.reason is PlacementReason.WITHIN_BOUNDS:
        targets, prediction = context.targets, placement.prediction
        assert targets.inter_token_s is None or prediction.longest_step_s <= targets.inter_token_s
        assert targets.ttft_s is None or prediction.ttft_s <= targets.ttft_s


@given(fleets(), CONTEXTS, st.integers(1, 50_000))
def test_a_free_and_instant_link_never_raises_the_cost(states, context, tokens):
    free = KvTransfer(token_bytes=0, bytes_per_s=1, fixed_s=0, handshake_s=0)
    unbounded = context._replace(targets=LatencyTargets(answer_weight=1.0), roles={}, transfer=None)
    whole = choose(states, Job(tokens), unbounded)
    either = choose(states, Job(tokens), unbounded._replace(transfer=free))
    if isinstance(whole, RequestPlacement):
        assert either.prediction.cost_s <= whole.prediction.cost_s * (1 + 1e-9)


# Values.


@pytest.mark.parametrize(
    ("make", "values", "message"),
    [
        (KvTransfer, {"token_bytes": -1, "bytes_per_s": 1}, "token_bytes"),
        (KvTransfer, {"token_bytes": 1, "bytes_per_s": 0}, "bytes_per_s"),
        (KvTransfer, {"token_bytes": 1, "bytes_per_s": math.inf}, "bytes_per_s"),
        (KvTransfer, {"token_bytes": 1, "bytes_per_s": 1, "handshake_s": math.nan}, "handshake_s"),
        (LatencyTargets, {"ttft_s": 0.0}, "ttft_s"),
        (LatencyTargets, {"inter_token_s": math.nan}, "inter_token_s"),
        (LatencyTargets, {"answer_weight": -1.0}, "answer_weight"),
    ],
)
def test_values_out_of_range_are_refused_by_name(make, values, message):
    with pytest.raises(ValueError, match=message):
        make(**values)
