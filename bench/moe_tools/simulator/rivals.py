"""The rivals' choice of an engine, each as its authors publish it.

Each rival names the source of its rule, and how old its information is in its own system. All of them meet the same
requests, engines and network as the product's gateway. The product contains none of these rules. Three of them are pure
functions over `TargetState` (`rival_rules.py`); each rival keeps the state with what it would know in its own system.
"""

import math
import random
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Protocol

from moe_scheduling.engine.target_state import TargetState
from moe_scheduling.signals import EngineSignal, Target

from moe_tools.simulator.predicted_latency import PredictedLatency
from moe_tools.simulator.prefix_balancer import PrefixBalancer
from moe_tools.simulator.rival_rules import pick_as_gimbal, pick_as_vllm, pick_of_two
from moe_tools.simulator.router import Balancer, Router, Wire
from moe_tools.simulator.signals import SignalKind, SignalPlan
from moe_tools.simulator.workload import VLLM_BLOCK_TOKENS, SimRequest, prompt_bytes

NO_SIGNALS = SignalPlan(source=SignalKind.NONE, period_s=1.0, delay_s=0.0)


class _Maker(Protocol):
    def __call__(self, wire: Wire, targets: Sequence[Target], number: int, *, gateways: int, seed: int) -> Router: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RivalRouter:
    """A rival router, the signals that it gets, and its source.

    Attributes:
        make: makes the router of gateway number N.
        signals: source, period and delay of the signals in its own system.
        source: where its rule is published.
    """

    make: _Maker
    signals: SignalPlan
    source: str


class RoundRobin(Balancer):
    """Sends to each target in turn; gateways begin at different targets."""

    def __init__(self, wire: Wire, targets: Sequence[Target], number: int, *, gateways: int, seed: int) -> None:
        super().__init__(wire, targets)
        self._turn = number * len(targets) // gateways

    def choose(self, request: SimRequest, candidates: Sequence[Target], now_s: float) -> Target:
        chosen = candidates[self._turn % len(candidates)]
        self._turn += 1
        return chosen


class _AccountingBalancer(Balancer):
    """Base of the rules in `rival_rules.py`: keeps a `TargetState` for each target.

    The order of the candidates rotates by one with each request, from a different start at each gateway. Signals never
    become stale, and first tokens are not counted: a request counts until it has ended or a signal includes it.
    """

    def __init__(self, wire: Wire, targets: Sequence[Target], number: int, *, gateways: int, seed: int) -> None:
        super().__init__(wire, targets)
        self.target_states = {target: TargetState(target) for target in self.targets}
        self._start = number * len(targets) // gateways

    def in_turn(self, candidates: Sequence[Target]) -> list[TargetState]:
        """Returns their states in rotated order, the one whose turn it is first."""
        start = self._start % len(candidates)
        self._start += 1
        return [self.target_states[target] for target in (*candidates[start:], *candidates[:start])]

    def sent(self, request: SimRequest, target: Target, now_s: float) -> None:
        self.target_states[target].sent(request, request.prompt_tokens, now_s)

    def ended(self, request: SimRequest, target: Target, now_s: float) -> None:
        self.target_states[target].settled(request, now_s)


class VllmInternal(_AccountingBalancer):
    """vLLM 0.32's own data-parallel balancer, by `pick_as_vllm`.

    Statistics count from their arrival, as in vLLM: each choice counts as waiting until the next ones. vLLM counts a
    request that ended meanwhile until then, within 0.1 s; here it is dropped at its end.
    """

    def __init__(self, wire: Wire, targets: Sequence[Target], number: int, *, gateways: int, seed: int) -> None:
        super().__init__(wire, targets, number, gateways=gateways, seed=seed)
        for state in self.target_states.values():
            state.traffic_share = 1.0 / gateways

    def observe(self, target: Target, signal: EngineSignal, observed_s: float, now_s: float) -> None:
        self.target_states[target].observe(signal, now_s)

    def choose(self, request: SimRequest, candidates: Sequence[Target], now_s: float) -> Target:
        return pick_as_vllm(self.in_turn(candidates), now_s, math.inf).target


class PowerOfTwo(_AccountingBalancer):
    """Two engines drawn at random, the one with fewer requests in flight, by `pick_of_two`."""

    def __init__(self, wire: Wire, targets: Sequence[Target], number: int, *, gateways: int, seed: int) -> None:
        super().__init__(wire, targets, number, gateways=gateways, seed=seed)
        self._random = random.Random(f"{seed}/{number}")

    def choose(self, request: SimRequest, candidates: Sequence[Target], now_s: float) -> Target:
        # vllm-router draws at random, so the turn that the draw is made from is random.
        return pick_of_two(self.in_turn(candidates), self._random.getrandbits(64)).target


class ConsistentHash(Balancer):
    """A ring of 160 places an engine; a session's requests go to one engine (vllm-router 0.1.17, `consistent_hash`).

    Without a session the body is hashed; here its first 512 bytes stand for it, which keeps a conversation together as
    the session's header would.
    """

    _PLACES = 160

    def __init__(self, wire: Wire, targets: Sequence[Target], number: int, *, gateways: int, seed: int) -> None:
        super().__init__(wire, targets)
        self._ring = sorted(
            (_place(f"{target.server}/{target.rank}#{place}".encode()), target)
            for target in self.targets
            for place in range(self._PLACES)
        )

    def choose(self, request: SimRequest, candidates: Sequence[Target], now_s: float) -> Target:
        key = request.session.encode() if request.session else prompt_bytes(request)[:512]
        start = bisect_left(self._ring, (_place(key),))
        usable = set(candidates)
        return next(target for _, target in (*self._ring[start:], *self._ring[:start]) if target in usable)


def _place(key: bytes) -> int:
    return int.from_bytes(blake2b(key, digest_size=8).digest())


class CacheAware(PrefixBalancer):
    """vllm-router 0.1.17's `cache_aware`, which is SGLang's, with its documented defaults.

    When the fleet is unbalanced, `max - min > 64 and max > 1.5 * min` requests in flight, the engine with the fewest;
    else the one that holds the longest part of the prompt, if that is more than 0.3; else the one with the smallest
    tree.
    """

    _THRESHOLD, _ABSOLUTE, _RELATIVE = 0.3, 64, 1.5

    def __init__(self, wire: Wire, targets: Sequence[Target], number: int, *, gateways: int, seed: int) -> None:
        super().__init__(wire, targets, number, gateways=gateways, seed=seed)
        self._tree_tokens = dict.fromkeys(self.targets, 0)

    def choose(self, request: SimRequest, candidates: Sequence[Target], now_s: float) -> Target:
        loads = [self.in_flight[target] for target in candidates]
        if max(loads) - min(loads) > self._ABSOLUTE and max(loads) > self._RELATIVE * min(loads):
            return candidates[loads.index(min(loads))]
        held = self.held_shares(request)
        best = max(candidates, key=lambda target: held.get(target, 0.0))
        if held.get(best, 0.0) > self._THRESHOLD:
            return best
        return min(candidates, key=self._tree_tokens.__getitem__)

    def sent(self, request: SimRequest, target: Target, now_s: float) -> None:
        held = self.held_shares(request).get(target, 0.0)
        self._tree_tokens[target] += round(request.prompt_tokens * (1.0 - held))
        super().sent(request, target, now_s)


class Gimbal(_AccountingBalancer):
    """The threshold cascade of Gimbal's DPLB module (arXiv 2602.21626), by `pick_as_gimbal`.

    Its load is "running tokens", which the paper does not define: here the prompt tokens of all requests in flight. So
    only the KV use of a signal is taken, dated before all requests, which then count until they end.
    """

    def __init__(self, wire: Wire, targets: Sequence[Target], number: int, *, gateways: int, seed: int) -> None:
        super().__init__(wire, targets, number, gateways=gateways, seed=seed)
        self._last: dict[str, Target] = {}

    def observe(self, target: Target, signal: EngineSignal, observed_s: float, now_s: float) -> None:
        self.target_states[target].observe(EngineSignal(kv_usage=signal.kv_usage), -math.inf)

    def choose(self, request: SimRequest, candidates: Sequence[Target], now_s: float) -> Target:
        last = self._last.get(request.session) if request.session else None
        state, _ = pick_as_gimbal(self.in_turn(candidates), last, now_s, math.inf)
        return state.target

    def sent(self, request: SimRequest, target: Target, now_s: float) -> None:
        super().sent(request, target, now_s)
        if request.session:
            self._last[request.session] = target


class LlmD(PrefixBalancer):
    """llm-d's endpoint picker with its default scorers: queue, KV use and prefix, weighted 2, 2 and 3, the most wins.

    Queue: (longest - own) / (longest - shortest) of the waiting; KV: 1 - use; prefix: the part of the prompt held.
    Source: gateway-api-inference-extension, scorer plug-ins; llm-d 0.8, default profile. Ties are drawn.
    """

    _QUEUE, _KV, _PREFIX = 2.0, 2.0, 3.0

    def choose(self, request: SimRequest, candidates: Sequence[Target], now_s: float) -> Target:
        held = self.held_shares(request)
        queues = [self.signals[target].waiting for target in candidates]
        longest, shortest = max(queues), min(queues)
        scores = [
            self._QUEUE * ((longest - queue) / (longest - shortest) if longest > shortest else 1.0)
            + self._KV * (1.0 - self.signals[target].kv_usage)
            + self._PREFIX * held.get(target, 0.0)
            for target, queue in zip(candidates, queues, strict=True)
        ]
        best = max(scores)
        return self.random.choice([target for target, score in zip(candidates, scores, strict=True) if score == best])


class Dynamo(PrefixBalancer):
    """NVIDIA Dynamo's KV router with its defaults: the least of `prefill blocks + decode blocks`, the new one in.

    Prefill blocks are the uncached prompt blocks of what has not answered, decode blocks all blocks of what has not
    ended. Source: Dynamo's documentation, "Routing Concepts" (overlap weight 1, temperature 0). Ties are drawn.
    """

    def __init__(self, wire: Wire, targets: Sequence[Target], number: int, *, gateways: int, seed: int) -> None:
        super().__init__(wire, targets, number, gateways=gateways, seed=seed)
        self._prefill = dict.fromkeys(self.targets, 0.0)
        self._decode = dict.fromkeys(self.targets, 0.0)
        self._sizes: dict[SimRequest, tuple[Target, float, float]] = {}

    def choose(self, request: SimRequest, candidates: Sequence[Target], now_s: float) -> Target:
        held = self.held_shares(request)
        blocks = request.prompt_tokens / VLLM_BLOCK_TOKENS
        costs = [
            self._prefill[target] + blocks * (1.0 - held.get(target, 0.0)) + self._decode[target] + blocks
            for target in candidates
        ]
        least = min(costs)
        return self.random.choice([target for target, cost in zip(candidates, costs, strict=True) if cost == least])

    def sent(self, request: SimRequest, target: Target, now_s: float) -> None:
        blocks = request.prompt_tokens / VLLM_BLOCK_TOKENS
        prefill = blocks * (1.0 - self.held_shares(request).get(target, 0.0))
        self._prefill[target] += prefill
        self._decode[target] += blocks
        self._sizes[request] = (target, prefill, blocks)
        super().sent(request, target, now_s)

    def answered(self, request: SimRequest, now_s: float) -> None:
        target, prefill, blocks = self._sizes[request]
        self._prefill[target] -= prefill
        self._sizes[request] = (target, 0.0, blocks)

    def ended(self, request: SimRequest, target: Target, now_s: float) -> None:
        _, prefill, blocks = self._sizes.pop(request)
        self._prefill[target] -= prefill
        self._decode[target] -= blocks
        super().ended(request, target, now_s)


# vLLM's coordinator publishes at most each 100 ms (`v1/engine/coordinator.py`).
_COORDINATOR = SignalPlan(source=SignalKind.SCRAPE, period_s=0.1, delay_s=0.001)
# llm-d scrapes each engine each 50 ms.
_ENDPOINT_PICKER = SignalPlan(source=SignalKind.SCRAPE, period_s=0.05, delay_s=0.005)


def _rivals() -> Iterator[tuple[str, RivalRouter]]:
    router = "vllm-router 0.1.17"
    yield "roundRobin", RivalRouter(make=RoundRobin, signals=NO_SIGNALS, source=f"{router}, `round_robin`")
    yield "powerOfTwo", RivalRouter(make=PowerOfTwo, signals=NO_SIGNALS, source=f"{router}, `power_of_two`")
    yield "consistentHash", RivalRouter(make=ConsistentHash, signals=NO_SIGNALS, source=f"{router}, `consistent_hash`")
    yield "cacheAware", RivalRouter(make=CacheAware, signals=NO_SIGNALS, source=f"{router}, `cache_aware`")
    yield (
        "vllmInternal",
        RivalRouter(make=VllmInternal, signals=_COORDINATOR, source="vLLM 0.32, data-parallel balancer"),
    )
    yield "gimbal", RivalRouter(make=Gimbal, signals=_COORDINATOR, source="arXiv 2602.21626, reconstructed")
    yield "llmD", RivalRouter(make=LlmD, signals=_ENDPOINT_PICKER, source="llm-d 0.8, default scorers")
    yield (
        "predictedLatency",
        RivalRouter(
            make=PredictedLatency,
            signals=_ENDPOINT_PICKER,
            source="llm-d, latency predictor, reconstructed: a linear model in place of XGBoost",
        ),
    )
    yield "dynamo", RivalRouter(make=Dynamo, signals=NO_SIGNALS, source="NVIDIA Dynamo, KV router, defaults")


RIVALS: Mapping[str, RivalRouter] = dict(_rivals())
