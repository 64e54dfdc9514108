"""Several gateways with target states of their own share the engines nearly as well as one gateway that knows all.

Engines, requests and signals are in virtual time; the choice, the target states and the share are the product's.
"""

import heapq
import itertools
import math
import random
from collections import Counter
from dataclasses import dataclass, field
from statistics import mean

import pytest
from moe_scheduling.engine.choice import EngineSettings, Job, choose_target
from moe_scheduling.engine.target_state import TargetState
from moe_scheduling.engine.traffic_share import TrafficShare
from moe_scheduling.signals import EngineSignal, StepTime, Target

STEP_TIME = StepTime(base_s=0.01, prefill_s=0.0001, decode_s=0.0002)
STEP_TOKENS = 2048
NETWORK_S = 0.003
SETTINGS = EngineSettings()
# As an agent tells, at each step; and as of a source that tells once a second.
FRESH, AGED = 0.0, 1.0


@dataclass(kw_only=True)
class Request:
    tokens: int
    outputs: int
    sent_s: float = 0.0
    left: int = 0
    gateway: "Gateway | None" = None


@dataclass
class Engine:
    """Prefills in the order of arrival, at most `STEP_TOKENS` a step, beside one token of each that decodes."""

    target: Target
    prefilling: list[Request] = field(default_factory=list)
    decoding: list[Request] = field(default_factory=list)
    busy: bool = False
    signalled_s: float = -math.inf

    def signal(self) -> EngineSignal:
        return EngineSignal(
            running=len(self.decoding),
            waiting=len(self.prefilling),
            waiting_prefill_tokens=sum(request.left for request in self.prefilling),
            decode_tokens=len(self.decoding),
            step_time=STEP_TIME,
        )


class Gateway:
    def __init__(self, targets, first_turn, *, shares_traffic):
        self.target_states = [TargetState(target) for target in targets]
        for state in self.target_states:
            state.observe(EngineSignal(step_time=STEP_TIME), 0.0)
        self.traffic_share = TrafficShare() if shares_traffic else None
        self.turn = first_turn
        self.ticked_s = 0.0

    def send(self, request, now_s):
        if self.traffic_share is not None and now_s - self.ticked_s >= 0.1:
            self.ticked_s = now_s
            share = self.traffic_share.observe(self.target_states, now_s, SETTINGS.stale_after_s)
            for state in self.target_states:
                state.traffic_share = share
        self.turn += 1
        decision = choose_target(Job(request.tokens), self.target_states, SETTINGS, turn=self.turn, now_s=now_s)
        self.of(decision.target).sent(id(request), request.tokens, now_s)
        return decision.target

    def of(self, target):
        return next(state for state in self.target_states if state.target == target)


class Fleet:
    """Serves a number of requests, which arrive at random gateways."""

    def __init__(self, gateways, engines, *, rate, requests, period_s, seed, shares_traffic=True):
        self.random = random.Random(seed)
        targets = [Target(f"engine-{number}") for number in range(engines)]
        self.engines = {target: Engine(target) for target in targets}
        self.gateways = [
            Gateway(targets, self.random.randrange(1000), shares_traffic=shares_traffic) for _ in range(gateways)
        ]
        self.period_s = period_s
        self.ttft_s, self.spread_tokens, self.sent = [], [], Counter()
        self._events, self._numbers = [], itertools.count()
        at_s = 0.0
        for _ in range(requests):
            at_s += self.random.expovariate(rate)
            request = Request(
                tokens=int(self.random.lognormvariate(6.5, 1.2)) + 1, outputs=self.random.randint(20, 200)
            )
            self._at(at_s, self._arrive, request)
        while self._events:
            now_s, _, act, subject = heapq.heappop(self._events)
            act(subject, now_s)

    def _at(self, at_s, act, subject):
        heapq.heappush(self._events, (at_s, next(self._numbers), act, subject))

    def _arrive(self, request, now_s):
        request.sent_s, request.left, request.gateway = now_s, request.tokens, self.random.choice(self.gateways)
        target = request.gateway.send(request, now_s)
        self.sent[target] += request.tokens
        backlogs = [sum(waiting.left for waiting in engine.prefilling) for engine in self.engines.values()]
        self.spread_tokens.append(max(backlogs) - min(backlogs))
        self._at(now_s + NETWORK_S, self._enter, (self.engines[target], request))

    def _enter(self, entering, now_s):
        engine, request = entering
        engine.prefilling.append(request)
        self._begin_step(engine, now_s)

    def _begin_step(self, engine, now_s):
        if engine.busy or not (engine.prefilling or engine.decoding):
            return
        engine.busy, budget, parts = True, STEP_TOKENS, []
        for request in engine.prefilling:
            parts.append((request, min(budget, request.left)))
            budget -= parts[-1][1]
            if not budget:
                break
        length_s = (
            STEP_TIME.base_s + STEP_TIME.prefill_s * (STEP_TOKENS - budget) + STEP_TIME.decode_s * len(engine.decoding)
        )
        self._at(now_s + length_s, self._end_step, (engine, parts))

    def _end_step(self, ending, now_s):
        engine, parts = ending
        engine.busy = False
        for request in engine.decoding:
            request.outputs -= 1
            if not request.outputs:
                self._at(now_s + NETWORK_S, self._settle, (engine, request))
        engine.decoding = [request for request in engine.decoding if request.outputs]
        for request, tokens in parts:
            request.left -= tokens
            if not request.left:
                engine.prefilling.remove(request)
                engine.decoding.append(request)
                self._at(now_s + NETWORK_S, self._answer, (engine, request))
        if now_s - engine.signalled_s >= self.period_s:
            engine.signalled_s = now_s
            self._at(now_s + 4 * NETWORK_S, self._signal, (engine, engine.signal(), now_s))
        self._begin_step(engine, now_s)

    def _signal(self, signalled, _now_s):
        engine, signal, observed_s = signalled
        for gateway in self.gateways:
            gateway.of(engine.target).observe(signal, observed_s)

    def _answer(self, answering, now_s):
        engine, request = answering
        self.ttft_s.append(now_s - request.sent_s)
        request.gateway.of(engine.target).first_token(id(request), now_s)

    def _settle(self, settling, now_s):
        engine, request = settling
        request.gateway.of(engine.target).settled(id(request), now_s)


def runs(gateways, *, seeds=3, engines=4, rate=20.0, requests=700, period_s=FRESH, shares_traffic=True):
    options = {"rate": rate, "requests": requests, "period_s": period_s, "shares_traffic": shares_traffic}
    return [Fleet(gateways, engines, seed=seed, **options) for seed in range(seeds)]


def mean_ttft_s(fleets):
    return mean(mean(fleet.ttft_s) for fleet in fleets)


@pytest.fixture(scope="module")
def alone():
    """Mean time to first token behind one gateway, by the period of the signals."""
    return {period_s: mean_ttft_s(runs(1, period_s=period_s)) for period_s in (FRESH, AGED)}


@pytest.mark.parametrize("gateways", [2, 4])
def test_with_signals_of_each_step_several_gateways_are_nearly_as_good_as_one(alone, gateways):
    assert mean_ttft_s(runs(gateways)) < 1.15 * alone[FRESH]


@pytest.mark.parametrize("gateways", [2, 4])
def test_where_signals_are_rare_to_know_of_the_others_saves_a_quarter_of_what_they_cost(alone, gateways):
    known = mean_ttft_s(runs(gateways, period_s=AGED)) / alone[AGED] - 1.0
    unknown = mean_ttft_s(runs(gateways, period_s=AGED, shares_traffic=False)) / alone[AGED] - 1.0
    assert known < 0.75 * unknown


def test_the_engines_get_even_parts_of_the_work():
    for fleet in runs(2, requests=1500):
        assert max(fleet.sent.values()) < 1.1 * min(fleet.sent.values())


def test_gateways_that_begin_at_the_same_moment_do_not_choose_the_same_engine():
    """No signal has come since the first requests, and all engines are alike."""
    targets = [Target(f"engine-{number}") for number in range(4)]
    gateways = [Gateway(targets, first_turn, shares_traffic=True) for first_turn in range(4)]
    request = Request(tokens=1000, outputs=1)
    assert {gateway.send(request, 0.01) for gateway in gateways} == set(targets)


def test_one_gateway_is_not_mistaken_for_several():
    for fleet in runs(1, requests=1500):
        assert fleet.gateways[0].target_states[0].traffic_share > 0.8


@pytest.mark.parametrize("gateways", [2, 4])
def test_the_own_share_is_found_from_what_engines_say(gateways):
    shares = [
        gateway.target_states[0].traffic_share for fleet in runs(gateways, requests=1500) for gateway in fleet.gateways
    ]
    assert mean(shares) == pytest.approx(1 / gateways, rel=0.3)
