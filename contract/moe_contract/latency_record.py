"""Latencies of the last minutes beside their bound, in a form in which those of several gateways add up.

A latency is counted by its quotient with the bound: bucket `b` has those up to `bound * 2 ** (b / 16)`, so that those
up to bucket 0 are exactly the ones that kept the bound, and a percentile is known to 4.4 %.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated

from pydantic import AfterValidator

# Latencies are recorded for this long, in seconds.
WINDOW_S = 300
# Part of the latencies that has to be within a bound for it to count as kept.
KEPT_PART = 0.95
BUCKETS_PER_DOUBLING = 16
# Quotients beyond 2 ** 24, and below its inverse, are in the outermost buckets.
MOST_BUCKET = 24 * BUCKETS_PER_DOUBLING


def _positive(value: float) -> float:
    if not 0.0 < value < math.inf:
        raise ValueError("a bound is greater than 0 and finite")
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyRecord:
    """The latencies of one kind within the window.

    Attributes:
        bound_s: the bound, in seconds.
        counts: pairs of a bucket and the number of latencies in it.
    """

    bound_s: Annotated[float, AfterValidator(_positive)]
    counts: tuple[tuple[int, int], ...] = ()

    @property
    def measured(self) -> int:
        """How many latencies are within the window."""
        return sum(count for _, count in self.counts)

    def percentile_bucket(self, part: float = KEPT_PART) -> int | None:
        """Returns the least bucket up to which this part of the latencies is; None without any."""
        left = part * self.measured
        for bucket, count in sorted(self.counts):
            left -= count
            # A sum of parts may be off by its rounding.
            if count and left <= 1e-9:
                return bucket
        return None

    def percentile_s(self, part: float = KEPT_PART) -> float | None:
        """Returns the upper end of that bucket in seconds; None without latencies."""
        bucket = self.percentile_bucket(part)
        return (
            None
            if bucket is None
            else self.bound_s * 2.0 ** (max(-MOST_BUCKET, min(MOST_BUCKET, bucket)) / BUCKETS_PER_DOUBLING)
        )


def bucket_of(latency_s: float, bound_s: float) -> int:
    """Returns the bucket of a latency; one that is 0 or less is in the first."""
    quotient = latency_s / bound_s
    return _clipped(math.ceil(BUCKETS_PER_DOUBLING * math.log2(quotient))) if quotient > 0.0 else -MOST_BUCKET


def _clipped(bucket: int) -> int:
    return max(-MOST_BUCKET, min(MOST_BUCKET, bucket))


def merge_records(records: Iterable[LatencyRecord | None], bound_s: float) -> LatencyRecord:
    """Returns the sum of the records that have this bound; others are of a bound that is no more, or not yet."""
    counts: dict[int, int] = {}
    for record in records:
        if record is not None and math.isclose(record.bound_s, bound_s, rel_tol=1e-6):
            add_counts(counts, dict(record.counts))
    return LatencyRecord(bound_s=bound_s, counts=tuple(sorted(counts.items())))


def add_counts(counts: dict[int, int], more: Mapping[int, int]) -> None:
    """Adds the numbers of `more` to those of `counts`; a number below 0, of a record that is broken, adds nothing."""
    for bucket, count in more.items():
        counts[bucket] = counts.get(bucket, 0) + max(0, count)
