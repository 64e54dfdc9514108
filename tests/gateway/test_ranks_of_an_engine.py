"""The ranks of an engine step together: they have one step-time model and one factor, and their loads alone decide."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_contract.gateway_config import EngineAddress, GatewayConfig
from moe_gateway.engines.dispatcher import Dispatcher
from moe_scheduling.engine.choice import Job, Send, SendReason
from moe_scheduling.signals import EngineSignal, StepTime, Target

NOW_S = 100.0
RANKS = Target("pair", 0), Target("pair", 1)
OTHER = Target("other", 0)
# What two ranks of one engine fitted at the same time, four steps apart, in the first seconds of a load.
BY_RANK = (
    StepTime(base_s=0.0517, prefill_s=2.04e-6, decode_s=0.0),
    StepTime(base_s=0.0059, prefill_s=7.84e-6, decode_s=0.0),
)


@pytest.fixture
def dispatcher():
    engines = EngineAddress(name="pair", url="http://pair", ranks=2), EngineAddress(name="other", url="http://other")
    config = GatewayConfig.model_validate(
        {"listen": {"port": 1}, "admin": {"port": 2}, "token_file": "t", "engines": engines}
    )
    dispatcher = Dispatcher(config)
    dispatcher.set_ready("pair", True, NOW_S)
    return dispatcher


def chosen(dispatcher, prompt_tokens=1000):
    decision = dispatcher.choose(Job(prompt_tokens), NOW_S)
    assert isinstance(decision, Send)
    return decision.target


def answer(dispatcher, target, measured_s, *, modelled_s=0.2, requests=100):
    """Requests that take `modelled_s` by the step-time model of that target, and took `measured_s`."""
    predicted_s = modelled_s * dispatcher.target_states[target].ttft_factor
    for number in range(requests):
        sent_s = NOW_S + 0.01 * number
        sending = Send(target, predicted_s, SendReason.LEAST_PREDICTED)
        request = dispatcher.send(Job(100), (), None, sending, sent_s)
        dispatcher.answer(request, sent_s + measured_s)
        dispatcher.settle(request, sent_s + measured_s)
    dispatcher.tick(NOW_S + 0.01 * requests)


@pytest.mark.parametrize("fuller", [0, 1])
@pytest.mark.parametrize("last", [0, 1])
def test_the_rank_with_less_ahead_is_chosen_whatever_each_has_fitted(dispatcher, fuller, last):
    for number in (1 - last, last):
        ahead = 24_000 if number == fuller else 8000
        signal = EngineSignal(waiting_prefill_tokens=ahead, decode_tokens=100, step_time=BY_RANK[number])
        dispatcher.observe(RANKS[number], signal, NOW_S, NOW_S)
    assert {chosen(dispatcher) for _ in range(4)} == {RANKS[1 - fuller]}


def test_a_rank_that_has_not_fitted_yet_has_the_model_of_the_other(dispatcher):
    dispatcher.observe(RANKS[0], EngineSignal(step_time=BY_RANK[0]), NOW_S, NOW_S)
    dispatcher.observe(RANKS[1], EngineSignal(), NOW_S, NOW_S)
    models = [dispatcher.target_states[target].step_time_model for target in (*RANKS, OTHER)]
    assert models == [BY_RANK[0], BY_RANK[0], None]


def test_a_model_that_is_no_model_leaves_that_of_the_ranks(dispatcher):
    dispatcher.observe(RANKS[0], EngineSignal(step_time=BY_RANK[0]), NOW_S, NOW_S)
    dispatcher.observe(RANKS[1], EngineSignal(step_time=replace(BY_RANK[1], base_s=-1.0)), NOW_S, NOW_S)
    assert [dispatcher.target_states[target].step_time_model for target in RANKS] == [BY_RANK[0]] * 2


def test_late_answers_of_a_rank_send_nothing_away_from_it(dispatcher):
    answer(dispatcher, RANKS[0], 0.6)
    factors = [dispatcher.target_states[target].ttft_factor for target in RANKS]
    assert factors[0] == factors[1] > 1.2
    for number, ahead in enumerate((7000, 8000)):
        signal = EngineSignal(waiting_prefill_tokens=ahead, step_time=BY_RANK[0])
        dispatcher.observe(RANKS[number], signal, NOW_S, NOW_S)
    assert {chosen(dispatcher) for _ in range(4)} == {RANKS[0]}


def test_each_engine_has_its_own_factor(dispatcher):
    answer(dispatcher, RANKS[0], 0.6)
    answer(dispatcher, OTHER, 0.2)
    slow, fair = (dispatcher.target_states[target].ttft_factor for target in (RANKS[1], OTHER))
    assert slow > 1.5 * fair


SECONDS = st.floats(0.0, 1.0)
MODELS = st.builds(StepTime, base_s=SECONDS, prefill_s=SECONDS, decode_s=SECONDS) | st.none()
SIGNALS = st.builds(EngineSignal, waiting_prefill_tokens=st.integers(0, 10**6), step_time=MODELS)


@given(st.lists(st.tuples(st.integers(0, 1), SIGNALS, st.floats(-1.0, 1.0)), max_size=10))
def test_ranks_have_one_model_whatever_comes_in_whatever_order(observations):
    config = {"listen": {"port": 1}, "admin": {"port": 2}, "token_file": "t"}
    engines = (EngineAddress(name="pair", url="http://pair", ranks=2),)
    dispatcher = Dispatcher(GatewayConfig.model_validate({**config, "engines": engines}))
    for rank, signal, age_s in observations:
        dispatcher.observe(RANKS[rank], signal, NOW_S - age_s, NOW_S)
    first, second = (dispatcher.target_states[target].step_time_model for target in RANKS)
    assert first == second


PROMPT = StepTime(base_s=0.04, prefill_s=1e-5, decode_s=0.0)


def publish(dispatcher, target, at_s, *, prompt=PROMPT, **counts):
    signal = EngineSignal(step=1, step_tokens=1000, step_time=prompt, **counts)
    dispatcher.observe(target, signal, at_s, at_s)


def test_an_answer_of_one_rank_is_the_end_of_a_step_of_all(dispatcher):
    for target in RANKS:
        publish(dispatcher, target, NOW_S, waiting_prefill_tokens=900, busy_s=0.05)
    request = dispatcher.targets.send(Send(RANKS[0], 0.1, SendReason.LEAST_PREDICTED), 100, NOW_S)
    states = [dispatcher.target_states[target] for target in RANKS]
    assert states[0].steps is states[1].steps is not dispatcher.target_states[OTHER].steps
    before_s = [state.first_token_s(200, PROMPT, NOW_S + 0.05, 2.0) for state in states]
    dispatcher.targets.answer(request, NOW_S + 0.05, is_first_token=False)
    after_s = [state.first_token_s(200, PROMPT, NOW_S + 0.05, 2.0) for state in states]
    # What waited was scheduled, up to a full step: the new request waits for it and needs one step alone.
    assert before_s == pytest.approx([0.08 + 0.012, 0.08 + 0.011])
    assert after_s == pytest.approx([0.05 + 0.04 + 0.002] * 2)


def test_the_step_times_of_an_engine_that_is_gone_are_forgotten(dispatcher):
    slow = replace(PROMPT, base_s=4.0)
    publish(dispatcher, OTHER, NOW_S, prompt=slow)
    publish(dispatcher, RANKS[0], NOW_S)
    steps = dispatcher.target_states[RANKS[0]].steps
    assert steps.step_time.base_s > 1.0
    dispatcher.set_engines([EngineAddress(name="pair", url="http://pair", ranks=2)])
    publish(dispatcher, RANKS[0], NOW_S + 1.0)
    assert steps.step_time == PROMPT
