"""The choice of the engine for a request."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_scheduling.engine.choice import (
    DispatchPolicy,
    EngineSettings,
    Hold,
    HoldReason,
    Job,
    Refuse,
    RefuseReason,
    Send,
    SendReason,
    choose_target,
    explain,
)
from moe_scheduling.engine.target_state import TargetState
from moe_scheduling.engine.ttft_model import DEFAULT_STEP_TIME, TtftModel, build_ttft_model
from moe_scheduling.signals import EngineSignal, StepTime, Target

A, B, C = Target("a"), Target("b"), Target("c", 1)
NOW_S = 100.0
# Binary fractions keep the arithmetic of the tests exact.
STEP_TIME = StepTime(base_s=1 / 64, prefill_s=1 / 1024, decode_s=1 / 512)
PREDICTED = EngineSettings(stickiness_s=0.25)
BY_REQUESTS = EngineSettings(policy=DispatchPolicy.LEAST_REQUESTS)
BY_TURN = EngineSettings(policy=DispatchPolicy.ROUND_ROBIN)
ALL = (PREDICTED, BY_REQUESTS, BY_TURN)


def engine(target, *, accepting=True, observed_s=NOW_S, step_time=STEP_TIME, **signal):
    state = TargetState(target, accepting=accepting)
    state.observe(EngineSignal(step_time=step_time, **signal), observed_s)
    return state


def choose(job, states, settings=PREDICTED, *, turn=0, exclude=()):
    return choose_target(job, states, settings, turn=turn, now_s=NOW_S, exclude=exclude)


def targets(states, settings, turns, job=None):
    return [choose(job or Job(100), states, settings, turn=turn).target for turn in turns]


@pytest.mark.parametrize(
    ("worse", "better"),
    [
        ({"waiting_prefill_tokens": 10}, {}),
        ({"running_prefill_tokens": 10}, {}),
        ({"waiting_prefill_tokens": 30}, {"waiting_prefill_tokens": 10, "running_prefill_tokens": 10}),
        ({"decode_tokens": 8}, {"decode_tokens": 7}),
        ({"waiting_prefill_tokens": 100}, {"decode_tokens": 8}),
        ({"kv_usage": 0.95}, {"kv_usage": 0.9}),
        ({"step_time": StepTime(base_s=1 / 64, prefill_s=1 / 512, decode_s=0.0)}, {}),
    ],
    ids=[
        "tokens that wait",
        "tokens that run",
        "tokens in sum",
        "requests that decode",
        "the greater of two terms",
        "a full cache",
        "a slower engine",
    ],
)
@pytest.mark.parametrize("turn", [0, 1])
def test_the_least_predicted_time_wins(worse, better, turn):
    for states in ([engine(A, **worse), engine(B, **better)], [engine(B, **better), engine(A, **worse)]):
        decision = choose(Job(100), states, turn=turn)
        assert (decision.target, decision.reason) == (B, SendReason.LEAST_PREDICTED)


def test_a_cache_that_is_not_full_makes_no_difference():
    assert set(targets([engine(A, kv_usage=0.9), engine(B)], PREDICTED, range(2))) == {A, B}


def test_the_prediction_is_the_time_of_the_tokens_and_of_the_steps():
    its = engine(A, waiting_prefill_tokens=2000, running_prefill_tokens=100, decode_tokens=4)
    # 2100 tokens ahead and 148 own fill one step of 2048 and a part of a second.
    expected_s = (2100 + 148) / 1024 + 2 * (1 / 64 + 4 / 512)
    assert choose(Job(148), [its]) == Send(A, expected_s, SendReason.LEAST_PREDICTED)


def test_full_kv_costs_decode_steps():
    full = build_ttft_model(STEP_TIME, EngineSignal(decode_tokens=4, kv_usage=1.0))
    assert full.kv_s == pytest.approx(64 * (1 / 64 + 4 / 512))


def test_cached_tokens_cost_nothing():
    decision = choose(Job(1000, {B: 900}), [engine(A), engine(B, waiting_prefill_tokens=500)])
    assert (decision.target, decision.predicted_s) == (B, 600 / 1024 + 1 / 64)
    assert choose(Job(1000, {B: 400}), [engine(A), engine(B, waiting_prefill_tokens=500)]).target == A


def test_what_was_sent_a_moment_ago_counts():
    states = [engine(A), engine(B)]
    states[0].sent("r", 10, NOW_S)
    assert targets(states, PREDICTED, range(4)) == [B] * 4


def test_a_stale_signal_leaves_in_flight_accounting_and_the_step_time_model():
    stale = engine(A, observed_s=NOW_S - 3, waiting_prefill_tokens=10**6, kv_usage=1.0)
    stale.sent("answered", 10, NOW_S)
    stale.first_token("answered", NOW_S)
    stale.sent("unanswered", 100, NOW_S)
    assert choose(Job(28), [stale]).predicted_s == 128 / 1024 + 1 / 64 + 1 / 512


def test_an_engine_without_a_step_time_model_is_like_the_first_that_has_one():
    new, unseen = engine(A, step_time=None, decode_tokens=8), TargetState(C)
    assert choose(Job(64), [new, engine(B, waiting_prefill_tokens=10**6)]).predicted_s == 64 / 1024 + 1 / 64 + 8 / 512
    assert choose(Job(64), [unseen, engine(B, waiting_prefill_tokens=10**6)]).predicted_s == 64 / 1024 + 1 / 64


def test_the_fleet_default_does_not_change_with_the_turn():
    slow = StepTime(base_s=1.0, prefill_s=1.0, decode_s=1.0)
    states = [engine(A, step_time=slow), TargetState(B), engine(C)]
    excluded = [choose(Job(64), states, turn=turn, exclude={A, C}).predicted_s for turn in range(3)]
    assert excluded == [explain(Job(64), states, PREDICTED, now_s=NOW_S)[1].predicted_s] * 3 == [65.0] * 3


def test_without_any_step_time_model_the_default_stands():
    decision = choose(Job(100), [TargetState(A)])
    assert decision.predicted_s == pytest.approx(DEFAULT_STEP_TIME.base_s + 100 * DEFAULT_STEP_TIME.prefill_s)


@pytest.mark.parametrize(
    ("ahead", "target", "reason"),
    [(0, A, SendReason.SESSION), (256, A, SendReason.SESSION), (257, B, SendReason.LEAST_PREDICTED)],
)
def test_a_session_stays_until_its_engine_is_worse_by_more_than_the_margin(ahead, target, reason):
    for turn in range(2):
        decision = choose(Job(100, session_target=A), [engine(A, waiting_prefill_tokens=ahead), engine(B)], turn=turn)
        assert (decision.target, decision.reason) == (target, reason)


def test_a_session_whose_engine_is_gone_moves():
    job = Job(100, session_target=C)
    assert choose(job, [engine(A)]).target == A
    assert choose(job, [engine(A), engine(C, accepting=False)]).target == A
    assert choose(job, [engine(A), engine(C)], exclude={C}).target == A


@pytest.mark.parametrize("settings", [BY_REQUESTS, BY_TURN], ids=lambda settings: settings.policy)
def test_sessions_bind_under_predicted_alone(settings):
    assert set(targets([engine(A), engine(B)], settings, range(2), Job(1, session_target=A))) == {A, B}


def test_least_requests_counts_requests_and_not_tokens():
    states = [engine(A, running=3, waiting=1), engine(B, running=3, waiting_prefill_tokens=10**6)]
    assert targets(states, BY_REQUESTS, range(4)) == [B] * 4
    states[1].sent("r", 1, NOW_S)
    states[1].sent("q", 1, NOW_S)
    assert targets(states, BY_REQUESTS, range(4)) == [A] * 4


def test_round_robin_goes_by_turn_whatever_the_load():
    states = [engine(A, waiting_prefill_tokens=10**6), engine(B, running=100), engine(C)]
    assert targets(states, BY_TURN, range(6)) == [A, B, C, A, B, C]


def test_round_robin_and_least_requests_return_the_prediction_too():
    states = [engine(A, waiting_prefill_tokens=924)]
    for settings, reason in ((BY_TURN, SendReason.TURN), (BY_REQUESTS, SendReason.LEAST_REQUESTS)):
        assert choose(Job(100), states, settings) == Send(A, 1 + 1 / 64, reason)


@pytest.mark.parametrize("settings", ALL, ids=lambda settings: settings.policy)
def test_equals_take_turns_evenly(settings):
    states = [engine(A), engine(Target("down"), accepting=False), engine(B), engine(C)]
    assert Counter(targets(states, settings, range(30))) == {A: 10, B: 10, C: 10}


@pytest.mark.parametrize("settings", ALL, ids=lambda settings: settings.policy)
def test_a_target_that_does_not_accept_or_failed_is_passed_over(settings):
    states = [engine(A, accepting=False), engine(B), engine(C, waiting_prefill_tokens=10**6, waiting=9)]
    for turn in range(3):
        assert choose(Job(1), states, settings, turn=turn, exclude=(B,)).target == C
        assert choose(Job(1), states, settings, turn=turn, exclude=frozenset({B, C})) == Refuse(
            RefuseReason.NO_OTHER_ENGINE
        )
        assert choose(Job(1), states[:1], settings, turn=turn, exclude={B}) == Refuse(RefuseReason.NO_ENGINE)
        assert choose(Job(1), [], settings, turn=turn) == Refuse(RefuseReason.NO_ENGINE)


@pytest.mark.parametrize("policy", DispatchPolicy)
@pytest.mark.parametrize(
    ("ahead", "held"),
    [((1024, 1024), True), ((1024, 1023), False), ((1023, 5000), False), ((0, 0), False)],
)
def test_a_request_is_held_when_every_engine_is_saturated(policy, ahead, held):
    settings = EngineSettings(policy=policy, saturation_s=1.0)
    states = [engine(target, waiting_prefill_tokens=tokens) for target, tokens in zip((A, B), ahead, strict=True)]
    states.append(engine(C, accepting=False))
    decision = choose(Job(10**6), states, settings)
    assert (decision == Hold(HoldReason.SATURATED)) is held


def test_the_wait_counts_whole_steps_and_the_wait_for_kv():
    model = TtftModel(token_s=1 / 1024, step_s=1 / 64, kv_s=0.5)
    assert [model.wait_s(tokens) for tokens in (0, 1024, 2048)] == [0.5, 1.5, 2.5 + 1 / 64]


def test_without_a_bound_nothing_is_held():
    assert isinstance(choose(Job(1), [engine(A, waiting_prefill_tokens=10**9, kv_usage=1.0)]), Send)


def test_an_explanation_has_the_terms_of_what_was_compared():
    states = [
        engine(A, waiting_prefill_tokens=1024, running=2, kv_usage=1.0),
        engine(B, accepting=False),
        TargetState(C),
    ]
    job = Job(600, {C: 88})
    first, second = explain(job, states, PREDICTED, now_s=NOW_S)
    assert (first.target, first.ahead_tokens, first.uncached_tokens, first.requests) == (A, 1024, 600, 2)
    assert (first.fresh, second.fresh) == (True, False)
    assert (first.kv_s, first.wait_s) == (1.0, 2.0)
    assert first.predicted_s == 1.0 + 1624 / 1024 + 1 / 64
    assert (second.target, second.uncached_tokens, second.predicted_s) == (C, 512, 0.5 + 1 / 64)
    decision = choose(job, states)
    assert (decision.target, decision.predicted_s) == (C, second.predicted_s)


@pytest.mark.parametrize(
    ("job", "size"),
    [(Job(100), 100), (Job(100, {A: 30, B: 70}), 30), (Job(100, {A: 400}), 1), (Job(0), 1), (Job(9, {A: -5}), 9)],
)
def test_the_size_of_a_job_is_what_the_best_cache_leaves(job, size):
    assert job.size_tokens == size


SIGNALS = st.fixed_dictionaries(
    {
        "running": st.integers(0, 50),
        "waiting": st.integers(0, 50),
        "waiting_prefill_tokens": st.integers(0, 10**5),
        "running_prefill_tokens": st.integers(0, 10**5),
        "decode_tokens": st.integers(0, 50),
        "kv_usage": st.floats(0, 1),
        "expert_balance": st.floats(1, 8),
        "accepting": st.booleans(),
        "step_time": st.sampled_from([None, STEP_TIME, DEFAULT_STEP_TIME]),
        "observed_s": st.sampled_from([NOW_S, NOW_S - 1, NOW_S - 5]),
    }
)
FLEETS = st.lists(SIGNALS, max_size=5).map(lambda rows: [engine(Target(str(at)), **row) for at, row in enumerate(rows)])
SETTINGS = st.builds(
    EngineSettings,
    policy=st.sampled_from(DispatchPolicy),
    stickiness_s=st.floats(0, 10),
    saturation_s=st.none() | st.floats(0.001, 1000),
)
JOBS = st.builds(
    Job,
    st.integers(0, 10**5),
    st.dictionaries(st.integers(0, 5).map(lambda at: Target(str(at))), st.integers(0, 10**5)),
    st.none() | st.integers(0, 5).map(lambda at: Target(str(at))),
)


@given(JOBS, FLEETS, SETTINGS, st.integers(0, 1000), st.sets(st.integers(0, 5).map(lambda at: Target(str(at)))))
def test_every_decision_keeps_the_rules(job, states, settings, turn, exclude):
    decision = choose_target(job, states, settings, turn=turn, now_s=NOW_S, exclude=exclude)
    candidates = {its.target for its in states if its.accepting} - exclude
    rows = [row for row in explain(job, states, settings, now_s=NOW_S) if row.target in candidates]
    bound_s = settings.saturation_s
    match decision:
        case Refuse():
            assert not candidates
        case Hold():
            assert candidates
            assert bound_s is not None
        case Send(target, predicted_s, reason):
            assert target in candidates
            assert 0.0 <= predicted_s < float("inf")
            if reason is SendReason.SESSION:
                assert target == job.session_target
            if settings.policy is DispatchPolicy.LEAST_REQUESTS:
                assert next(row for row in rows if row.target == target).requests == min(row.requests for row in rows)


@given(JOBS, FLEETS, st.floats(0, 10), st.integers(0, 1000))
def test_no_choice_is_worse_than_the_best_by_more_than_the_margin(job, states, stickiness_s, turn):
    settings = EngineSettings(stickiness_s=stickiness_s)
    decision = choose_target(job, states, settings, turn=turn, now_s=NOW_S)
    if isinstance(decision, Send):
        least_s = min(row.predicted_s for row in explain(job, states, settings, now_s=NOW_S))
        margin_s = stickiness_s if decision.reason is SendReason.SESSION else 0.0
        assert decision.predicted_s <= least_s + margin_s


@given(JOBS, FLEETS, st.randoms(use_true_random=False))
def test_the_order_of_the_engines_decides_only_between_equals(job, states, random):
    shuffled = random.sample(states, len(states))
    modelled = [its for its in states if its.step_time_model is not None]
    if len({its.step_time_model for its in modelled}) > 1:
        return
    settings = EngineSettings()
    decisions = [choose_target(job, fleet, settings, turn=0, now_s=NOW_S) for fleet in (states, shuffled)]
    assert len({type(decision) for decision in decisions}) == 1
    if isinstance(decisions[0], Send):
        assert decisions[0].predicted_s == decisions[1].predicted_s
