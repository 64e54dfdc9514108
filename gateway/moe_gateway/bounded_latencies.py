"""Latencies of the last minutes that have a bound (`scheduling.engine.targets`), for status and metrics.

Called for each first token and, where the time between tokens has a bound, for each piece of a stream. Without a bound
nothing is counted. Another bound begins anew.
"""

from moe_contract.latency_record import WINDOW_S, LatencyRecord, add_counts, bucket_of
from moe_scheduling.engine.disaggregation import LatencyTargets

_SLOT_S = 10
_SLOTS = WINDOW_S // _SLOT_S


class LatencyWindow:
    """Latencies of the last `WINDOW_S` seconds beside one bound; all times are on one monotonic clock."""

    __slots__ = ("_counts", "_newest", "_totals", "bound_s")

    def __init__(self, bound_s: float) -> None:
        self.bound_s = bound_s
        self._newest = 0
        self._counts: list[dict[int, int]] = [{} for _ in range(_SLOTS)]
        self._totals = [0] * _SLOTS

    def observe(self, latency_s: float, now_s: float) -> None:
        """Counts a latency that ended now."""
        number = int(now_s) // _SLOT_S
        if number > self._newest:
            self._advance_to(number)
        slot, bucket = number % _SLOTS, bucket_of(latency_s, self.bound_s)
        counts = self._counts[slot]
        counts[bucket] = counts.get(bucket, 0) + 1
        self._totals[slot] += 1

    def measured(self, now_s: float) -> int:
        """Returns how many latencies are within the window."""
        self._advance_to(int(now_s) // _SLOT_S)
        return sum(self._totals)

    def record(self, now_s: float) -> LatencyRecord:
        """The latencies within the window, by bucket."""
        self._advance_to(int(now_s) // _SLOT_S)
        counts: dict[int, int] = {}
        for slot in self._counts:
            add_counts(counts, slot)
        return LatencyRecord(bound_s=self.bound_s, counts=tuple(sorted(counts.items())))

    def _advance_to(self, number: int) -> None:
        for passed in range(max(self._newest + 1, number - _SLOTS + 1), number + 1):
            self._counts[passed % _SLOTS] = {}
            self._totals[passed % _SLOTS] = 0
        self._newest = max(self._newest, number)


class BoundedLatencies:
    """The windows of a gateway.

    Attributes:
        ttft: of the times to first token; None without a bound.
        inter_token: of the times between two pieces of a stream; None without a bound.
    """

    __slots__ = ("inter_token", "ttft")

    def __init__(self) -> None:
        self.ttft: LatencyWindow | None = None
        self.inter_token: LatencyWindow | None = None

    def set_bounds(self, targets: LatencyTargets) -> None:
        """The bounds from now on."""
        self.ttft = _with_bound(self.ttft, targets.ttft_s)
        self.inter_token = _with_bound(self.inter_token, targets.inter_token_s)

    def measured(self, now_s: float) -> tuple[int, ...]:
        """Returns how many latencies are within each window."""
        return tuple(window.measured(now_s) for window in (self.ttft, self.inter_token) if window is not None)


def _with_bound(window: LatencyWindow | None, bound_s: float | None) -> LatencyWindow | None:
    if bound_s is None:
        return None
    return window if window is not None and window.bound_s == bound_s else LatencyWindow(bound_s)
