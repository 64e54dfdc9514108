"""The state of one target: in-flight accounting and its engine's newest signal."""

import math

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from moe_scheduling.engine.target_state import TargetState
from moe_scheduling.signals import EngineSignal, StepTime, Target

STALE_AFTER_S = 2.0
STEP_TIME = StepTime(base_s=0.01, prefill_s=0.001, decode_s=0.0)


def new_state():
    return TargetState(Target("a"))


def test_a_new_state_is_empty():
    new = new_state()
    assert (new.accepting, new.in_flight, new.unanswered_prefill_tokens) == (True, 0, 0)
    assert (new.signal, new.observed_s, new.signal_age_s(5.0), new.step_time_model) == (None, None, None, None)
    assert new.ahead_prefill_tokens(5.0, STALE_AFTER_S) == 0
    assert not new.is_fresh(5.0, STALE_AFTER_S)


def test_a_request_is_unanswered_until_its_first_token_and_in_flight_until_it_ends():
    its = new_state()
    its.sent("r", 100, 1.0)
    assert (its.in_flight, its.unanswered_prefill_tokens) == (1, 100)
    assert its.first_token("r", 1.5) == 0.5
    assert (its.in_flight, its.unanswered_prefill_tokens) == (1, 0)
    assert its.settled("r", 4.0) == 3.0
    assert (its.in_flight, its.unanswered_prefill_tokens) == (0, 0)


def test_each_step_time_model_and_each_signal_has_its_own_ttft_model():
    its, slower = new_state(), StepTime(base_s=0.01, prefill_s=0.002, decode_s=0.001)

    def predicted_s(step_time):
        return its.first_token_s(100, step_time, 5.0, STALE_AFTER_S)

    its.observe(EngineSignal(decode_tokens=10), 5.0)
    assert [predicted_s(step_time) for step_time in (STEP_TIME, slower, STEP_TIME)] == pytest.approx([0.11, 0.22, 0.11])
    its.observe(EngineSignal(decode_tokens=20), 5.0)
    assert [predicted_s(step_time) for step_time in (slower, STEP_TIME)] == pytest.approx([0.23, 0.11])
    its.observe(EngineSignal(decode_tokens=20, step_time=STEP_TIME), 5.0)
    assert predicted_s(slower) == pytest.approx(0.11)


@pytest.mark.parametrize(
    ("ahead", "own", "expected_s"),
    [(0, 0, 0.0), (0, 100, 0.06), (0, 1000, 0.15), (0, 1001, 0.2001), (900, 100, 0.01), (900, 101, 0.0601)],
)
def test_a_prompt_adds_its_tokens_and_the_steps_that_only_it_needs(ahead, own, expected_s):
    its = new_state()
    assert its.added_prefill_s(own, 1.0, STALE_AFTER_S) == 0.0
    model = StepTime(base_s=0.01, prefill_s=0.0001, decode_s=0.001, prefill_base_s=0.05)
    its.observe(EngineSignal(step_time=model, step_tokens=1000, waiting_prefill_tokens=ahead), 1.0)
    assert its.added_prefill_s(own, 1.0, STALE_AFTER_S) == pytest.approx(expected_s)


@pytest.mark.parametrize(
    ("prefill_tokens", "requests", "expected_s"), [(0, 0, 1.0), (0, 4, 49.0), (1, 0, 10_101.0), (2, 4, 10_249.0)]
)
def test_a_step_has_all_terms_of_its_model(prefill_tokens, requests, expected_s):
    model = StepTime(base_s=1.0, prefill_s=100.0, decode_s=10.0, decode_root_s=4.0, prefill_base_s=10_000.0)
    assert model.step_s(prefill_tokens, requests) == expected_s


def test_the_oldest_unanswered_request_is_the_first_that_waits():
    its = new_state()
    assert its.oldest_unanswered_s is None
    its.sent("first", 100, 1.0)
    its.sent("second", 100, 2.0)
    assert its.oldest_unanswered_s == 1.0
    its.first_token("first", 3.0)
    assert its.oldest_unanswered_s == 2.0


def test_a_request_may_end_without_an_answer():
    its = new_state()
    its.sent("r", 100, 1.0)
    assert its.settled("r", 1.25) == 0.25
    assert (its.in_flight, its.unanswered_prefill_tokens) == (0, 0)


def test_repeated_calls_and_unknown_keys_change_nothing():
    its = new_state()
    its.sent("r", 100, 1.0)
    its.sent("q", 10, 1.0)
    for _ in range(2):
        its.first_token("r", 2.0)
        its.first_token("stranger", 2.0)
    assert (its.in_flight, its.unanswered_prefill_tokens) == (2, 10)
    assert its.first_token("r", 2.0) is None
    for _ in range(2):
        its.settled("r", 3.0)
    assert its.settled("r", 3.0) is None
    assert its.first_token("r", 3.0) is None
    assert (its.in_flight, its.unanswered_prefill_tokens) == (1, 10)


def test_a_key_sent_again_starts_anew():
    its = new_state()
    its.sent("r", 100, 1.0)
    its.sent("r", 30, 2.0)
    assert (its.in_flight, its.unanswered_prefill_tokens) == (1, 30)
    assert its.first_token("r", 2.5) == 0.5


def test_requests_stand_for_those_of_other_gateways_until_the_next_signal():
    its = new_state()
    its.traffic_share = 0.25
    its.observe(EngineSignal(waiting_prefill_tokens=1000, waiting=3), 1.0)
    its.sent("r", 100, 2.0)
    its.sent("q", 10, 2.5)
    assert its.ahead_prefill_tokens(3.0, STALE_AFTER_S) == 1000 + 440
    assert its.first_token_s(10, STEP_TIME, 3.0, STALE_AFTER_S) == pytest.approx(1.45 + 0.01)
    assert (its.requests(3.0, STALE_AFTER_S), its.in_flight, its.unanswered_prefill_tokens) == (3 + 8, 2, 110)
    # Another share counts for requests sent from then on.
    its.traffic_share = 1.0
    its.first_token("q", 3.0)
    assert its.ahead_prefill_tokens(3.0, STALE_AFTER_S) == 1400
    its.observe(EngineSignal(waiting_prefill_tokens=1350), 3.0)
    assert its.ahead_prefill_tokens(3.0, STALE_AFTER_S) == 1350
    # Without a fresh signal, the own requests count alone.
    assert its.ahead_prefill_tokens(30.0, STALE_AFTER_S) == 100


def test_ahead_is_the_queue_of_the_signal_and_the_requests_sent_since():
    its = new_state()
    its.sent("before", 100, 1.0)
    its.sent("at the same time", 10, 2.0)
    its.sent("after", 7, 2.5)
    its.observe(EngineSignal(waiting_prefill_tokens=1000, running_prefill_tokens=500), 2.0)
    assert its.ahead_prefill_tokens(3.0, STALE_AFTER_S) == 1507
    assert its.sent_since_signal == 1
    its.first_token("before", 3.0)
    assert its.ahead_prefill_tokens(3.0, STALE_AFTER_S) == 1507
    its.first_token("after", 3.0)
    assert its.ahead_prefill_tokens(3.0, STALE_AFTER_S) == 1500
    its.sent("later", 3, 3.5)
    assert its.ahead_prefill_tokens(3.5, STALE_AFTER_S) == 1503


def test_ahead_is_the_own_unanswered_when_the_signal_is_stale():
    its = new_state()
    its.observe(EngineSignal(waiting_prefill_tokens=1000), 2.0)
    its.sent("r", 100, 2.5)
    assert its.ahead_prefill_tokens(4.0, STALE_AFTER_S) == 1100
    assert its.ahead_prefill_tokens(4.1, STALE_AFTER_S) == 100
    assert its.signal_age_s(4.5) == 2.5


def test_an_older_signal_is_ignored_and_an_equally_old_one_taken():
    its = new_state()
    its.observe(EngineSignal(step=2), 2.0)
    its.observe(EngineSignal(step=1), 1.9)
    assert (its.signal.step, its.observed_s) == (2, 2.0)
    its.observe(EngineSignal(step=3), 2.0)
    assert its.signal.step == 3


@pytest.mark.parametrize("observed_s", [math.nan, math.inf, -math.inf])
def test_a_signal_without_a_time_is_ignored(observed_s):
    its = new_state()
    its.observe(EngineSignal(step=1), 1.0)
    its.observe(EngineSignal(step=9), observed_s)
    assert (its.signal.step, its.observed_s) == (1, 1.0)


def test_a_signal_from_far_in_the_future_is_not_believed():
    its = new_state()
    its.sent("r", 5, 1.0)
    its.observe(EngineSignal(waiting_prefill_tokens=1000), 100.0)
    assert its.ahead_prefill_tokens(1.0, STALE_AFTER_S) == 5


def test_requests_are_the_own_or_those_that_the_engine_says_if_more():
    its = new_state()
    its.sent("r", 1, 1.0)
    assert its.requests(1.0, STALE_AFTER_S) == 1
    its.observe(EngineSignal(running=2, waiting=3), 2.0)
    assert its.requests(2.0, STALE_AFTER_S) == 5
    its.sent("q", 1, 2.5)
    assert its.requests(2.5, STALE_AFTER_S) == 6
    its.observe(EngineSignal(), 3.0)
    assert its.requests(3.0, STALE_AFTER_S) == 2
    assert its.requests(9.0, STALE_AFTER_S) == 2


def test_a_step_time_model_outlives_its_signal():
    its = new_state()
    its.observe(EngineSignal(step_time=STEP_TIME), 1.0)
    its.observe(EngineSignal(step_time=None), 2.0)
    assert its.signal.step_time is None
    assert its.step_time_model == STEP_TIME


@pytest.mark.parametrize(
    ("given", "used"),
    [
        ({"running": -1, "waiting": math.nan, "step": -3}, {"running": 0, "waiting": 0, "step": 0}),
        ({"waiting_prefill_tokens": math.inf, "preemptions": 10**400}, {"waiting_prefill_tokens": 0, "preemptions": 0}),
        ({"running_prefill_tokens": -5, "decode_tokens": math.nan}, {"running_prefill_tokens": 0, "decode_tokens": 0}),
        ({"running": 3.7}, {"running": 3}),
        ({"kv_usage": 1.7}, {"kv_usage": 1.0}),
        ({"kv_usage": -1.0}, {"kv_usage": 0.0}),
        ({"kv_usage": math.nan}, {"kv_usage": 0.0}),
        ({"expert_balance": math.nan}, {"expert_balance": 1.0}),
        ({"expert_balance": 0.2}, {"expert_balance": 1.0}),
        ({"expert_balance": math.inf}, {"expert_balance": 1024.0}),
        ({"expert_pressure": math.nan}, {"expert_pressure": 1.0}),
        ({"expert_pressure": -3.0}, {"expert_pressure": 1.0}),
        ({"expert_pressure": 0.25}, {"expert_pressure": 0.25}),
        ({"expert_pressure": math.inf}, {"expert_pressure": 1024.0}),
        ({"step_time": StepTime(base_s=math.nan, prefill_s=0.1, decode_s=0.1)}, {"step_time": None}),
        ({"step_time": StepTime(base_s=0.1, prefill_s=-0.1, decode_s=0.1)}, {"step_time": None}),
        ({"step_time": StepTime(base_s=0.1, prefill_s=0.1, decode_s=math.inf)}, {"step_time": None}),
        ({"step_time": StepTime(base_s=0.0, prefill_s=0.0, decode_s=0.0)}, {"step_time": None}),
        ({"step_time": STEP_TIME}, {"step_time": STEP_TIME}),
    ],
)
def test_implausible_values_of_a_signal_are_replaced(given, used):
    its = new_state()
    its.observe(EngineSignal(**given), 1.0)
    assert {name: getattr(its.signal, name) for name in used} == used


@pytest.mark.parametrize("signal", [{"expert_balance": 1.6}, {"expert_balance": 1.6, "expert_pressure": 0.4}])
def test_the_load_of_the_experts_changes_no_prediction(signal):
    """A lasting imbalance is in the fitted step time already; all ranks of a group wait for the busiest one."""
    predicted_s = set()
    for given in ({}, signal):
        its = new_state()
        its.observe(EngineSignal(step=1000, step_time=STEP_TIME), 1.0)
        its.observe(EngineSignal(step=1010, step_time=STEP_TIME, **given), 1.0)
        predicted_s.add(its.first_token_s(100, STEP_TIME, 1.0, STALE_AFTER_S))
    assert len(predicted_s) == 1


class AgainstAList(RuleBasedStateMachine):
    """Whatever happens, the sums are those over a plain list of what was sent."""

    def __init__(self):
        super().__init__()
        self.state = new_state()
        self.now_s = 0.0
        self.sent = {}
        self.answered = set()
        self.signal = None
        # The requests that the signal knows.
        self.known = set()

    @rule(key=st.integers(0, 8), tokens=st.integers(0, 100))
    def send(self, key, tokens):
        self.state.sent(key, tokens, self.now_s)
        self.sent[key] = (tokens, self.now_s)
        self.answered.discard(key)
        self.known.discard(key)

    @rule(key=st.integers(0, 9))
    def first_token(self, key):
        self.state.first_token(key, self.now_s)
        if key in self.sent:
            self.answered.add(key)

    @rule(key=st.integers(0, 9))
    def settle(self, key):
        self.state.settled(key, self.now_s)
        self.sent.pop(key, None)
        self.answered.discard(key)

    @rule(gap=st.integers(1, 3))
    def wait(self, gap):
        self.now_s += gap

    @rule(age=st.integers(0, 3), tokens=st.integers(0, 100))
    def observe(self, age, tokens):
        observed_s = self.now_s - age
        self.state.observe(EngineSignal(waiting_prefill_tokens=tokens), observed_s)
        if self.signal is None or observed_s >= self.signal[1]:
            self.signal = (tokens, observed_s)
            self.known |= {key for key, (_, sent_s) in self.sent.items() if sent_s <= observed_s}

    @invariant()
    def the_sums_are_those_of_the_list(self):
        unanswered = {key: tokens for key, (tokens, _) in self.sent.items() if key not in self.answered}
        assert self.state.in_flight == len(self.sent)
        assert self.state.unanswered_prefill_tokens == sum(unanswered.values())
        expected = self.state.unanswered_prefill_tokens
        if self.signal is not None and self.now_s - self.signal[1] <= STALE_AFTER_S:
            since = sum(tokens for key, tokens in unanswered.items() if key not in self.known)
            expected = self.signal[0] + since
        assert self.state.ahead_prefill_tokens(self.now_s, STALE_AFTER_S) == expected


TestAgainstAList = AgainstAList.TestCase
