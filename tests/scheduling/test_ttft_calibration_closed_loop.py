"""An engine that is slower than it says gets less work, and all requests gain.

Engines prefill in the order of arrival, in virtual time; the choice, the states and the calibration are the product's.
"""

import heapq
import itertools
import random
from collections import Counter
from statistics import mean

import pytest
from moe_scheduling.engine.choice import EngineSettings, Job, choose_target
from moe_scheduling.engine.target_state import TargetState
from moe_scheduling.engine.ttft_calibration import TtftCalibration
from moe_scheduling.signals import EngineSignal, StepTime, Target

STEP_TIME = StepTime(base_s=0.01, prefill_s=0.0001, decode_s=0.0)
TARGETS = [Target(f"engine-{number}") for number in range(4)]
SETTINGS = EngineSettings()
NETWORK_S = 0.003


class Fleet:
    """Serves a number of requests; engine N takes `ttft_factor[N]` times as long as its step-time model says."""

    def __init__(self, ttft_factor, *, seed, corrects=True, rate=26.0, requests=2500, stall=0.0):
        self.ttft_factor = dict(zip(TARGETS, ttft_factor, strict=True))
        self.random = random.Random(seed)
        self.target_states = {target: TargetState(target) for target in TARGETS}
        self.calibration = TtftCalibration() if corrects else None
        self.free_s = dict.fromkeys(TARGETS, 0.0)
        self.backlog = dict.fromkeys(TARGETS, 0)
        self.sent, self.ttft_s, self.stall, self.ticked_s = Counter(), [], stall, 0.0
        self._events, numbers = [], itertools.count()
        self._at = lambda at_s, act, *args: heapq.heappush(self._events, (at_s, next(numbers), act, args))
        at_s = 0.0
        for key in range(requests):
            at_s += self.random.expovariate(rate)
            self._at(at_s, self._arrive, key, int(self.random.lognormvariate(6.5, 1.0)) + 1)
        while self._events:
            now_s, _, act, args = heapq.heappop(self._events)
            act(now_s, *args)

    def _arrive(self, now_s, key, tokens):
        if self.calibration is not None and now_s - self.ticked_s >= 0.1:
            self.ticked_s = now_s
            for target, state in self.target_states.items():
                state.ttft_factor = self.calibration.factor(target, now_s)
        target, predicted_s, *_ = choose_target(
            Job(tokens), list(self.target_states.values()), SETTINGS, turn=key, now_s=now_s
        )
        state = self.target_states[target]
        state.sent(key, tokens, now_s)
        self.sent[target] += tokens
        self.backlog[target] += tokens
        own_s = self.ttft_factor[target] * (STEP_TIME.base_s + STEP_TIME.prefill_s * tokens)
        if self.random.random() < self.stall:
            own_s += 2.0
        self.free_s[target] = done_s = max(self.free_s[target], now_s + NETWORK_S) + own_s
        self._at(done_s + NETWORK_S, self._answer, target, key, tokens, now_s, predicted_s / state.ttft_factor)

    def _answer(self, now_s, target, key, tokens, sent_s, predicted_s):
        self.backlog[target] -= tokens
        self.ttft_s.append(now_s - sent_s)
        state = self.target_states[target]
        state.first_token(key, now_s)
        state.settled(key, now_s)
        state.observe(EngineSignal(waiting_prefill_tokens=self.backlog[target], step_time=STEP_TIME), now_s)
        if self.calibration is not None:
            self.calibration.observe(target, predicted_s, now_s - sent_s, now_s)

    def part(self, number):
        return self.sent[TARGETS[number]] / sum(self.sent.values())


SEEDS = range(4)


def test_an_engine_that_is_secretly_twice_as_slow_gets_less_work_and_requests_wait_less():
    pairs = [[Fleet((2.0, 1.0, 1.0, 1.0), seed=seed, corrects=on) for on in (False, True)] for seed in SEEDS]
    for blind, corrected in pairs:
        assert corrected.part(0) < 0.9 * blind.part(0)
        assert mean(corrected.ttft_s) < mean(blind.ttft_s)
        assert corrected.calibration.factor(TARGETS[0], corrected.ticked_s) == pytest.approx(2.0, rel=0.3)


@pytest.mark.parametrize("stall", [0.0, 0.01], ids=["steady", "with stalls"])
def test_where_all_are_as_they_say_correcting_costs_nothing(stall):
    blind, corrected = (
        mean(mean(Fleet((1.0,) * 4, seed=seed, corrects=on, stall=stall).ttft_s) for seed in SEEDS)
        for on in (False, True)
    )
    assert corrected < 1.03 * blind


def test_a_fleet_that_is_slower_as_a_whole_shares_as_before():
    for seed in SEEDS:
        fleet = Fleet((2.0,) * 4, seed=seed, rate=14.0)
        assert max(fleet.sent.values()) < 1.15 * min(fleet.sent.values())
