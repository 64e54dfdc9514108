"""What the gateway counts: plain numbers that the hot path raises and the admin port renders."""

from bisect import bisect_left
from collections import Counter

from moe_scheduling.signals import Target

from moe_gateway.recent import Recent

TTFT_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
ERROR_BUCKETS_S = (-10.0, -2.5, -1.0, -0.25, -0.1, -0.025, 0.0, 0.025, 0.1, 0.25, 1.0, 2.5, 10.0)


class Histogram:
    """Counts by upper bound, and the sum."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """One observation."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def buckets(self) -> list[tuple[str, int]]:
        """Cumulative, as Prometheus wants them."""
        rows, below = [], 0
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self.counts, strict=True):
            below += count
            rows.append((bound, below))
        return rows


class RequestStats:
    """One for a gateway.

    Attributes:
        requests: finished requests by (route, status).
        refusals: requests that ended without an engine's answer, by outcome label.
        decisions: choices by reason label.
        retried: requests sent a second time.
        failed: requests that ended in an error of an engine or of the gateway (status 500 and up, or a broken stream).
        arrivals: requests that ask an engine to compute, as they come.
        prompt_tokens: of those, estimated.
        ttft: seconds from arrival at the gateway to the first byte of the body.
        recent: the last half minute of these three.
        prediction_error: predicted less measured seconds from dispatch to the first token.
        prediction_ratios: of each target, how often the two were compared, and the sum of measured / predicted.
    """

    def __init__(self, started_s: float = 0.0) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()
        self.refusals: Counter[str] = Counter()
        self.decisions: Counter[str] = Counter()
        self.ejections: Counter[str] = Counter()
        self.retried = 0
        self.failed = 0
        self.finished = 0
        self.arrivals = 0
        self.prompt_tokens = 0
        self.ttft = Histogram(TTFT_BUCKETS_S)
        self.recent = Recent(started_s)
        self.prediction_error = Histogram(ERROR_BUCKETS_S)
        self.prediction_ratios: dict[Target, tuple[int, float]] = {}

    def arrive(self, prompt_tokens: int, now_s: float) -> None:
        """A request came that an engine has to compute for."""
        self.arrivals += 1
        self.prompt_tokens += prompt_tokens
        self.recent.arrived(prompt_tokens, now_s)

    def answer(self, ttft_s: float, now_s: float) -> None:
        """It got its first token."""
        self.ttft.observe(ttft_s)
        self.recent.answered(ttft_s, now_s)

    def predicted(self, target: Target, predicted_s: float, measured_s: float) -> None:
        """A first token came after so long."""
        self.prediction_error.observe(predicted_s - measured_s)
        if predicted_s > 0.0:
            count, total = self.prediction_ratios.get(target, (0, 0.0))
            self.prediction_ratios[target] = count + 1, total + measured_s / predicted_s

    def finish(self, route: str, status: int, *, broken: bool = False) -> None:
        """A request ended."""
        self.requests[route, status] += 1
        self.finished += 1
        if status >= 500 or broken:
            self.failed += 1
