"""What no honest peer sends: it must neither poison a later decision nor break one."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_scheduling.engine.choice import DispatchPolicy, EngineSettings, Job, Send, choose_target, explain
from moe_scheduling.engine.target_state import TargetState
from moe_scheduling.request.order import RequestPolicy, RequestSettings, order_key
from moe_scheduling.request.waiting_queue import WaitingQueue
from moe_scheduling.signals import EngineSignal, StepTime, Target

A, B = Target("a"), Target("b")
POLICIES = [RequestSettings(policy=policy) for policy in RequestPolicy]
NUMBERS = st.floats() | st.integers() | st.sampled_from([10**400, -(10**400), 2**53, math.nan, math.inf, -math.inf])
FINITE = st.floats(allow_nan=False, allow_infinity=False)


@pytest.mark.parametrize(
    ("size_tokens", "counted"), [(math.nan, 0), (math.inf, 0), (-math.inf, 0), (-7, 0), (10**400, 0), (2.5, 2)]
)
@pytest.mark.parametrize("settings", POLICIES, ids=lambda settings: settings.policy)
def test_an_absurd_size_leaves_the_sum_and_the_others_in_order(settings, size_tokens, counted):
    queue = WaitingQueue(settings)
    queue.push("a", size_tokens=10, arrival_s=0.0)
    queue.push("absurd", size_tokens=size_tokens, arrival_s=0.5)
    queue.push("b", size_tokens=10, arrival_s=1.0)
    assert queue.size_tokens == 20 + counted
    assert [item for item in queue if item != "absurd"] == ["a", "b"]
    queue.remove("absurd")
    assert (queue.size_tokens, [queue.pop(), queue.pop()]) == (20, ["a", "b"])


@pytest.mark.parametrize("size_tokens", [math.nan, math.inf, 10**400])
def test_an_endless_size_waits_no_longer_than_the_horizon(size_tokens):
    settings = RequestSettings(ageing_horizon_s=10.0)
    assert order_key(settings, size_tokens=size_tokens, arrival_s=5.0) == (15.0, 5.0)


@pytest.mark.parametrize("size_tokens", [-1, -math.inf, 0])
def test_no_size_makes_a_request_older_than_it_is(size_tokens):
    assert order_key(RequestSettings(), size_tokens=size_tokens, arrival_s=5.0) == (5.0, 5.0)


@pytest.mark.parametrize("arrival_s", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("front", [False, True])
def test_an_arrival_that_is_no_time_is_refused_and_changes_nothing(arrival_s, front):
    queue = WaitingQueue(RequestSettings())
    queue.push("a", size_tokens=1, arrival_s=0.0)
    with pytest.raises(ValueError, match="arrival_s must be finite"):
        queue.push("a", size_tokens=1, arrival_s=arrival_s, front=front)
    assert (list(queue), queue.size_tokens) == (["a"], 1)


@given(
    st.builds(
        RequestSettings,
        policy=st.sampled_from(RequestPolicy),
        ageing_rate=st.none() | st.floats(0, allow_infinity=False, exclude_min=True),
        ageing_horizon_s=st.floats(0, allow_infinity=False),
        priority_step_s=st.floats(0, allow_infinity=False),
    ),
    NUMBERS,
    FINITE,
    NUMBERS,
    st.floats(0, allow_infinity=False, exclude_min=True),
)
def test_every_key_compares(settings, size_tokens, arrival_s, priority, speed):
    key = order_key(settings, size_tokens=size_tokens, arrival_s=arrival_s, priority=priority, speed=speed)
    assert not any(math.isnan(part) for part in key)


STEP_TIMES = st.none() | st.builds(StepTime, base_s=NUMBERS, prefill_s=NUMBERS, decode_s=NUMBERS)
SIGNALS = st.builds(
    EngineSignal,
    step=NUMBERS,
    running=NUMBERS,
    waiting=NUMBERS,
    waiting_prefill_tokens=NUMBERS,
    running_prefill_tokens=NUMBERS,
    decode_tokens=NUMBERS,
    kv_usage=NUMBERS,
    preemptions=NUMBERS,
    computed_tokens=NUMBERS,
    step_time=STEP_TIMES,
    expert_balance=NUMBERS,
    expert_pressure=NUMBERS,
)
EVENTS = st.lists(
    st.tuples(st.just("observe"), SIGNALS, st.floats())
    | st.tuples(st.just("sent"), st.integers(0, 3), NUMBERS)
    | st.tuples(st.just("first_token"), st.integers(0, 3), st.just(0))
    | st.tuples(st.just("settled"), st.integers(0, 3), st.just(0)),
    max_size=20,
)


def state_after(events, now_s):
    state = TargetState(A)
    for name, subject, value in events:
        match name:
            case "observe":
                state.observe(subject, value)
            case "sent":
                state.sent(subject, value, now_s)
            case "first_token":
                state.first_token(subject, now_s)
            case _:
                state.settled(subject, now_s)
    return state


@given(EVENTS, NUMBERS, st.sampled_from(DispatchPolicy), st.floats(-1e9, 1e9))
def test_every_prediction_is_a_time_whatever_an_engine_said(events, cached, policy, now_s):
    states = [state_after(events, now_s), TargetState(B)]
    settings, job = EngineSettings(policy=policy, saturation_s=1e12), Job(1000, {A: cached})
    for row in explain(job, states, settings, now_s=now_s):
        assert 0.0 <= row.wait_s <= row.predicted_s < math.inf
    decision = choose_target(job, states, settings, turn=0, now_s=now_s)
    if isinstance(decision, Send):
        assert 0.0 <= decision.predicted_s < math.inf


@given(EVENTS, st.floats(-1e6, 1e6))
def test_once_all_is_settled_and_sane_signals_came_nothing_is_left_of_the_absurd(events, now_s):
    events = [event for event in events if event[0] != "observe" or not now_s < event[2] < math.inf]
    state = state_after(events, now_s)
    for key in range(4):
        state.settled(key, now_s)
    step_time = StepTime(base_s=1.0, prefill_s=1.0, decode_s=0.0)
    for step in (1, 10**9):
        state.observe(EngineSignal(step=step, waiting_prefill_tokens=7, step_time=step_time), now_s)
    assert (state.in_flight, state.unanswered_prefill_tokens) == (0, 0)
    assert state.ahead_prefill_tokens(now_s, 2.0) == 7
    assert choose_target(Job(3), [state], EngineSettings(), turn=0, now_s=now_s).predicted_s == 11.0


@pytest.mark.parametrize("cached", [math.nan, math.inf, -5, 10**9])
def test_an_absurd_cache_makes_a_job_of_at_least_one_token(cached):
    assert Job(100, {A: cached}).uncached_tokens(A) >= 1
    assert Job(-100, {A: cached}).uncached_tokens(A) >= 1


def test_one_target_takes_all_turns():
    states = [TargetState(A)]
    for turn in (-1, 0, 1, 10**12):
        assert choose_target(Job(1), states, EngineSettings(), turn=turn, now_s=0.0).target == A
