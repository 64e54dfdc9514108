"""How many engines run: `plan_fleet`, called by the operator's autoscaler at each interval and by the simulator.

Invariants: no number outside `min_replicas` to `max_replicas` is planned, and a present number outside is brought
inside at once, with or without a signal; otherwise a missing or stale signal changes nothing; an unknown metric never
lets the number fall; the decision depends on the arguments alone.

`order_victims` (in `victims.py`) orders the engines that end when the number falls.
"""

import math
from dataclasses import dataclass, field, replace
from enum import StrEnum

from moe_scheduling.fleet.latency import (
    FleetCapacity,
    Latency,
    LatencyHistory,
    engines_for_latency,
    learn_from_latency,
    observe_latency,
)
from moe_scheduling.fleet.scaling import ScalingRecord, ScalingRules, bound_change, stabilise
from moe_scheduling.fleet.settings import FleetSettings

# As long as the startup probe of an engine allows, until a start has been seen.
_STARTUP_S = 1800.0
# The largest number that the field `replicas` of Kubernetes takes.
_MOST_REPLICAS = 2**31 - 1


class Metric(StrEnum):
    """A metric that has a target; a metric label."""

    WAIT = "wait"
    KV_USAGE = "kv_usage"
    TTFT = "ttft"
    TOKENS_PER_S = "tokens_per_s"
    INTER_TOKEN = "inter_token"


# Metrics in proportion to the load of an engine; the others are latencies.
_PROPORTIONAL = (Metric.KV_USAGE, Metric.TOKENS_PER_S, Metric.INTER_TOKEN)


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
    """What keeps the number from what the metrics ask for: the reason of the condition AutoscalingLimited."""

    MAX_REPLICAS = "max_replicas"
    MIN_REPLICAS = "min_replicas"
    SCALE_DOWN_RATE = "scale_down_rate"
    SCALE_UP_RATE = "scale_up_rate"


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetObservation:
    """The engines as the cluster reports them.

    Attributes:
        replicas: engines wanted now, `replicas` of the scale.
        ready: engines that take new requests; a draining one does not.
        loading: engines that have started and are not ready.
        startup_s: seconds that the last engines took to become ready; None before any did.
        asked: a gateway or a metric source is known to have a request, however little is known of the others: it
            wakes the first engine, and time without requests begins anew.

    Raises:
        ValueError: a number is negative.
    """

    replicas: int
    ready: int
    loading: int = 0
    startup_s: float | None = None
    asked: bool = False

    def __post_init__(self) -> None:
        if min(self.replicas, self.ready, self.loading) < 0:
            raise ValueError("replicas, ready and loading must be at least 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetSignal:
    """The state of the whole fleet at one time. Values that are negative, NaN or infinite count as unknown.

    Attributes:
        observed_s: its time, on the clock of `plan_fleet`'s `now_s`.
        wait_s: least predicted wait of a new request (seconds); None when unknown.
        kv_usage: used part of the KV caches, mean over the ready engines; None when unknown.
        ttft_s: mean measured time to first token (seconds); None when none was measured.
        tokens_per_s: tokens per second that all engines compute together; None when unknown.
        decode_load: decoding requests over the number with which a step takes `FleetTargets.inter_token_s`, mean over
            the ready engines (`role_load.py`); None when unknown.
        arrivals_per_s: requests per second; None, when unknown, neither wakes an engine nor ends the last one.
        held: requests held in the gateways.
        held_since_s: age of the oldest held request (seconds); None without one.
        in_flight: requests at the engines.
    """

    observed_s: float
    wait_s: float | None = None
    kv_usage: float | None = None
    ttft_s: float | None = None
    tokens_per_s: float | None = None
    decode_load: float | None = None
    arrivals_per_s: float | None = None
    held: int = 0
    held_since_s: float | None = None
    in_flight: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetHistory:
    """Past of a fleet. The first decision gets an empty one; each decision returns the one for the next.

    Attributes:
        record: recommendations and changes, for windows and periods; None before the first decision.
        latency: evidence from latencies.
        busy_s: time when a request was last seen, or may have come unseen.
        seen_s: time of the last signal that was acted on.
    """

    record: ScalingRecord | None = None
    latency: LatencyHistory = field(default_factory=LatencyHistory)
    busy_s: float = -math.inf
    seen_s: float = -math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricView:
    """A metric beside its target.

    Attributes:
        metric: the metric.
        value: its value as compared, per engine for `tokens_per_s`; None when unknown.
        target: its target.
        replicas: engines that it asks for, before bounds; None when unknown.
    """

    metric: Metric
    value: float | None
    target: float
    replicas: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """Change the number of engines.

    Attributes:
        replicas: the new number.
        reason: why it changes.
        binding: the metric that asked for the most engines; None when no metric counted.
        metrics: all metrics that have a target.
        limit: what kept the number from what the metrics ask for; None when nothing did.
        history: argument of the next decision.
    """

    replicas: int
    reason: ScaleReason
    binding: Metric | None = None
    metrics: tuple[MetricView, ...] = ()
    limit: Limit | None = None
    history: FleetHistory


@dataclass(frozen=True, slots=True, kw_only=True)
class Keep:
    """Leave the number as it is. The fields mean what those of `Scale` mean."""

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
    """Returns how many engines run from now on, with the reason.

    For metrics in proportion to an engine's load (KV use, tokens per second, decoding requests) the number is that of
    the HorizontalPodAutoscaler (Kubernetes, "Algorithm details"): `ceil(ready * value / target)`, and no change while
    `ready * value / (wanted * target)` is within the tolerance of 1. `wanted` includes loading engines, as Kubernetes
    counts pods that are not ready: they are capacity to come. The number after a fall serves the same load within the
    target, and rises again only beyond the tolerance. Latencies: `latency.py`. The greatest of the numbers counts; an
    unknown metric can only prevent a fall. Then bounds, stabilisation and policies apply, in the order of Kubernetes.

    At zero any request starts one engine at once, without stabilisation and policies, also where the signal is missing
    or stale and `asked` alone says that there is one. The number falls to zero when no
    request was seen for `idle_s`, which replaces the stabilisation window.

    Args:
        observation: the engines.
        signal: the state of engines and gateways; None when unknown.
        settings: bounds, targets and behaviour.
        history: that of the last decision, or an empty one.
        now_s: the time, on the clock of the signal and of earlier decisions.

    Raises:
        ValueError: `now_s` is not finite.
    """
    if not math.isfinite(now_s):
        raise ValueError("now_s must be finite")
    decision = _Decision(observation, settings, now_s)
    history = _until(history, observation.replicas, now_s)
    bounded = min(max(observation.replicas, settings.min_replicas), settings.max_replicas)
    if bounded != observation.replicas:
        return decision.scale(bounded, ScaleReason.BOUNDS, history)
    if observation.asked:
        history = replace(history, busy_s=now_s)
        if observation.replicas == 0:
            return decision.scale(1, ScaleReason.WAKE, history)
    if signal is None:
        return Keep(reason=KeepReason.MISSING, history=history)
    if not abs(now_s - signal.observed_s) <= settings.stale_after_s:
        return Keep(reason=KeepReason.STALE, history=history)
    return decision.by_signal(signal, _seen(history, signal, settings, now_s))


@dataclass(frozen=True, slots=True)
class _Decision:
    """The arguments of one decision, and its steps."""

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
        """1. The number by each metric, 2. the greatest of them, 3. bounds, 4. stabilisation, 5. policies."""
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
        """Returns each metric with a target and the number that it asks for, and the evidence of latencies."""
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
        for metric in _PROPORTIONAL:
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
            Metric.INTER_TOKEN: None if targets.inter_token_s is None else 1.0,
        }
        return {metric: target for metric, target in named.items() if target is not None}

    def _latencies(self, values: dict[Metric, float | None]) -> tuple[Latency, ...]:
        targets = self._targets()
        return tuple(
            Latency(metric, None if (value := values[metric]) is None else value / targets[metric])
            for metric in (Metric.WAIT, Metric.TTFT)
            if metric in targets
        )

    def _engines(self, tokens_per_s: float | None, history: LatencyHistory) -> FleetCapacity:
        """Returns the engines; missing ones count as coming until twice the time of a start has passed."""
        observation = self.observation
        seen_s = _plausible(observation.startup_s)
        startup_s = _STARTUP_S if seen_s is None else seen_s
        missing = observation.loading > 0 or observation.ready < observation.replicas
        return FleetCapacity(
            wanted=observation.replicas,
            ready=observation.ready,
            coming=missing and self.now_s < history.since_s + 2.0 * startup_s,
            startup_s=startup_s,
            tokens_per_s=tokens_per_s,
        )

    def _by_ratio(self, value: float | None, metric: Metric, targets: dict[Metric, float]) -> int | None:
        """Returns the number for a metric in proportion to the load; `value` is the sum over all engines."""
        target = targets.get(metric)
        if value is None or target is None:
            return None
        needed, current = value / target, self.observation.replicas
        if abs(needed / current - 1.0) <= self.settings.tolerance:
            return current
        # Division rounds: a whole number of engines must not become one more.
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
    """Returns the history as of now.

    An empty one begins as that of Kubernetes, with the present number recommended, so that the first window is full.
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
    """Returns the history after a signal. After a gap of `idle_s` without one, requests may have come unseen."""
    busy = not _idle(signal) or now_s - history.seen_s > settings.idle_s
    return replace(history, busy_s=now_s if busy else history.busy_s, seen_s=now_s)


def _asks(signal: FleetSignal) -> bool:
    """Returns whether a request is known to have come; unknown arrivals start no engine."""
    return signal.held > 0 or signal.in_flight > 0 or (_plausible(signal.arrivals_per_s) or 0.0) > 0.0


def _idle(signal: FleetSignal) -> bool:
    """Returns whether it is known that no request came; unknown arrivals end no engine."""
    return signal.held <= 0 and signal.in_flight <= 0 and signal.arrivals_per_s == 0.0


def _values(signal: FleetSignal, ready: int) -> dict[Metric, float | None]:
    """Returns the value of each metric, None when unknown; those in proportion to the load as sums over the engines."""
    if ready == 0:
        return dict.fromkeys(Metric)
    kv_usage, held_s = _plausible(signal.kv_usage), _plausible(signal.held_since_s)
    wait_s, ttft_s, load = _plausible(signal.wait_s), _plausible(signal.ttft_s), _plausible(signal.decode_load)
    if signal.held > 0 and held_s is not None:
        # The wait in the gateway is measured; the prediction covers only the wait at the engines behind it.
        wait_s = held_s if wait_s is None else max(wait_s, held_s)
    if signal.ttft_s is None and signal.held <= 0 and signal.in_flight <= 0:
        ttft_s = 0.0
    return {
        Metric.WAIT: wait_s,
        Metric.KV_USAGE: None if kv_usage is None else min(kv_usage, 1.0) * ready,
        Metric.TTFT: ttft_s,
        Metric.TOKENS_PER_S: _plausible(signal.tokens_per_s),
        Metric.INTER_TOKEN: None if load is None else load * ready,
    }


def _plausible(value: float | None) -> float | None:
    return value if value is not None and 0.0 <= value < math.inf else None


def _metric_view(
    metric: Metric,
    values: dict[Metric, float | None],
    target: float,
    asked: dict[str, int | None],
    engines: FleetCapacity,
) -> MetricView:
    value = values[metric]
    if value is not None and metric in _PROPORTIONAL:
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
