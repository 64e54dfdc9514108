"""Counts of the gateway: plain numbers that are raised with each request and rendered by the admin port."""

from bisect import bisect_left
from collections import Counter

from moe_scheduling.signals import Target

from moe_gateway.bounded_latencies import BoundedLatencies
from moe_gateway.recent import RecentDemand

TTFT_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
ERROR_BUCKETS_S = (-10.0, -2.5, -1.0, -0.25, -0.1, -0.025, 0.0, 0.025, 0.1, 0.25, 1.0, 2.5, 10.0)


class Histogram:
    """A histogram of Prometheus: counts by upper bound, and the sum of all values."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Counts one value in its bucket and in the sum."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def buckets(self) -> list[tuple[str, int]]:
        """Pairs of an upper bound and the number of values up to it, as Prometheus renders them."""
        rows, below = [], 0
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self.counts, strict=True):
            below += count
            rows.append((bound, below))
        return rows


class PredictionStats:
    """Predicted and measured seconds from dispatch to the first token. Written by `TargetStates`.

    Attributes:
        error: predicted less measured seconds.
        ratios: by target, how often the two were compared, and the sum of measured / predicted.
    """

    def __init__(self) -> None:
        self.error = Histogram(ERROR_BUCKETS_S)
        self.ratios: dict[Target, tuple[int, float]] = {}

    def compare(self, target: Target, predicted_s: float, measured_s: float) -> None:
        """A first token came `measured_s` after the dispatch."""
        self.error.observe(predicted_s - measured_s)
        if predicted_s > 0.0:
            count, total = self.ratios.get(target, (0, 0.0))
            self.ratios[target] = count + 1, total + measured_s / predicted_s

    def forget(self, target: Target) -> None:
        """The target is known no more."""
        self.ratios.pop(target, None)


class RequestStats:
    """Requests of clients; one for a gateway. Each request is finished once, by what answered it.

    Attributes:
        requests: finished requests by (route, status), a stream that ended with an error by the status of the error.
        refusals: requests that ended without an engine's whole answer, by outcome label.
        retried: attempts after the first.
        continuations: streams that went on at another engine, by way; `none` where one that could ended with an error.
        failed: requests that ended in an error of an engine or of the gateway (status 500 and up, or a broken stream).
        finished: all finished requests.
        arrivals: requests that an engine has to compute for, when they arrive.
        prompt_tokens: estimated prompt tokens of those.
        ttft: seconds from arrival at the gateway to the first token of a stream.
        recent: arrivals, prompt tokens and TTFT of the last half minute.
        bounded: latencies of the last minutes that have a bound.
    """

    def __init__(self, started_s: float = 0.0) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()
        self.refusals: Counter[str] = Counter()
        self.retried = 0
        self.continuations: Counter[str] = Counter()
        self.failed = 0
        self.finished = 0
        self.arrivals = 0
        self.prompt_tokens = 0
        self.ttft = Histogram(TTFT_BUCKETS_S)
        self.recent = RecentDemand(started_s)
        self.bounded = BoundedLatencies()

    def arrive(self, prompt_tokens: int, now_s: float) -> None:
        """A request arrived that an engine has to compute for."""
        self.arrivals += 1
        self.prompt_tokens += prompt_tokens
        self.recent.arrive(prompt_tokens, now_s)

    def answer(self, ttft_s: float, now_s: float) -> None:
        """The first token of its stream came."""
        self.ttft.observe(ttft_s)
        self.recent.answer(ttft_s, now_s)
        if self.bounded.ttft is not None:
            self.bounded.ttft.observe(ttft_s, now_s)

    def refused(self) -> Counter[int]:
        """Requests by status that the gateway or an engine refused; those whose client left (499) are none."""
        found: Counter[int] = Counter()
        for (_, status), count in self.requests.items():
            if 400 <= status < 499:
                found[status] += count
        return found

    def retry(self) -> None:
        """A request is sent, or held, once more after a failed attempt."""
        self.retried += 1

    def finish(self, route: str, status: int, *, refusal: str = "", broken: bool = False) -> None:
        """A request ended.

        Args:
            route: label of its route.
            status: of the answer, or that which the error at the end of a stream stands for.
            refusal: label of the outcome where the gateway or the client ended it; empty where an engine answered.
            broken: whether its answer had begun and was broken off.
        """
        self.requests[route, status] += 1
        self.finished += 1
        if refusal:
            self.refusals[refusal] += 1
        if status >= 500 or broken:
            self.failed += 1
