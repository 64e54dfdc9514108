"""Open and closed loops, conversations, tenants, sessions, and the shapes of arrival that break policies.

Pure and seeded. An open loop sends when it is due, whatever the answers do; in a closed loop each client waits for its
answer, thinks, and sends the next one. Conversations begin as in an open loop and go on as in a closed one.
"""

from collections import deque
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
    ON_OFF = "onOff"


# Coefficient of variation of BurstGPT's gaps between arrivals is well above 1 (arXiv 2401.17644 fits Gamma
# distributions); a Gamma shape of 0.25 gives 2.
BURSTY_SHAPE = 0.25
# Requests of one tooth; within it the rate rises from 0 to twice the mean.
TOOTH_REQUESTS = 200
# Requests of a burst of `onOff`, in the mean, and the rate within it over the mean rate (assumed).
ON_OFF_REQUESTS = 40
ON_OFF_PEAK = 5.0


def arrange(trace: Sequence[TraceRequest], shape: ArrivalShape, rate: float, seed: int) -> tuple[TraceRequest, ...]:
    """The same requests in the same order, coming at `rate` a second on average.

    Of a conversation the first request has a time of its own, which the others share: they come when the answers are
    there (`ConversationLoop`). As many a second begin as bring `rate` requests.

    Args:
        trace: the requests, ordered.
        shape: `trace` keeps the proportions of the trace's own gaps; `burst` lets all come at once; `onOff` has bursts
            of random lengths, and nothing between them.
        rate: arrivals a second.
        seed: of the gaps.
    """
    begins, places = _find_begins(trace)
    gaps_s = _gaps(begins, shape, seed)
    total = float(gaps_s.sum())
    scale = 0.0 if total == 0 else (len(trace) - 1) / rate / total
    times = np.concatenate([[0.0], np.cumsum(gaps_s) * scale])
    return rebase(replace(row, arrival_s=float(times[place])) for row, place in zip(trace, places, strict=True))


def _find_begins(trace: Sequence[TraceRequest]) -> tuple[list[TraceRequest], list[int]]:
    """The requests that have a time of their own, and for each request of the trace the place of its own among them."""
    begins: list[TraceRequest] = []
    places: list[int] = []
    begun: dict[str, int] = {}
    for row in trace:
        place = begun.get(row.conversation) if row.conversation else None
        if place is None:
            place = begun[row.conversation] = len(begins)
            begins.append(row)
        places.append(place)
    return begins, places


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
        case ArrivalShape.ON_OFF:
            # A burst ends after each request with the same probability; the pause brings the mean gap to 1.
            ends = random.random(count) < 1.0 / ON_OFF_REQUESTS
            pauses = random.exponential(ON_OFF_REQUESTS * (1.0 - 1.0 / ON_OFF_PEAK), count)
            return np.asarray(random.exponential(1.0 / ON_OFF_PEAK, count) + ends * pauses)


@dataclass(frozen=True, slots=True, kw_only=True)
class Senders:
    """Senders of the requests: tenants by weight, sessions, priorities, and the gateway that gets each request.

    Attributes:
        tenant_weights: share of the requests of each tenant; of one tenant alone: those of the trace stay.
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
            request.gateway = int(gateway)
            if len(self.tenant_weights) > 1:
                request.tenant = int(tenant)
            request.priority = request.prompt_tokens if self.by_length else self.priorities[int(level)][0]
            request.session = f"s{session}" if self.sessions else None
        return signed


def _draw(random: np.random.Generator, weights: Sequence[float], count: int) -> np.ndarray:
    shares = np.asarray(weights, dtype=float)
    return random.choice(len(shares), count, p=shares / shares.sum())


class ConversationLoop:
    """Conversations whose next request comes a think time after the answer; all others come at their own times.

    Args:
        requests: those of a conversation in their order, with its begin as the time of the first.
    """

    def __init__(self, requests: Iterable[SimRequest]) -> None:
        self._first: list[SimRequest] = []
        self._following: dict[str, deque[SimRequest]] = {}
        for request in requests:
            if request.conversation in self._following:
                self._following[request.conversation].append(request)
            else:
                self._first.append(request)
                if request.conversation:
                    self._following[request.conversation] = deque()

    def first(self) -> list[SimRequest]:
        return self._first

    def after(self, request: SimRequest, now_s: float) -> SimRequest | None:
        following = self._following.get(request.conversation)
        if not following:
            return None
        following[0].arrival_s = now_s + following[0].think_s
        return following.popleft()


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
