"""What the gateway knows of engines that exchange KV blocks, and how their roles move with the load."""

import itertools
import math
from pathlib import Path

import pytest
from moe_contract.gateway_config import EngineAddress, GatewayConfig
from moe_contract.kv_transfer import Disaggregation, KvTransferState
from moe_contract.sections import Listen
from moe_gateway.engines.dispatcher import Dispatcher
from moe_gateway.engines.placements import DEFAULT_BYTES_PER_S, DEFAULT_TOKEN_BYTES, LEASE_MARGIN, PAUSE_S
from moe_scheduling.engine.choice import DispatchPolicy, EngineSettings, Job, Send
from moe_scheduling.engine.disaggregation import EngineRole, LatencyTargets
from moe_scheduling.signals import EngineSignal, StepTime, Target

LONG = Job(4000, splits=True)
STEP_TIME = StepTime(base_s=0.008, prefill_s=0.00003, decode_s=0.00005)


def make(count=3, *, moves_roles=True, dispatch=None, **state):
    config = GatewayConfig(
        listen=Listen(port=1),
        admin=Listen(port=2),
        token_file=Path("token"),
        engines=tuple(
            EngineAddress(name=f"e{number}", url=f"http://127.0.0.1:{number + 1}") for number in range(count)
        ),
        dispatch=dispatch or EngineSettings(),
        disaggregation=Disaggregation(moves_roles=moves_roles),
    )
    dispatcher = Dispatcher(config)
    for name in dispatcher.engines:
        dispatcher.set_process(name, 1)
        dispatcher.set_ready(name, True, 0.0)
        dispatcher.placements.set_transfer(name, KvTransferState(**{"peers": "same", **state}))
    return dispatcher


def signal(dispatcher, now_s, decoding=0):
    for target in dispatcher.target_states:
        row = EngineSignal(step=int(now_s * 100), step_time=STEP_TIME, decode_tokens=decoding, running=decoding)
        dispatcher.observe(target, row, now_s, now_s)


def fix(dispatcher, **roles):
    for name, role in roles.items():
        dispatcher.placements.set_transfer(name, KvTransferState(peers="same", role=EngineRole(role)))


def test_fixed_roles_make_pairs():
    dispatcher = make(2)
    fix(dispatcher, e0="prefill", e1="decode")
    sent = dispatcher.choose(LONG, 1.0)
    assert (sent.prefill.target, sent.target) == (Target("e0"), Target("e1"))
    assert sent.prefill.predicted_s > 0.0
    assert sent.predicted_s > 0.0


def test_what_cannot_be_split_goes_to_an_engine_that_does_both():
    dispatcher = make(3)
    fix(dispatcher, e0="prefill", e1="decode")
    for _ in range(6):
        sent = dispatcher.choose(LONG._replace(splits=False), 1.0)
        assert (sent.target, sent.prefill) == (Target("e2"), None)


@pytest.mark.parametrize("policy", [DispatchPolicy.LEAST_REQUESTS, DispatchPolicy.ROUND_ROBIN])
def test_policies_without_predictions_split_nothing(policy):
    dispatcher = make(2, dispatch=EngineSettings(policy=policy))
    fix(dispatcher, e0="prefill", e1="decode")
    assert dispatcher.choose(LONG, 1.0).prefill is None


def test_a_saturated_fleet_holds_requests_as_ever():
    dispatcher = make(2, dispatch=EngineSettings(saturation_s=1.0))
    fix(dispatcher, e0="prefill", e1="decode")
    assert dispatcher.choose(LONG, 1.0).prefill is not None
    for target in dispatcher.target_states:
        row = EngineSignal(step=1, step_time=STEP_TIME, waiting=9, waiting_prefill_tokens=10_000_000)
        dispatcher.observe(target, row, 1.0, 1.0)
    assert not isinstance(dispatcher.choose(LONG, 1.0), Send)


def test_a_role_that_moved_is_for_the_requests_that_can_be_split():
    dispatcher = make(2)
    dispatcher.placements.roles["e0"] = EngineRole.PREFILL
    whole = LONG._replace(splits=False)
    assert {dispatcher.choose(whole, 1.0).target.server for _ in range(4)} == {"e0", "e1"}
    assert {dispatcher.choose(LONG, 1.0).target.server for _ in range(4)} == {"e1"}


def test_an_idle_engine_that_a_request_never_gets_does_not_let_it_pass():
    dispatcher = make(3, dispatch=EngineSettings(saturation_s=1.0))
    fix(dispatcher, e0="prefill", e1="decode")
    row = EngineSignal(step=1, step_time=STEP_TIME, waiting=9, waiting_prefill_tokens=10_000_000)
    dispatcher.observe(Target("e2"), row, 1.0, 1.0)
    assert not isinstance(dispatcher.choose(LONG._replace(splits=False), 1.0), Send)
    assert dispatcher.choose(LONG, 1.0).prefill.target == Target("e0")
    dispatcher.observe(Target("e0"), row, 1.0, 1.0)
    assert not isinstance(dispatcher.choose(LONG, 1.0), Send)


def test_pairs_stay_within_the_engines_that_can_answer():
    dispatcher = make(3)
    fix(dispatcher, e0="prefill", e1="decode", e2="decode")
    for _ in range(4):
        sent = dispatcher.choose(LONG._replace(servers=frozenset({"e0", "e2"})), 1.0)
        assert (sent.prefill.target, sent.target) == (Target("e0"), Target("e2"))


def test_an_engine_that_failed_is_in_no_pair_for_a_while():
    dispatcher = make(2)
    fix(dispatcher, e0="prefill", e1="decode")
    dispatcher.placements.fall_back("decode_error", "e1", 1.0)
    assert dispatcher.choose(LONG, 1.0).prefill is None
    assert dispatcher.choose(LONG, 1.0 + PAUSE_S).prefill is not None
    dispatcher.placements.fall_back("lease_over", None, 20.0)
    assert dispatcher.choose(LONG, 20.0).prefill is not None
    assert dispatcher.placements.fall_backs == {"decode_error": 1, "lease_over": 1}


def test_another_process_is_no_peer_until_its_agent_says_so():
    dispatcher = make(2)
    fix(dispatcher, e0="prefill", e1="decode")
    dispatcher.set_process("e1", 2)
    assert dispatcher.choose(LONG, 1.0).prefill is None
    fix(dispatcher, e1="decode")
    assert dispatcher.choose(LONG, 1.0).prefill is not None
    dispatcher.set_engines([EngineAddress(name="e0", url="http://127.0.0.1:1")])
    assert dispatcher.placements.roles == {"e0": EngineRole.PREFILL}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1.0, 0.0])
def test_a_figure_that_cannot_be_true_is_not_used(value):
    dispatcher = make(2, token_bytes=value, bytes_per_s=value)
    link = dispatcher.placements._link
    assert (link.token_bytes, link.bytes_per_s) == (DEFAULT_TOKEN_BYTES, DEFAULT_BYTES_PER_S)
    assert dispatcher.choose(LONG, 1.0)


def test_the_lease_has_a_margin():
    dispatcher = make(2, lease_s=30.0)
    assert dispatcher.placements.longest_wait_s("e0") == pytest.approx(30.0 * (1 - LEASE_MARGIN))
    assert dispatcher.placements.longest_wait_s("unknown") == 0.0


def test_a_reservation_counts_as_a_request_and_not_as_an_unanswered_one():
    dispatcher = make(2)
    reserved = dispatcher.reserve(Target("e0"), 1.0)
    state = dispatcher.target_states[Target("e0")]
    assert (state.in_flight, state.oldest_unanswered_s, state.unanswered_prefill_tokens) == (1, None, 0)
    dispatcher.settle(reserved, 2.0)
    assert state.in_flight == 0


# Roles by load.


def offer(dispatcher, seconds, *, requests_per_s, tokens, start_s=1000.0, lasted_s=1.0):
    """Requests with long prompts at a steady rate; returns the roles by time."""
    seen = []
    for step in range(int(seconds * 10)):
        now_s = start_s + step / 10
        signal(dispatcher, now_s)
        for _ in range(requests_per_s // 10):
            dispatcher.placements.load.arrived(tokens, now_s)
            dispatcher.placements.load.ended(100.0, lasted_s)
        dispatcher.tick(now_s)
        seen.append((now_s - start_s, dict(dispatcher.placements.roles)))
    return seen


def prefilling(roles):
    return sum(role is EngineRole.PREFILL for role in roles.values())


def test_long_prompts_give_engines_the_role_of_prefill_one_a_minute_at_most():
    dispatcher = make(4, token_bytes=1000.0, bytes_per_s=25e9)
    seen = offer(dispatcher, 150, requests_per_s=20, tokens=3000)
    changes = [time_s for (time_s, now), (_, before) in zip(seen[1:], seen, strict=False) if now != before]
    assert changes
    assert all(later - earlier >= 60.0 for earlier, later in itertools.pairwise(changes))
    assert 0 < prefilling(seen[-1][1]) < 4
    assert dispatcher.placements.role_changes["gain"] == len(changes)


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_role_that_the_agent_fixes_never_moves(role):
    dispatcher = make(4)
    fix(dispatcher, **dict.fromkeys(("e0", "e1", "e2", "e3"), role))
    seen = offer(dispatcher, 40, requests_per_s=20, tokens=3000)
    assert set(seen[-1][1].values()) == {EngineRole(role)}


def test_roles_stay_where_the_gateway_does_not_move_them():
    dispatcher = make(4, moves_roles=False)
    seen = offer(dispatcher, 40, requests_per_s=20, tokens=3000)
    assert prefilling(seen[-1][1]) == 0


@pytest.mark.parametrize("other", [KvTransferState(peers="another"), KvTransferState(peers=""), None])
def test_roles_stay_while_not_all_engines_are_peers(other):
    """As in a rollout: the load of each kind is not known apart."""
    dispatcher = make(4, token_bytes=1000.0, bytes_per_s=25e9)
    before = dispatcher.placements._states["e3"]
    dispatcher.placements.set_transfer("e3", other)
    assert prefilling(offer(dispatcher, 40, requests_per_s=20, tokens=3000)[-1][1]) == 0
    dispatcher.placements.set_transfer("e3", before)
    assert prefilling(offer(dispatcher, 40, requests_per_s=20, tokens=3000, start_s=1040.0)[-1][1]) == 1


def test_a_change_that_makes_things_worse_is_undone():
    dispatcher = make(4, token_bytes=1000.0, bytes_per_s=25e9)
    before = offer(dispatcher, 30, requests_per_s=20, tokens=3000)
    assert prefilling(before[-1][1]) == 1
    after = offer(dispatcher, 70, requests_per_s=20, tokens=3000, start_s=1030.0, lasted_s=3.0)
    assert prefilling(after[-1][1]) == 0
    assert dispatcher.placements.role_changes["rollback"] == 1


# Bounds.


def test_bounds_are_kept_where_nothing_is_split():
    """The engine without answers takes the long prompt, though the other one would give its first token sooner."""
    config = GatewayConfig(
        listen=Listen(port=1),
        admin=Listen(port=2),
        token_file=Path("token"),
        engines=tuple(EngineAddress(name=name, url=f"http://{name}") for name in ("answers", "prompts")),
    )
    dispatcher = Dispatcher(config)
    for name in dispatcher.engines:
        dispatcher.set_ready(name, True, 0.0)
    answers = EngineSignal(step=1, step_time=STEP_TIME, running=5, decode_tokens=5)
    prompts = EngineSignal(step=1, step_time=STEP_TIME, running=1, running_prefill_tokens=3000)
    dispatcher.observe(Target("answers"), answers, 1.0, 1.0)
    dispatcher.observe(Target("prompts"), prompts, 1.0, 1.0)
    assert dispatcher.placements is None
    assert dispatcher.choose(LONG, 1.0).target == Target("answers")
    bounded = EngineSettings(targets=LatencyTargets(inter_token_s=0.02))
    dispatcher.set_policies(bounded, dispatcher.request_settings, 1.0)
    sent = dispatcher.choose(LONG, 1.0)
    assert (sent.target, sent.prefill) == (Target("prompts"), None)
    dispatcher.placements.set_transfer("prompts", KvTransferState(peers="same"))
    assert dispatcher.placements.roles == {}
    dispatcher.set_policies(EngineSettings(), dispatcher.request_settings, 1.0)
    assert dispatcher.choose(LONG, 1.0).target == Target("answers")


def test_bounds_steer_pairs():
    dispatcher = make(2, dispatch=EngineSettings(targets=LatencyTargets(inter_token_s=0.02)))
    for name, decoding in (("e0", 5), ("e1", 0)):
        row = EngineSignal(step=1, step_time=STEP_TIME, running=decoding, decode_tokens=decoding)
        dispatcher.observe(Target(name), row, 1.0, 1.0)
    assert dispatcher.choose(LONG, 1.0).prefill is None
    assert dispatcher.choose(LONG, 1.0).target == Target("e1")
