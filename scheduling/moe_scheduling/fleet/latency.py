"""The number of engines that a latency target asks for; called by `size.py` for the wait and for the TTFT.

Latency is not in proportion to the load of an engine: it is small up to near saturation and unbounded beyond. So no
formula leads from a latency to a number of engines, and the number changes in steps, by evidence:

- Above the target the number grows by the factor by which the target is missed, at most `STEP`. No further step follows
  before the new engines serve and the signals include them (`SETTLE_S`), nor while the latency falls so fast that it is
  within the target before another engine could serve: a backlog that the present engines work off needs no more.
- Within the target the number falls when the computed tokens per second and engine would stay at most at a rate that
  engines served within their targets, or at half of a rate at which a target was missed. Without such evidence it falls
  by one engine on trial, when the latency is below `TRIAL_BELOW` of the target and the rate of the remaining engines is
  below the missed rate by a margin.

Invariants: a rate at which an engine missed a target is not put on one again while the load does not fall; a greater
latency or load never gives a smaller number.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

# Seconds over which the gateways average their latencies (docs/interfaces.md, `ttft_s`): until then a signal after a
# change of the engines mixes in the time before it.
SETTLE_S = 30.0
# As fast as the default policies of the HorizontalPodAutoscaler let a number grow in one period.
STEP = 2.0
# Without evidence: going from two engines to one doubles the load of the one.
TRIAL_BELOW = 0.5
# Part of a rate that missed a target that engines are not brought back to.
_FAILED_MARGIN = 0.8
# Part of a rate that missed a target to which the number may fall without a trial: an M/M/1 queue at half of its load
# has a short wait.
_FAILED_SAFE = 0.5


@dataclass(frozen=True, slots=True)
class Latency:
    """A latency as part of its target: `ratio` is value / target; None when the value is unknown."""

    name: str
    ratio: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetCapacity:
    """The engines before a decision.

    Attributes:
        wanted: engines wanted now.
        ready: engines that take requests.
        coming: whether engines are still expected to become ready.
        startup_s: seconds that an engine takes to become ready.
        tokens_per_s: tokens per second that they compute together; None when unknown.
    """

    wanted: int
    ready: int
    coming: bool
    startup_s: float
    tokens_per_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyHistory:
    """Evidence from latencies.

    Attributes:
        wanted: engines wanted at the last decision.
        ready: engines that took requests then; None before the first decision.
        since_s: time when those two numbers were first seen.
        marks: latencies that later ones are compared with, to see whether they fall.
        marked_s: time of `marks`.
        met_since_s: time since when all targets are met; None when one is not.
        served_rate: greatest tokens/s of one engine within the targets.
        failed_rate: tokens/s of one engine when a target was last missed; None when later evidence refuted it.
    """

    wanted: int = 0
    ready: int | None = None
    since_s: float = 0.0
    marks: tuple[Latency, ...] = ()
    marked_s: float = 0.0
    met_since_s: float | None = None
    served_rate: float | None = None
    failed_rate: float | None = None

    def until(self, now_s: float) -> "LatencyHistory":
        """Returns the same evidence; times after `now_s`, which a clock that jumped back leaves, become `now_s`."""
        met_since_s = self.met_since_s if self.met_since_s is None else min(self.met_since_s, now_s)
        since_s, marked_s = min(self.since_s, now_s), min(self.marked_s, now_s)
        return replace(self, since_s=since_s, marked_s=marked_s, met_since_s=met_since_s)


def observe_latency(
    history: LatencyHistory, latencies: Sequence[Latency], wanted: int, ready: int, now_s: float
) -> LatencyHistory:
    """Returns the history with the present numbers of engines; a changed number restarts the comparison."""
    if (history.wanted, history.ready) != (wanted, ready):
        marks = tuple(latencies)
        return replace(
            history, wanted=wanted, ready=ready, since_s=now_s, marks=marks, marked_s=now_s, met_since_s=None
        )
    if _are_met(latencies):
        return replace(history, marks=())
    return history


def engines_for_latency(
    latency: Latency, engines: FleetCapacity, history: LatencyHistory, tolerance: float, now_s: float
) -> int | None:
    """Returns the number of engines that this latency asks for; None when the latency is unknown."""
    if latency.ratio is None:
        return None
    if not _settled(engines, history, now_s):
        return engines.wanted
    if latency.ratio > 1.0 + tolerance:
        falls = _falls_in_time(latency.name, latency.ratio, engines.startup_s, history, now_s)
        return engines.wanted if falls else math.ceil(engines.wanted * min(latency.ratio, STEP))
    if latency.ratio <= 1.0 and engines.ready == engines.wanted:
        return _fewer(engines, history, latency.ratio)
    return engines.wanted


def learn_from_latency(
    history: LatencyHistory,
    latencies: Sequence[Latency],
    engines: FleetCapacity,
    *,
    missed: bool,
    tolerance: float,
    now_s: float,
) -> LatencyHistory:
    """Returns the history with the evidence of this decision.

    Args:
        history: the evidence before.
        latencies: the present latencies.
        engines: the engines before the decision.
        missed: whether a latency asked for more engines.
        tolerance: part of a target by which a metric may be off.
        now_s: the time.
    """
    history = _mark(history, latencies, now_s)
    if not _are_met(latencies) or not _settled(engines, history, now_s):
        history = replace(history, met_since_s=None)
    elif history.met_since_s is None:
        history = replace(history, met_since_s=now_s)
    if engines.tokens_per_s is None or engines.ready != engines.wanted:
        return history
    rate = engines.tokens_per_s / engines.ready
    if missed:
        return _failed(history, rate)
    if history.met_since_s is not None and now_s - history.met_since_s >= SETTLE_S:
        return _served(history, rate, tolerance)
    return history


def _are_met(latencies: Sequence[Latency]) -> bool:
    return all(latency.ratio is not None and latency.ratio <= 1.0 for latency in latencies)


def _settled(engines: FleetCapacity, history: LatencyHistory, now_s: float) -> bool:
    return not engines.coming and now_s - history.since_s >= SETTLE_S


def _falls_in_time(name: str, ratio: float, startup_s: float, history: LatencyHistory, now_s: float) -> bool:
    """Returns whether the latency, at its present rate of fall, meets its target before a new engine could be ready."""
    before = next((mark.ratio for mark in history.marks if mark.name == name), None)
    if before is None:
        return False
    elapsed_s = now_s - history.marked_s
    if elapsed_s < SETTLE_S:
        return True
    return (ratio - 1.0) * elapsed_s <= (before - ratio) * max(startup_s, SETTLE_S)


def _mark(history: LatencyHistory, latencies: Sequence[Latency], now_s: float) -> LatencyHistory:
    if not history.marks or now_s - history.marked_s < SETTLE_S:
        return history
    return replace(history, marks=tuple(latencies), marked_s=now_s)


def _fewer(engines: FleetCapacity, history: LatencyHistory, ratio: float) -> int:
    """Returns the fewest engines that are known to serve the load, or one less on trial."""
    tokens_per_s = engines.tokens_per_s
    if tokens_per_s is None or engines.wanted <= 1:
        return engines.wanted
    return min(_proved(tokens_per_s, engines.wanted, history), _tried(tokens_per_s, engines.wanted, history, ratio))


def _proved(tokens_per_s: float, wanted: int, history: LatencyHistory) -> int:
    if tokens_per_s == 0.0:
        return 1
    rate = max(history.served_rate or 0.0, (history.failed_rate or 0.0) * _FAILED_SAFE)
    if rate == 0.0:
        return wanted
    # Division rounds: a whole number of engines must not become one more.
    return max(1, min(wanted, math.ceil(min(tokens_per_s / rate, wanted) - 1e-9)))


def _tried(tokens_per_s: float, wanted: int, history: LatencyHistory, ratio: float) -> int:
    if ratio > TRIAL_BELOW:
        return wanted
    if history.failed_rate is not None and tokens_per_s / (wanted - 1) >= history.failed_rate * _FAILED_MARGIN:
        return wanted
    return wanted - 1


def _failed(history: LatencyHistory, rate: float) -> LatencyHistory:
    served = history.served_rate
    if served is not None and served >= rate * _FAILED_MARGIN:
        served = None
    return replace(history, failed_rate=rate, served_rate=served)


def _served(history: LatencyHistory, rate: float, tolerance: float) -> LatencyHistory:
    failed = history.failed_rate
    if failed is not None and rate > failed * (1.0 + tolerance):
        failed = None
    return replace(history, failed_rate=failed, served_rate=max(rate, history.served_rate or 0.0))
