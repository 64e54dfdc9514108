"""Engines that schedule a step while the one before runs, in virtual time: following their steps gives sooner answers.

The choice and the states are the product's; signals come each 100 ms, 3 ms after they were written.
"""

import heapq
import itertools
import random
from collections import deque
from dataclasses import dataclass, field
from statistics import mean

import pytest
from moe_scheduling.engine.choice import EngineSettings, Job, choose_target
from moe_scheduling.engine.target_state import TargetState
from moe_scheduling.signals import EngineSignal, StepTime, Target

PROMPT = StepTime(base_s=0.04, prefill_s=5e-6, decode_s=0.0)
LINE = StepTime(base_s=0.01, prefill_s=1e-5, decode_s=0.0)
STEP_TOKENS, PERIOD_S, DELAY_S = 8192, 0.1, 0.003
ENGINES, REQUESTS, RATE = 4, 600, 270.0
SETTINGS = EngineSettings()


@dataclass
class Request:
    left: int
    gateway: int
    key: int
    arrived_s: float


@dataclass
class Step:
    tokens: int
    answers: list[Request]

    @property
    def lasts_s(self):
        return PROMPT.base_s + PROMPT.prefill_s * self.tokens


@dataclass
class Engine:
    """Computes prompts in the order of arrival; a step is scheduled when the one before it begins."""

    waiting: deque = field(default_factory=deque)
    steps: deque = field(default_factory=deque)
    ends_s: float = 0.0

    def schedule(self, now_s):
        """Fills up to two steps; returns whether one of them begins now."""
        was_idle = not self.steps
        while self.waiting and len(self.steps) < 2:
            self.steps.append(self._next_step())
        if was_idle and self.steps:
            self.ends_s = now_s + self.steps[0].lasts_s
        return was_idle and bool(self.steps)

    def _next_step(self):
        room, answers = STEP_TOKENS, []
        while self.waiting and room:
            request = self.waiting[0]
            tokens = min(room, request.left)
            request.left -= tokens
            room -= tokens
            if not request.left:
                answers.append(self.waiting.popleft())
        return Step(STEP_TOKENS - room, answers)

    def signal(self, now_s, *, follows):
        scheduled = sum(step.tokens for step in self.steps)
        busy_s = self.ends_s - now_s + sum(step.lasts_s for step in [*self.steps][1:]) if self.steps else 0.0
        return EngineSignal(
            step=10_000,
            waiting_prefill_tokens=sum(request.left for request in self.waiting),
            running_prefill_tokens=scheduled,
            scheduled_prefill_tokens=scheduled,
            busy_s=busy_s,
            step_tokens=STEP_TOKENS if follows else 0,
            step_time=PROMPT if follows else LINE,
        )


class Fleet:
    """Serves requests that arrive at random gateways; `ttft_s` has their times to first token."""

    def __init__(self, seed, *, gateways, follows):
        self._random, self._numbers, self._events = random.Random(seed), itertools.count(), []
        self._engines, self._follows, self.ttft_s = [Engine() for _ in range(ENGINES)], follows, []
        self._states = [[TargetState(Target("e", number)) for number in range(ENGINES)] for _ in range(gateways)]
        for state in itertools.chain(*self._states):
            state.traffic_share = 1.0 / gateways
        for number in range(ENGINES):
            self._at(self._random.uniform(0.0, PERIOD_S), self._publish, number)
        for arrival_s in itertools.accumulate(self._random.expovariate(RATE) for _ in range(REQUESTS)):
            self._at(arrival_s, self._arrive)
        while self._events:
            now_s, _, act, arguments = heapq.heappop(self._events)
            act(now_s, *arguments)

    def _at(self, time_s, act, *arguments):
        heapq.heappush(self._events, (time_s, next(self._numbers), act, arguments))

    def _arrive(self, now_s):
        gateway = self._random.randrange(len(self._states))
        tokens = min(8000, int(self._random.lognormvariate(6.8, 1.0)) + 1)
        states, key = self._states[gateway], next(self._numbers)
        number = choose_target(Job(tokens), states, SETTINGS, turn=key, now_s=now_s).target.rank
        states[number].sent(key, tokens, now_s)
        self._engines[number].waiting.append(Request(tokens, gateway, key, now_s))
        self._go_on(number, now_s)

    def _go_on(self, number, now_s):
        if self._engines[number].schedule(now_s):
            self._at(self._engines[number].ends_s, self._end, number)

    def _end(self, now_s, number):
        engine = self._engines[number]
        answers = engine.steps.popleft().answers
        if engine.steps:
            engine.ends_s = now_s + engine.steps[0].lasts_s
            self._at(engine.ends_s, self._end, number)
        self._go_on(number, now_s)
        for request in answers:
            self.ttft_s.append(now_s - request.arrived_s)
            state = self._states[request.gateway][number]
            state.first_token(request.key, now_s)
            state.steps.step_ended(now_s)
            state.settled(request.key, now_s)

    def _publish(self, now_s, number):
        signal = self._engines[number].signal(now_s, follows=self._follows)
        self._at(now_s + DELAY_S, self._deliver, number, signal, now_s)
        if len(self.ttft_s) < REQUESTS:
            self._at(now_s + PERIOD_S, self._publish, number)

    def _deliver(self, _now_s, number, signal, observed_s):
        for states in self._states:
            states[number].observe(signal, observed_s)


def mean_ttft_s(*, gateways, follows):
    return mean(mean(Fleet(seed, gateways=gateways, follows=follows).ttft_s) for seed in range(5))


@pytest.mark.parametrize(("gateways", "most"), [(1, 0.94), (2, 0.98)])
def test_answers_come_sooner_than_by_the_queue_of_the_last_signal(gateways, most):
    followed, by_queue = (mean_ttft_s(gateways=gateways, follows=follows) for follows in (True, False))
    assert followed < most * by_queue
