"""What an engine has scheduled since its signal, as a gateway follows it."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_scheduling.engine.choice import EngineSettings, Job, choose_target, explain
from moe_scheduling.engine.engine_steps import EngineSteps, FleetStepTimes
from moe_scheduling.engine.target_state import TargetState
from moe_scheduling.signals import EngineSignal, StepTime, Target

STALE_AFTER_S = 2.0
PROMPT = StepTime(base_s=0.04, prefill_s=1e-5, decode_s=1e-4)
LINE = StepTime(base_s=0.01, prefill_s=2e-5, decode_s=1e-4)
STEP_TOKENS = 1000


def signal(
    waiting=0, running=0, scheduled=0, busy_s=0.0, decode=0, prompt=PROMPT, step=10_000, step_tokens=STEP_TOKENS
):
    return EngineSignal(
        step=step,
        running=decode,
        waiting_prefill_tokens=waiting,
        running_prefill_tokens=running,
        scheduled_prefill_tokens=scheduled,
        busy_s=busy_s,
        decode_tokens=decode,
        step_tokens=step_tokens if prompt else 0,
        step_time=prompt or LINE,
    )


def rank(number=0, steps=None, server="a"):
    return TargetState(Target(server, number), steps=steps)


def predicted_s(state, own, now_s):
    return state.first_token_s(own, LINE, now_s, STALE_AFTER_S)


# One engine.


@pytest.mark.parametrize(
    ("given", "own", "now_s", "expected_s"),
    [
        # Idle: a step of its own.
        (signal(), 100, 1.0, 0.04 + 0.001),
        # The rest of the scheduled steps, whose tokens do not count, and a step.
        (signal(running=800, scheduled=800, busy_s=0.05), 100, 1.0, 0.05 + 0.041),
        (signal(running=800, scheduled=800, busy_s=0.05), 100, 1.03, 0.02 + 0.041),
        # The scheduled steps are over.
        (signal(running=800, scheduled=800, busy_s=0.05), 100, 1.5, 0.041),
        # What waits shares its last step with the new request.
        (signal(waiting=500, running=800, scheduled=800, busy_s=0.05), 100, 1.0, 0.05 + 0.04 + 0.006),
        (signal(waiting=2500, running=800, scheduled=800, busy_s=0.05), 500, 1.0, 0.05 + 3 * 0.04 + 0.03),
        (signal(waiting=2500, running=800, scheduled=800, busy_s=0.05), 501, 1.0, 0.05 + 4 * 0.04 + 0.03001),
        # Decoding requests make each step longer.
        (signal(decode=100), 100, 1.0, 0.04 + 0.01 + 0.001),
        # The rest of a prompt that is longer than a step.
        (signal(running=3000, scheduled=1000, busy_s=0.05), 1, 1.0, 0.05 + 3 * 0.04 + 0.02001),
    ],
)
def test_the_time_to_the_first_token(given, own, now_s, expected_s):
    state = rank()
    state.observe(given, 1.0)
    assert predicted_s(state, own, now_s) == pytest.approx(expected_s)


def test_a_step_that_ends_schedules_what_waits():
    state = rank()
    state.observe(signal(waiting=1500, running=800, scheduled=800, busy_s=0.05), 1.0)
    state.steps.step_ended(1.05)
    # 1,000 of them run for 0.05 s from then on, and 500 wait.
    assert predicted_s(state, 100, 1.06) == pytest.approx(0.04 + 0.04 + 0.006)
    assert state.wait_s(LINE, 1.06, STALE_AFTER_S) == pytest.approx(0.04 + 0.005)


def test_the_answers_of_one_step_are_one_end_and_those_of_the_next_another():
    state = rank()
    state.observe(signal(waiting=5000, busy_s=0.05), 1.0)
    for at_s in (1.05, 1.051, 1.055):
        state.steps.step_ended(at_s)
    assert state.wait_s(LINE, 1.06, STALE_AFTER_S) == pytest.approx(0.04 + 4 * 0.05)
    state.steps.step_ended(1.1)
    assert state.wait_s(LINE, 1.1, STALE_AFTER_S) == pytest.approx(0.05 + 3 * 0.05)


def test_a_request_to_an_idle_engine_begins_at_once_and_one_to_a_busy_engine_waits_for_the_next_step():
    state = rank()
    state.observe(signal(), 1.0)
    state.sent("first", 500, 1.1)
    assert predicted_s(state, 100, 1.12) == pytest.approx(0.045 - 0.02 + 0.041)
    state.sent("second", 400, 1.12)
    assert predicted_s(state, 100, 1.12) == pytest.approx(0.025 + 0.04 + 0.005)


def test_requests_and_ends_of_steps_after_a_late_signal_count_in_their_order():
    early, late = rank(), rank()
    early.observe(signal(waiting=600, busy_s=0.05), 1.0)
    late.observe(signal(), 0.9)
    for state in (early, late):
        state.sent("r", 700, 1.02)
        state.steps.step_ended(1.05)
        state.sent("q", 100, 1.06)
    # It was on its way while all that happened.
    late.observe(signal(waiting=600, busy_s=0.05), 1.0)
    assert predicted_s(late, 50, 1.07) == pytest.approx(predicted_s(early, 50, 1.07))


def test_a_request_that_the_signal_was_written_for_counts_once():
    state = rank()
    state.observe(signal(), 0.5)
    state.sent("r", 700, 1.0)
    state.observe(signal(waiting=700), 1.0)
    assert state.ahead_prefill_tokens(1.0, STALE_AFTER_S) == 700
    assert state.sent_since_signal == 0


def test_requests_stand_for_those_of_other_gateways():
    alone, one_of_four = rank(), rank()
    one_of_four.traffic_share = 0.25
    for state in (alone, one_of_four):
        state.observe(signal(running=800, scheduled=800, busy_s=0.05), 1.0)
    alone.sent("r", 400, 1.01)
    one_of_four.sent("r", 100, 1.01)
    assert predicted_s(alone, 9, 1.02) == predicted_s(one_of_four, 9, 1.02)


# The ranks of an engine.


def test_a_request_waits_for_the_steps_of_all_ranks_so_that_only_what_is_not_scheduled_differs():
    steps = EngineSteps()
    full, empty = rank(0, steps), rank(1, steps)
    full.observe(signal(running=900, scheduled=900, busy_s=0.05, decode=50), 1.0)
    empty.observe(signal(), 0.95)
    assert predicted_s(full, 100, 1.01) == predicted_s(empty, 100, 1.01)
    empty.observe(signal(waiting=300), 1.01)
    assert predicted_s(full, 100, 1.01) < predicted_s(empty, 100, 1.01)


def test_ranks_are_compared_by_one_model_though_each_publishes_its_own():
    steps = EngineSteps()
    states = [rank(number, steps) for number in range(2)]
    for number, state in enumerate(states):
        state.observe(signal(prompt=StepTime(base_s=0.04 + number, prefill_s=1e-5, decode_s=0.0)), 1.0)
    assert predicted_s(states[0], 100, 1.0) == predicted_s(states[1], 100, 1.0)


def test_the_choice_and_its_explanation_follow_the_steps():
    states = [rank(server="a"), rank(server="b")]
    states[0].observe(signal(running=5000, scheduled=1000, busy_s=0.5), 1.0)
    states[1].observe(signal(waiting=1000, busy_s=0.1), 1.0)
    for turn in range(2):
        decision = choose_target(Job(100), states, EngineSettings(), turn=turn, now_s=1.0)
        assert decision.target == Target("b")
    terms = explain(Job(100), states, EngineSettings(), now_s=1.0)
    assert [row.predicted_s for row in terms] == [predicted_s(state, 100, 1.0) for state in states]
    assert [row.wait_s for row in terms] == [state.wait_s(LINE, 1.0, STALE_AFTER_S) for state in states]


# Signals that say less, or what cannot be.


@pytest.mark.parametrize("given", [signal(prompt=None), signal(step_tokens=0), EngineSignal(waiting_prefill_tokens=9)])
def test_without_a_model_of_prompt_steps_the_whole_queue_counts_as_before(given):
    state = rank()
    state.observe(given, 1.0)
    state.sent("r", 100, 1.1)
    state.steps.step_ended(1.2)
    tokens = state.ahead_prefill_tokens(1.3, STALE_AFTER_S)
    model = state.ttft_model(LINE, 1.3, STALE_AFTER_S)
    assert predicted_s(state, 50, 1.3) == model.first_token_s(tokens + 50)
    assert state.wait_s(LINE, 1.3, STALE_AFTER_S) == model.wait_s(tokens)


def test_a_lost_signal_leaves_the_own_requests():
    state = rank()
    state.observe(signal(waiting=9000, busy_s=1.0), 1.0)
    state.sent("r", 100, 1.1)
    stale = state.ttft_model(LINE, 9.0, STALE_AFTER_S).first_token_s(150)
    assert predicted_s(state, 50, 9.0) == stale


def test_a_restarted_engine_is_judged_by_its_new_signal():
    state = rank()
    state.observe(signal(waiting=9000, busy_s=1.0), 1.0)
    state.observe(signal(step=1), 1.5)
    assert predicted_s(state, 100, 1.5) == pytest.approx(0.041)


def test_a_restarted_engine_without_a_model_yet_is_judged_by_its_new_signal():
    state = rank()
    state.observe(signal(waiting=9000, busy_s=1.0), 1.0)
    state.observe(EngineSignal(step=1, step_tokens=STEP_TOKENS), 1.5)
    assert predicted_s(state, 100, 1.5) == pytest.approx(0.041)


def test_a_rank_without_a_model_is_followed_by_that_of_its_engine():
    steps = EngineSteps()
    busy, idle = rank(0, steps), rank(1, steps)
    busy.observe(signal(), 1.0)
    idle.observe(EngineSignal(waiting_prefill_tokens=5000, step_tokens=STEP_TOKENS), 1.0)
    assert predicted_s(idle, 100, 1.0) == pytest.approx(6 * 0.04 + 0.051)
    idle.observe(EngineSignal(step_tokens=STEP_TOKENS), 1.1)
    assert predicted_s(idle, 100, 1.1) == pytest.approx(0.041)


def test_what_waited_before_any_rank_had_a_model_counts_when_one_has():
    steps = EngineSteps()
    full, other = rank(0, steps), rank(1, steps)
    full.observe(EngineSignal(waiting_prefill_tokens=5000, step_tokens=STEP_TOKENS), 1.0)
    other.observe(signal(), 1.05)
    assert predicted_s(full, 100, 1.1) == pytest.approx(6 * 0.04 + 0.051)


@pytest.mark.parametrize("older", [signal(prompt=None), EngineSignal()])
def test_an_older_agent_in_the_place_of_a_newer_one_ends_what_was_followed(older):
    state = rank()
    state.observe(signal(waiting=9000, busy_s=1.0), 1.0)
    state.observe(older, 1.1)
    assert predicted_s(state, 100, 1.2) == state.ttft_model(LINE, 1.2, STALE_AFTER_S).first_token_s(100)
    state.observe(signal(waiting=9000), 1.3)
    assert predicted_s(state, 100, 1.3) == pytest.approx(10 * 0.04 + 0.091)


def test_a_signal_of_an_idle_engine_ends_the_steps_that_were_predicted():
    state = rank()
    state.observe(signal(running=800, scheduled=800, busy_s=1.0), 1.0)
    state.sent("r", 400, 1.4)
    state.observe(signal(), 1.3)
    # The request met an idle engine, and runs since.
    assert predicted_s(state, 100, 1.42) == pytest.approx(0.044 - 0.02 + 0.041)


def test_a_request_without_tokens_is_no_end_of_a_step():
    state = rank()
    state.observe(signal(), 0.9)
    state.sent("r", 0, 1.02)
    state.steps.step_ended(1.1)
    state.observe(signal(waiting=2500, busy_s=0.05), 1.0)
    assert state.wait_s(LINE, 1.1, STALE_AFTER_S) == pytest.approx(0.05 + 0.04 + 0.015)


@pytest.mark.parametrize("now_s", [1.0, 9.0])
def test_without_a_model_of_its_own_an_engine_makes_steps_of_the_size_that_it_says(now_s):
    state = rank()
    state.observe(EngineSignal(step_tokens=8192), 1.0)
    assert predicted_s(state, 8192, now_s) == pytest.approx(0.01 + 2e-5 * 8192)
    assert predicted_s(state, 8193, now_s) == pytest.approx(0.02 + 2e-5 * 8193)


@pytest.mark.parametrize("busy_s", [math.nan, math.inf, -1.0])
def test_a_time_that_is_none_is_bounded(busy_s):
    state = rank()
    state.observe(signal(busy_s=busy_s), 1.0)
    assert 0.0 < predicted_s(state, 100, 1.0) <= 3601.0


# The fleet.


def test_a_new_engine_is_predicted_like_the_others_until_it_has_made_steps_of_its_own():
    fleet = FleetStepTimes()
    old, new = EngineSteps(fleet), EngineSteps(fleet)
    assert fleet.blend(old, PROMPT, 100_000) == PROMPT
    freak = StepTime(base_s=0.4, prefill_s=0.0, decode_s=0.0)
    mean_s = (0.04 + 0.4) / 2
    assert fleet.blend(new, freak, 0).base_s == pytest.approx(mean_s)
    assert fleet.blend(new, freak, 1000).base_s == pytest.approx((0.4 + mean_s) / 2)
    assert fleet.blend(new, freak, 10**9).base_s == pytest.approx(0.4, rel=1e-5)
    assert fleet.blend(old, PROMPT, 100_000).base_s == pytest.approx(0.04, rel=0.1)
    fleet.forget(new)
    fleet.forget(new)
    assert fleet.blend(old, PROMPT, 0) == PROMPT


# Whatever comes.

MOMENTS = st.floats(0.0, 10.0)
EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("sent"), st.integers(0, 1), st.integers(0, 5000)),
        st.tuples(st.just("ended"), st.integers(0, 1), st.just(0)),
        st.tuples(st.just("answered"), st.integers(0, 1), st.just(0)),
        st.tuples(st.just("signal"), st.integers(0, 1), st.integers(0, 5000)),
    ),
    max_size=30,
)


@given(EVENTS, st.lists(MOMENTS, min_size=30, max_size=30), st.floats(-3.0, 3.0))
def test_predictions_are_times_and_what_waits_is_bounded_whatever_the_clocks_say(events, moments, skew_s):
    steps = EngineSteps()
    states = [rank(number, steps) for number in range(2)]
    known = [0, 0]
    for key, ((kind, number, tokens), now_s) in enumerate(zip(events, sorted(moments), strict=False)):
        state = states[number]
        if kind == "sent":
            state.sent(key, tokens, now_s)
            known[number] += tokens
        elif kind == "answered":
            state.first_token(key - 1, now_s)
        elif kind == "ended":
            steps.step_ended(now_s)
        else:
            state.observe(signal(waiting=tokens, busy_s=0.1), now_s + skew_s)
            known[number] += tokens
        for other, bound in zip(states, known, strict=True):
            value = other.first_token_s(100, LINE, now_s, STALE_AFTER_S)
            assert 0.0 < value < math.inf
            assert other.wait_s(LINE, now_s, STALE_AFTER_S) <= value + 1e-9
            assert 0 <= other._rank.unscheduled_tokens <= bound


@given(st.lists(st.tuples(st.integers(0, 3), st.floats(0.0, 1.0), st.integers(0, 10**6)), min_size=1))
def test_a_blend_lies_between_the_models(rows):
    fleet = FleetStepTimes()
    engines = [EngineSteps(fleet) for _ in range(4)]
    newest = {}
    for number, base_s, step in rows:
        line = StepTime(base_s=base_s, prefill_s=1e-6, decode_s=0.0)
        newest[number] = base_s
        found = fleet.blend(engines[number], line, step).base_s
        assert min(newest.values()) - 1e-9 <= found <= max(newest.values()) + 1e-9
