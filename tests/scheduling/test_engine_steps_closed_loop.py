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
SETTINGS = EngineSettings()


@dataclass
class Engine:
    """Computes prompts in the order of arrival; a step is scheduled when the one before it begins."""

    target: Target
    waiting: deque = field(default_factory=deque)
    steps: deque = field(default_factory=deque)

    def schedule(self, now_s):
        """Fills up to two steps; returns when the running one ends, if it begins now."""
        began = not self.steps
        while self.waiting and len(self.steps) < 2:
            part, room = [], STEP_TOKENS
            while self.waiting and room:
                request = self.waiting[0]
                tokens = min(room, request[0])
                request[0] -= tokens
                room -= tokens
                if request[0] == 0:
                    part.append(self.waiting.popleft())
            tokens = STEP_TOKENS - room
            self.steps.append([PROMPT.base_s + PROMPT.prefill_s * tokens, tokens, part])
        return now_s + self.steps[0][0] if began and self.steps else None

    def signal(self, ends_s, now_s, follows):
        scheduled = sum(step[1] for step in self.steps)
        busy_s = ends_s - now_s + sum(step[0] for step in itertools.islice(self.steps, 1, None)) if self.steps else 0.0
        return EngineSignal(
            step=10_000,
            waiting_prefill_tokens=sum(request[0] for request in self.waiting),
            running_prefill_tokens=scheduled,
            scheduled_prefill_tokens=scheduled,
            busy_s=busy_s,
            step_tokens=STEP_TOKENS,
            step_time=LINE,
            prompt_step_time=PROMPT if follows else None,
        )


def mean_ttft_s(seed, *, gateways, follows, engines=4, requests=600, rate=270.0):
    dice, order, events = random.Random(seed), itertools.count(), []
    fleet = [Engine(Target(f"e{number}")) for number in range(engines)]
    states = [[TargetState(engine.target) for engine in fleet] for _ in range(gateways)]
    for own in states:
        for state in own:
            state.traffic_share = 1.0 / gateways
    ends_s, ttft_s, turn = {}, [], itertools.count()

    def at(time_s, act, *arguments):
        heapq.heappush(events, (time_s, next(order), act, arguments))

    def go_on(number, now_s):
        if (end_s := fleet[number].schedule(now_s)) is not None:
            ends_s[number] = end_s
            at(end_s, end, number)

    def arrive(now_s):
        gateway, tokens = dice.randrange(gateways), min(8000, int(dice.lognormvariate(6.8, 1.0)) + 1)
        decision = choose_target(Job(tokens), states[gateway], SETTINGS, turn=next(turn), now_s=now_s)
        number = next(number for number, engine in enumerate(fleet) if engine.target == decision.target)
        key = next(order)
        states[gateway][number].sent(key, tokens, now_s)
        fleet[number].waiting.append([tokens, gateway, key, now_s])
        go_on(number, now_s)

    def end(now_s, number):
        _, _, part = fleet[number].steps.popleft()
        if fleet[number].steps:
            ends_s[number] = now_s + fleet[number].steps[0][0]
            at(ends_s[number], end, number)
        go_on(number, now_s)
        for _, gateway, key, arrived_s in part:
            ttft_s.append(now_s - arrived_s)
            states[gateway][number].first_token(key, now_s)
            states[gateway][number].steps.step_ended(now_s)
            states[gateway][number].settled(key, now_s)

    def publish(now_s, number):
        at(now_s + DELAY_S, deliver, number, fleet[number].signal(ends_s.get(number, now_s), now_s, follows), now_s)
        if len(ttft_s) < requests:
            at(now_s + PERIOD_S, publish, number)

    def deliver(now_s, number, signal, observed_s):
        for own in states:
            own[number].observe(signal, observed_s)

    for number in range(engines):
        at(dice.uniform(0.0, PERIOD_S), publish, number)
    for arrival_s in itertools.accumulate(dice.expovariate(rate) for _ in range(requests)):
        at(arrival_s, arrive)
    while events:
        now_s, _, act, arguments = heapq.heappop(events)
        act(now_s, *arguments)
    assert len(ttft_s) == requests
    return mean(ttft_s)


@pytest.mark.parametrize(("gateways", "most"), [(1, 0.94), (2, 0.98)])
def test_answers_come_sooner_than_by_the_queue_of_the_last_signal(gateways, most):
    seeds = range(5)
    followed = [mean_ttft_s(seed, gateways=gateways, follows=True) for seed in seeds]
    by_queue = [mean_ttft_s(seed, gateways=gateways, follows=False) for seed in seeds]
    assert mean(followed) < most * mean(by_queue)
