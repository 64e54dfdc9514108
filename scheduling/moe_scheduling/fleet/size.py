"""How many engines run: `plan_fleet`, called by the operator's autoscaler at each interval and by the simulator.

Invariants: a number outside `min_replicas` to `max_replicas` is never planned, and one that stands outside is brought
inside at once, whatever is known; else nothing is done on a missing or stale signal; a metric that is not known forbids
to let engines go; the answer depends on the arguments alone.

`order_victims` (in `victims.py`) says which engines are let go.
"""

import math
from dataclasses import dataclass, field, replace
from enum import StrEnum

from moe_scheduling.fleet.latency import (
    Engines,
    Latency,
    LatencyHistory,
    engines_for_latency,
    learn_from_latency,
    observe_latency,
)
from moe_scheduling.fleet.scaling import SCALE_DOWN, SCALE_UP, ScalingRecord, ScalingRules, bound_change, stabilise

# As long as the startup probe of an engine allows, until a start has been seen.
_STARTUP_S = 1800.0
# The largest number that the field `replicas` of Kubernetes takes.
_MOST_REPLICAS = 2**31 - 1


class Metric(StrEnum):
    """What is kept at a target; a metric label."""

    WAIT = "wait"
    KV_USAGE = "kv_usage"
    TTFT = "ttft"
    TOKENS_PER_S = "tokens_per_s"


class ScaleReason(StrEnum):
    """Why the number changes; a metric label."""

    ABOVE_TARGET = "above_target"
    BELOW_TARGET = "below_target"
    BOUNDS = "bounds"
    IDLE = "idle"
    WAKE = "wake"


class KeepReason(StrEnum):
    """Why the number stays; a metric label."""

    ASLEEP = "asleep"
    AT_BOUND = "at_bound"
    MISSING = "missing"
    ON_TARGET = "on_target"
    RATE = "rate"
    STABILISING = "stabilising"
    STALE = "stale"
    UNKNOWN = "unknown"


class Limit(StrEnum):
    """What holds the number back from what the metrics ask for: the reason of the condition AutoscalingLimited."""

    MAX_REPLICAS = "max_replicas"
    MIN_REPLICAS = "min_replicas"
    SCALE_DOWN_RATE = "scale_down_rate"
    SCALE_UP_RATE = "scale_up_rate"


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetTargets:
    """What to keep; None is not looked at.

    Attributes:
        wait_s: wait of a new request at the best engine, or in the gateway's queue.
        kv_usage: used part of the KV caches, mean over the engines, at most 1.
        ttft_s: time to first token.
        tokens_per_s: prompt and output tokens computed by one engine.

    Raises:
        ValueError: none is set, or one is not greater than 0 and finite.
    """

    wait_s: float | None = None
    kv_usage: float | None = None
    ttft_s: float | None = None
    tokens_per_s: float | None = None

    def __post_init__(self) -> None:
        named = {name: getattr(self, name) for name in ("wait_s", "kv_usage", "ttft_s", "tokens_per_s")}
        if all(value is None for value in named.values()):
            raise ValueError("at least one target is needed")
        for name, value in named.items():
            if value is not None and not 0.0 < value < math.inf:
                raise ValueError(f"{name} must be greater than 0 and finite, or absent")
        if self.kv_usage is not None and self.kv_usage > 1.0:
            raise ValueError("kv_usage must be at most 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetSettings:
    """Bounds, targets and behaviour.

    Attributes:
        targets: what to keep.
        min_replicas: fewest engines; 0 lets the last one go when idle.
        max_replicas: most engines, at least 1.
        idle_s: time without any request after which no engine runs, with `min_replicas` 0.
        tolerance: part of a target within which its metric asks for no change; that of Kubernetes.
        stale_after_s: age from which a signal is not acted on.
        scale_up: behaviour when rising.
        scale_down: behaviour when falling.

    Raises:
        ValueError: a value is out of its range or not finite.
    """

    targets: FleetTargets
    min_replicas: int = 1
    max_replicas: int = 1
    idle_s: float = 600.0
    tolerance: float = 0.1
    stale_after_s: float = 30.0
    scale_up: ScalingRules = SCALE_UP
    scale_down: ScalingRules = SCALE_DOWN

    def __post_init__(self) -> None:
        if self.min_replicas < 0:
            raise ValueError("min_replicas must be at least 0")
        if self.max_replicas < max(1, self.min_replicas):
            raise ValueError("max_replicas must be at least 1 and at least min_replicas")
        if not 0.0 < self.idle_s < math.inf:
            raise ValueError("idle_s must be greater than 0 and finite")
        if not 0.0 <= self.tolerance < 1.0:
            raise ValueError("tolerance must be at least 0 and less than 1")
        if not 0.0 < self.stale_after_s < math.inf:
            raise ValueError("stale_after_s must be greater than 0 and finite")


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetObservation:
    """The engines.

    Attributes:
        replicas: engines wanted now, the scale's own number.
        ready: engines that take new work; one that drains does not.
        loading: engines that have started and are not ready.
        startup_s: how long the last engines took to become ready; None before any did.

    Raises:
        ValueError: a number is negative.
    """

    replicas: int
    ready: int
    loading: int = 0
    startup_s: float | None = None

    def __post_init__(self) -> None:
        if min(self.replicas, self.ready, self.loading) < 0:
            raise ValueError("replicas, ready and loading must be at least 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetSignal:
    """One look at the whole fleet. What is negative, NaN or endless counts as not known.

    Attributes:
        observed_s: when it was true, on the clock of `plan_fleet`'s `now_s`.
        wait_s: least predicted wait of a new request; None when not known.
        kv_usage: used part of the KV caches, mean over the ready engines; None when not known.
        ttft_s: mean measured time to first token; None when none was measured.
        tokens_per_s: tokens that all engines compute; None when not known.
        arrivals_per_s: requests that come; None, when not known, neither wakes an engine nor lets the last one go.
        held: requests held in the gateways.
        held_since_s: how long the oldest of them has been held; None when none is.
        in_flight: requests at the engines.
    """

    observed_s: float
    wait_s: float | None = None
    kv_usage: float | None = None
    ttft_s: float | None = None
    tokens_per_s: float | None = None
    arrivals_per_s: float | None = None
    held: int = 0
    held_since_s: float | None = None
    in_flight: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetHistory:
    """What decisions look back on. The first is made on an empty one; each returns the one for the next.

    Attributes:
        record: recommendations and changes, for windows and periods; None before the first decision.
        latency: what latencies have taught.
        busy_s: when a request was last seen, or may have come unseen.
        seen_s: when a signal was last acted on.
    """

    record: ScalingRecord | None = None
    latency: LatencyHistory = field(default_factory=LatencyHistory)
    busy_s: float = -math.inf
    seen_s: float = -math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricView:
    """A metric against its target.

    Attributes:
        metric: the metric.
        value: its value as compared: of one engine for `tokens_per_s`; None when not known.
        target: its target.
        replicas: engines that it asks for, bounds aside; None when not known.
    """

    metric: Metric
    value: float | None
    target: float
    replicas: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """Change the number of engines.

    Attributes:
        replicas: the number.
        reason: why.
        binding: the metric that asked for most; None when no metric was asked.
        metrics: all metrics that have a target.
        limit: what held the number back; None when nothing did.
        history: for the next decision.
    """

    replicas: int
    reason: ScaleReason
    binding: Metric | None = None
    metrics: tuple[MetricView, ...] = ()
    limit: Limit | None = None
    history: FleetHistory


@dataclass(frozen=True, slots=True, kw_only=True)
class Keep:
    """Leave the number as it is; the fields as those of `Scale`."""

    reason: KeepReason
    binding: Metric | None = None
    metrics: tuple[MetricView, ...] = ()
    limit: Limit | None = None
    history: FleetHistory


FleetDecision = Scale | Keep


def plan_fleet(
    observation: FleetObservation,
    signal: FleetSignal | None,
    settings: FleetSettings,
    history: FleetHistory,
    now_s: float,
) -> FleetDecision:
    """How many engines are to run.

    For metrics that grow in proportion to an engine's load (KV use, tokens per second) the number is that of the
    HorizontalPodAutoscaler (Kubernetes, "Algorithm details"): `ceil(ready * value / target)`, and no change while
    `ready * value / (wanted * target)` is within the tolerance of 1. `wanted` has engines that are still loading in it,
    as Kubernetes counts pods that are not ready: they are capacity to come. The number after a fall serves the same
    load within the target, and rises again only past the tolerance. For latencies see `latency.py`. The metric that
    asks for most engines is followed; one that is not known can only hinder a fall. Then come bounds, stabilisation and
    policies, in the order of Kubernetes.

    From zero one engine is woken at once by any request, past stabilisation and policies. To zero the number goes when
    no request was seen for `idle_s`, which takes the place of the stabilisation window.

    Args:
        observation: the engines.
        signal: what they and the gateways say; None when nothing is known.
        settings: bounds, targets and behaviour.
        history: of the decision before, or an empty one.
        now_s: the time, on the clock of the signal and of the decisions before.

    Raises:
        ValueError: `now_s` is not finite.
    """
    if not math.isfinite(now_s):
        raise ValueError("now_s must be finite")
    look = _Look(observation, settings, now_s)
    history = _until(history, observation.replicas, now_s)
    bounded = min(max(observation.replicas, settings.min_replicas), settings.max_replicas)
    if bounded != observation.replicas:
        return look.scale(bounded, ScaleReason.BOUNDS, history)
    if signal is None:
        return Keep(reason=KeepReason.MISSING, history=history)
    if not abs(now_s - signal.observed_s) <= settings.stale_after_s:
        return Keep(reason=KeepReason.STALE, history=history)
    return look.by_signal(signal, _seen(history, signal, settings, now_s))


@dataclass(frozen=True, slots=True)
class _Look:
    """What all parts of one decision read."""

    observation: FleetObservation
    settings: FleetSettings
    now_s: float

    def by_signal(self, signal: FleetSignal, history: FleetHistory) -> FleetDecision:
        if self.observation.replicas == 0:
            if _asks(signal):
                return self.scale(1, ScaleReason.WAKE, history)
            return Keep(reason=KeepReason.ASLEEP, history=history)
        if self.settings.min_replicas == 0 and self.now_s - history.busy_s >= self.settings.idle_s:
            return self.to_zero(history)
        return self.by_metrics(signal, history)

    def scale(self, replicas: int, reason: ScaleReason, history: FleetHistory) -> Scale:
        return Scale(replicas=replicas, reason=reason, history=self._changed(history, replicas))

    def to_zero(self, history: FleetHistory) -> FleetDecision:
        replicas = self._bound(0, history)
        if replicas == self.observation.replicas:
            return Keep(reason=KeepReason.RATE, limit=Limit.SCALE_DOWN_RATE, history=history)
        decision = self.scale(replicas, ScaleReason.IDLE, history)
        return replace(decision, limit=Limit.SCALE_DOWN_RATE) if replicas else decision

    def by_metrics(self, signal: FleetSignal, history: FleetHistory) -> FleetDecision:
        """1. what each metric asks for, 2. the most of it, 3. bounds, 4. stabilisation, 5. policies."""
        metrics, latency = self._view(signal, history.latency)
        history = replace(history, latency=latency)
        binding, wanted = self._most(metrics)
        if binding is None:
            return Keep(reason=KeepReason.UNKNOWN, metrics=metrics, history=history)
        bounded = min(max(wanted, self.settings.min_replicas), self.settings.max_replicas)
        stable = stabilise(self.observation.replicas, bounded, *self._behaviour(history))
        replicas = self._bound(stable, history)
        limit = _limit(wanted, bounded, stable, replicas)
        history = replace(history, record=_record(history).recommended(bounded, self.now_s))
        current = self.observation.replicas
        if replicas == current:
            reason = _keep_reason(current, wanted, bounded, stable)
            return Keep(reason=reason, binding=binding, metrics=metrics, limit=limit, history=history)
        return Scale(
            replicas=replicas,
            reason=ScaleReason.ABOVE_TARGET if replicas > current else ScaleReason.BELOW_TARGET,
            binding=binding,
            metrics=metrics,
            limit=limit,
            history=self._changed(history, replicas),
        )

    def _view(self, signal: FleetSignal, history: LatencyHistory) -> tuple[tuple[MetricView, ...], LatencyHistory]:
        """What each metric that has a target asks for, and what the latencies teach."""
        values = _values(signal, self.observation.ready)
        targets, latencies = self._targets(), self._latencies(values)
        history = observe_latency(history, latencies, self.observation.replicas, self.observation.ready, self.now_s)
        tokens_per_s = values[Metric.TOKENS_PER_S]
        engines = self._engines(tokens_per_s, history)
        asked: dict[str, int | None] = {
            latency.name: engines_for_latency(latency, engines, history, self.settings.tolerance, self.now_s)
            for latency in latencies
        }
        missed = any(count is not None and count > engines.wanted for count in asked.values())
        if latencies and engines.ready:
            tolerance, now_s = self.settings.tolerance, self.now_s
            history = learn_from_latency(history, latencies, engines, missed=missed, tolerance=tolerance, now_s=now_s)
        for metric in (Metric.KV_USAGE, Metric.TOKENS_PER_S):
            asked[metric] = self._by_ratio(values[metric], metric, targets)
        views = tuple(_metric_view(metric, values, target, asked, engines) for metric, target in targets.items())
        return views, history

    def _targets(self) -> dict[Metric, float]:
        targets = self.settings.targets
        named = {
            Metric.WAIT: targets.wait_s,
            Metric.KV_USAGE: targets.kv_usage,
            Metric.TTFT: targets.ttft_s,
            Metric.TOKENS_PER_S: targets.tokens_per_s,
        }
        return {metric: target for metric, target in named.items() if target is not None}

    def _latencies(self, values: dict[Metric, float | None]) -> tuple[Latency, ...]:
        targets = self._targets()
        return tuple(
            Latency(metric, None if (value := values[metric]) is None else value / targets[metric])
            for metric in (Metric.WAIT, Metric.TTFT)
            if metric in targets
        )

    def _engines(self, tokens_per_s: float | None, history: LatencyHistory) -> Engines:
        """Engines that stay away for twice the time of a start are not waited for any longer."""
        observation = self.observation
        seen_s = _plausible(observation.startup_s)
        startup_s = _STARTUP_S if seen_s is None else seen_s
        missing = observation.loading > 0 or observation.ready < observation.replicas
        return Engines(
            wanted=observation.replicas,
            ready=observation.ready,
            coming=missing and self.now_s < history.since_s + 2.0 * startup_s,
            startup_s=startup_s,
            tokens_per_s=tokens_per_s,
        )

    def _by_ratio(self, value: float | None, metric: Metric, targets: dict[Metric, float]) -> int | None:
        """`value` is of all engines together."""
        target = targets.get(metric)
        if value is None or target is None:
            return None
        needed, current = value / target, self.observation.replicas
        if abs(needed / current - 1.0) <= self.settings.tolerance:
            return current
        # Division loses a bit, and what is a whole number of engines must not become one more.
        return max(1, math.ceil(min(needed, _MOST_REPLICAS) - 1e-9))

    def _most(self, metrics: tuple[MetricView, ...]) -> tuple[Metric | None, int]:
        asked = {view.metric: view.replicas for view in metrics if view.replicas is not None}
        if not asked:
            return None, self.observation.replicas
        binding = max(asked, key=lambda metric: asked[metric])
        if len(asked) < len(metrics):
            return binding, max(asked[binding], self.observation.replicas)
        return binding, asked[binding]

    def _behaviour(self, history: FleetHistory) -> tuple[ScalingRecord, ScalingRules, ScalingRules, float]:
        return _record(history), self.settings.scale_up, self.settings.scale_down, self.now_s

    def _bound(self, wanted: int, history: FleetHistory) -> int:
        return bound_change(self.observation.replicas, wanted, *self._behaviour(history))

    def _changed(self, history: FleetHistory, replicas: int) -> FleetHistory:
        change = replicas - self.observation.replicas
        return replace(history, record=_record(history).changed(change, self.now_s))


def _record(history: FleetHistory) -> ScalingRecord:
    return history.record or ScalingRecord()


def _until(history: FleetHistory, replicas: int, now_s: float) -> FleetHistory:
    """The history as of now.

    An empty one begins as Kubernetes' does, with the present number recommended: the first window is a whole one.
    """
    if history.record is None:
        return replace(history, record=ScalingRecord().recommended(replicas, now_s))
    return replace(
        history,
        record=history.record.until(now_s),
        latency=history.latency.until(now_s),
        busy_s=min(history.busy_s, now_s),
        seen_s=min(history.seen_s, now_s),
    )


def _seen(history: FleetHistory, signal: FleetSignal, settings: FleetSettings, now_s: float) -> FleetHistory:
    """Who has not looked for as long as `idle_s` cannot say that no request came."""
    busy = not _idle(signal) or now_s - history.seen_s > settings.idle_s
    return replace(history, busy_s=now_s if busy else history.busy_s, seen_s=now_s)


def _asks(signal: FleetSignal) -> bool:
    """Whether a request is known to have come; arrivals that are not known wake nobody."""
    return signal.held > 0 or signal.in_flight > 0 or (_plausible(signal.arrivals_per_s) or 0.0) > 0.0


def _idle(signal: FleetSignal) -> bool:
    """Whether it is known that none did; arrivals that are not known let nobody sleep."""
    return signal.held <= 0 and signal.in_flight <= 0 and signal.arrivals_per_s == 0.0


def _values(signal: FleetSignal, ready: int) -> dict[Metric, float | None]:
    """What is known of each metric. KV use and tokens are of all ready engines together; of none, nothing is known."""
    if ready == 0:
        return dict.fromkeys(Metric)
    kv_usage, held_s = _plausible(signal.kv_usage), _plausible(signal.held_since_s)
    wait_s, ttft_s = _plausible(signal.wait_s), _plausible(signal.ttft_s)
    if signal.held > 0 and held_s is not None:
        # What the queue in the gateway costs is measured; the engines behind it say only what they add.
        wait_s = held_s if wait_s is None else max(wait_s, held_s)
    if signal.ttft_s is None and signal.held <= 0 and signal.in_flight <= 0:
        ttft_s = 0.0
    return {
        Metric.WAIT: wait_s,
        Metric.KV_USAGE: None if kv_usage is None else min(kv_usage, 1.0) * ready,
        Metric.TTFT: ttft_s,
        Metric.TOKENS_PER_S: _plausible(signal.tokens_per_s),
    }


def _plausible(value: float | None) -> float | None:
    return value if value is not None and 0.0 <= value < math.inf else None


def _metric_view(
    metric: Metric,
    values: dict[Metric, float | None],
    target: float,
    asked: dict[str, int | None],
    engines: Engines,
) -> MetricView:
    value = values[metric]
    if value is not None and metric in (Metric.KV_USAGE, Metric.TOKENS_PER_S):
        value /= engines.ready
    return MetricView(metric=metric, value=value, target=target, replicas=asked[metric])


def _limit(wanted: int, bounded: int, stable: int, replicas: int) -> Limit | None:
    if replicas < stable:
        return Limit.SCALE_UP_RATE
    if replicas > stable:
        return Limit.SCALE_DOWN_RATE
    if wanted > bounded:
        return Limit.MAX_REPLICAS
    return Limit.MIN_REPLICAS if wanted < bounded else None


def _keep_reason(current: int, wanted: int, bounded: int, stable: int) -> KeepReason:
    if stable != current:
        return KeepReason.RATE
    if bounded != current:
        return KeepReason.STABILISING
    return KeepReason.ON_TARGET if wanted == current else KeepReason.AT_BOUND
