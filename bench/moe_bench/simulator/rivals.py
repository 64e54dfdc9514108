"""The rivals' choice of an engine, each as its makers publish it; none of it is used by the product.

Each rival says where its rule comes from, and how fresh what it knows is in its own system. All of them meet the same
requests, engines and network as the product's gateway.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from moe_scheduling.signals import EngineSignal, Target

from moe_bench.simulator.router import Balancer, Router, Wire
from moe_bench.simulator.signals import SignalPlan, SignalSource
from moe_bench.simulator.workload import SimRequest

NO_SIGNALS = SignalPlan(source=SignalSource.NONE, period_s=1.0, delay_s=0.0)


class _Maker(Protocol):
    def __call__(self, wire: Wire, targets: Sequence[Target], number: int, *, gateways: int, seed: int) -> Router: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Rival:
    """How one is made, and what it knows.

    Attributes:
        make: makes the router of gateway number N.
        signals: as its own system has them.
        source: where its rule is published.
    """

    make: _Maker
    signals: SignalPlan
    source: str


class RoundRobin(Balancer):
    """Each in turn; gateways begin at different places."""

    def __init__(self, wire: Wire, targets: Sequence[Target], number: int, *, gateways: int, seed: int) -> None:
        super().__init__(wire, targets)
        self._turn = number * len(targets) // gateways

    def choose(self, request: SimRequest, candidates: Sequence[Target], now_s: float) -> Target:
        chosen = candidates[self._turn % len(candidates)]
        self._turn += 1
        return chosen


class VllmInternal(Balancer):
    """vLLM 0.32's own data-parallel balancer (`DPLBAsyncMPClient.get_core_engine_for_request`).

    `score = max(clients * own in flight, waiting + running)`, and where requests wait,
    `+ 6 * waiting * max(0, kv - 0.5)`; the least wins; the scan begins one further each time; each choice counts as
    waiting until the next statistics.
    """

    def __init__(self, wire: Wire, targets: Sequence[Target], number: int, *, gateways: int, seed: int) -> None:
        super().__init__(wire, targets)
        self._clients = gateways
        self._start = len(targets) * number // gateways
        self._waiting = dict.fromkeys(self.targets, 0)

    def observe(self, target: Target, signal: EngineSignal, observed_s: float, now_s: float) -> None:
        super().observe(target, signal, observed_s, now_s)
        self._waiting[target] = signal.waiting

    def choose(self, request: SimRequest, candidates: Sequence[Target], now_s: float) -> Target:
        start = self._start % len(candidates)
        self._start += 1
        chosen = min((*candidates[start:], *candidates[:start]), key=self._score)
        self._waiting[chosen] += self._clients
        return chosen

    def _score(self, target: Target) -> float:
        signal, waiting = self.signals[target], self._waiting[target]
        score: float = max(self._clients * self.in_flight[target], waiting + signal.running)
        return score + waiting * 6.0 * max(0.0, signal.kv_usage - 0.5) if waiting else score


RIVALS: dict[str, Rival] = {
    "roundRobin": Rival(make=RoundRobin, signals=NO_SIGNALS, source="vllm-router 0.1.17, `round_robin`"),
    "vllmInternal": Rival(
        make=VllmInternal,
        # The coordinator publishes at most each 100 ms (`v1/engine/coordinator.py`).
        signals=SignalPlan(source=SignalSource.SCRAPE, period_s=0.1, delay_s=0.001),
        source="vLLM 0.32, data-parallel balancer",
    ),
}
