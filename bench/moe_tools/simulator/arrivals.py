"""Open and closed loops, tenants, sessions, and the shapes of arrival that break policies.

Pure and seeded. An open loop sends when it is due, whatever the answers do; in a closed loop each client waits for its
answer, thinks, and sends the next one.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np

from moe_tools.simulator.workload import SimRequest
from moe_tools.traces import TraceRequest, rebase


class ArrivalShape(StrEnum):
    """Process by which requests arrive."""

    TRACE = "trace"
    POISSON = "poisson"
    BURSTY = "bursty"
    SAWTOOTH = "sawtooth"
    BURST = "burst"


# Coefficient of variation of BurstGPT's gaps between arrivals is well above 1 (arXiv 2401.17644 fits Gamma
# distributions); a Gamma shape of 0.25 gives 2.
BURSTY_SHAPE = 0.25
# Requests of one tooth; within it the rate rises from 0 to twice the mean.
TOOTH_REQUESTS = 200


def arrange(trace: Sequence[TraceRequest], shape: ArrivalShape, rate: float, seed: int) -> tuple[TraceRequest, ...]:
    """The same requests in the same order, coming at `rate` a second on average.

    Args:
        trace: the requests, ordered.
        shape: `trace` keeps the proportions of the trace's own gaps; `burst` lets all come at once.
        rate: arrivals a second.
        seed: of the gaps.
    """
    gaps_s = _gaps(trace, shape, seed)
    total = float(gaps_s.sum())
    scale = 0.0 if total == 0 else (len(trace) - 1) / rate / total
    times = np.concatenate([[0.0], np.cumsum(gaps_s) * scale])
    return rebase(replace(row, arrival_s=float(time)) for row, time in zip(trace, times, strict=True))


def _gaps(trace: Sequence[TraceRequest], shape: ArrivalShape, seed: int) -> np.ndarray:
    count = len(trace) - 1
    random = np.random.default_rng(seed)
    match shape:
        case ArrivalShape.TRACE:
            return np.asarray(np.diff([row.arrival_s for row in trace]))
        case ArrivalShape.POISSON:
            return random.exponential(1.0, count)
        case ArrivalShape.BURSTY:
            return random.gamma(BURSTY_SHAPE, 1.0, count)
        case ArrivalShape.SAWTOOTH:
            # The n-th arrival of a rate that rises in a line comes at the root of n.
            place = np.arange(count) % TOOTH_REQUESTS
            return np.asarray(random.exponential(1.0, count) * (np.sqrt(place + 1) - np.sqrt(place)))
        case ArrivalShape.BURST:
            return np.zeros(count)


@dataclass(frozen=True, slots=True, kw_only=True)
class Senders:
    """Senders of the requests: tenants by weight, sessions, priorities, and the gateway that gets each request.

    Attributes:
        tenant_weights: share of the requests of each tenant.
        sessions: number of sessions that requests are drawn from; 0: none has a session.
        priorities: levels and their weights.
        gateways: each request comes to one of them.
        by_length: the priority of a request is the length of its prompt, instead of a drawn one.
    """

    tenant_weights: tuple[float, ...] = (1.0,)
    sessions: int = 0
    priorities: tuple[tuple[int, float], ...] = ((0, 1.0),)
    gateways: int = 1
    by_length: bool = False

    def sign(self, requests: Iterable[SimRequest], seed: int) -> list[SimRequest]:
        """Writes the senders into the requests."""
        signed = list(requests)
        # Another stream for each, so that more gateways do not change the tenants.
        streams = [np.random.default_rng([seed, number]) for number in range(4)]
        tenants = _draw(streams[0], self.tenant_weights, len(signed))
        levels = _draw(streams[1], [weight for _, weight in self.priorities], len(signed))
        sessions = streams[2].integers(0, max(1, self.sessions), len(signed))
        gateways = streams[3].integers(0, self.gateways, len(signed))
        for request, tenant, level, session, gateway in zip(signed, tenants, levels, sessions, gateways, strict=True):
            request.tenant, request.gateway = int(tenant), int(gateway)
            request.priority = request.prompt_tokens if self.by_length else self.priorities[int(level)][0]
            request.session = f"s{session}" if self.sessions else None
        return signed


def _draw(random: np.random.Generator, weights: Sequence[float], count: int) -> np.ndarray:
    shares = np.asarray(weights, dtype=float)
    return random.choice(len(shares), count, p=shares / shares.sum())


class OpenLoop:
    """All requests at their own times."""

    def __init__(self, requests: Iterable[SimRequest]) -> None:
        self._requests = list(requests)

    def first(self) -> list[SimRequest]:
        return self._requests

    def after(self, request: SimRequest, now_s: float) -> SimRequest | None:
        return None


class ClosedLoop:
    """`clients` clients, each with one request at a time; the requests are taken in their order.

    Args:
        requests: the first of them begin at 0 s.
        clients: how many are in flight.
        think_s: pause of a client between an answer and its next request.
    """

    def __init__(self, requests: Iterable[SimRequest], *, clients: int, think_s: float = 0.0) -> None:
        self._left = iter(list(requests))
        self._clients = clients
        self._think_s = think_s

    def first(self) -> list[SimRequest]:
        return [request for _ in range(self._clients) if (request := self._next(0.0)) is not None]

    def after(self, request: SimRequest, now_s: float) -> SimRequest | None:
        return self._next(now_s + self._think_s)

    def _next(self, time_s: float) -> SimRequest | None:
        request = next(self._left, None)
        if request is not None:
            request.arrival_s = time_s
        return request
