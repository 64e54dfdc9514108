"""The gateway's Prometheus metrics, rendered from its counts and from the dispatcher when they are asked for."""

from collections.abc import Callable, Iterator, Mapping

from moe_scheduling.engine.target_state import TargetState
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, SummaryMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from moe_gateway.bounded_latencies import BoundedLatencies
from moe_gateway.engines.dispatcher import Dispatcher
from moe_gateway.engines.load_report import least_wait_s
from moe_gateway.engines.placements import Placements
from moe_gateway.request_stats import Histogram, RequestStats

PREFIX = "moeserving_gateway_"

_TARGET_GAUGES = {
    "in_flight_requests": "Requests sent to the target that have not ended.",
    "unanswered_prefill_tokens": "Uncached prompt tokens of the requests sent to the target that have no answer yet.",
    "engine_accepting": "1 when the target takes new requests.",
    "engine_stalled": "1 when the target has an unanswered request and makes no steps.",
    "signal_age_seconds": "Age of the target's newest signal; absent before the first.",
    "signal_stale": "1 when the newest signal is too old to be used: only the gateway's own requests in flight count.",
    "ttft_factor": "Measured over predicted time to first token; predictions are multiplied by it.",
}


class GatewayCollector(Collector):
    """Collects all families of one gateway at each scrape."""

    def __init__(self, dispatcher: Dispatcher, stats: RequestStats, clock: Callable[[], float]) -> None:
        self._dispatcher = dispatcher
        self._stats = stats
        self._clock = clock

    def collect(self) -> Iterator[Metric]:
        """All families: of requests, of demand, of targets, of predictions."""
        yield from self._requests()
        yield from self._demand()
        yield from self._targets()
        yield from self._predictions()
        yield from _bound_families(self._stats.bounded, self._clock())
        if (placements := self._dispatcher.placements) is not None:
            yield from _split_families(placements)

    def _requests(self) -> Iterator[Metric]:
        stats, dispatcher = self._stats, self._dispatcher
        requests = CounterMetricFamily(PREFIX + "requests", "Finished requests.", labels=["route", "code"])
        for (route, status), count in sorted(stats.requests.items()):
            requests.add_metric([route, str(status)], count)
        yield requests
        yield _counter("refusals", "Requests that ended without an engine's answer.", "outcome", stats.refusals)
        yield _counter("dispatch", "Choices of a target, by reason.", "reason", dispatcher.decisions)
        yield _counter("ejections", "Failures that ejected an engine for a while.", "engine", dispatcher.ejections)
        yield CounterMetricFamily(PREFIX + "retries", "Attempts after a request's first.", value=stats.retried)
        went_on = "Streams that went on at another engine, by way; `none` is one that could, and ended with an error."
        yield _counter("continuations", went_on, "way", stats.continuations)
        yield GaugeMetricFamily(PREFIX + "held_requests", "Requests held in the gateway.", value=dispatcher.held)
        limit = "Requests that the gateway holds at most; one more is refused."
        yield GaugeMetricFamily(PREFIX + "held_requests_limit", limit, value=dispatcher.hold_requests)
        share = "Part of the requests at the engines that this gateway sent; below 1 beside other gateways."
        yield GaugeMetricFamily(PREFIX + "traffic_share", share, value=dispatcher.targets.traffic_share)
        ttft = "Seconds from a request's arrival to the first token of its stream."
        yield _histogram("ttft_seconds", ttft, stats.ttft)

    def _demand(self) -> Iterator[Metric]:
        """What an autoscaler decides by."""
        dispatcher, stats, now_s = self._dispatcher, self._stats, self._clock()
        arrivals = "Requests that arrived and that an engine has to compute for."
        yield CounterMetricFamily(PREFIX + "arrivals", arrivals, value=stats.arrivals)
        tokens = "Estimated prompt tokens of those requests."
        yield CounterMetricFamily(PREFIX + "prompt_tokens", tokens, value=stats.prompt_tokens)
        oldest = "Seconds that the longest held request has been without an engine; 0 when none is held."
        yield GaugeMetricFamily(PREFIX + "held_seconds", oldest, value=dispatcher.held_since_s(now_s) or 0.0)
        if (wait_s := least_wait_s(dispatcher, now_s)) is not None:
            text = "Least predicted seconds before a new request begins to be computed; absent without a target."
            yield GaugeMetricFamily(PREFIX + "wait_seconds", text, value=wait_s)

    def _targets(self) -> Iterator[Metric]:
        stale_after_s, now_s = self._dispatcher.settings.stale_after_s, self._clock()
        families = {
            name: GaugeMetricFamily(PREFIX + name, text, labels=["engine", "rank"])
            for name, text in _TARGET_GAUGES.items()
        }
        for target, state in self._dispatcher.target_states.items():
            values = _target_values(state, now_s, stale_after_s)
            for name, value in {**values, "engine_stalled": target in self._dispatcher.stalled}.items():
                if value is not None:
                    families[name].add_metric([target.server, str(target.rank)], float(value))
        yield from families.values()

    def _predictions(self) -> Iterator[Metric]:
        predictions = self._dispatcher.targets.predictions
        error = "Predicted less measured seconds from dispatch to the first token."
        yield _histogram("prediction_error_seconds", error, predictions.error)
        text = "Measured over predicted time to first token, of streams and embeddings."
        family = SummaryMetricFamily(PREFIX + "prediction_ratio", text, labels=["engine", "rank"])
        for target, (count, total) in sorted(predictions.ratios.items()):
            family.add_metric([target.server, str(target.rank)], count_value=count, sum_value=total)
        yield family


def _bound_families(bounded: BoundedLatencies, now_s: float) -> Iterator[Metric]:
    """The bounds of `scheduling.engine.targets` with the latencies measured beside them; none without bounds."""
    windows = {"ttft": bounded.ttft, "inter_token": bounded.inter_token}
    rows = [(name, window.record(now_s)) for name, window in windows.items() if window is not None]
    if not rows:
        return
    bound = GaugeMetricFamily(PREFIX + "target_seconds", "The bound of the latency.", labels=["target"])
    text = "95th percentile of the latency over the last five minutes; absent without one."
    measured = GaugeMetricFamily(PREFIX + "target_p95_seconds", text, labels=["target"])
    for name, record in rows:
        bound.add_metric([name], record.bound_s)
        if (value_s := record.percentile_s()) is not None:
            measured.add_metric([name], value_s)
    yield bound
    yield measured


def _split_families(placements: Placements) -> Iterator[Metric]:
    """Requests that were split between two engines, and the roles of the engines."""
    transfers = "Answers that began at an engine that had not computed their prompt."
    yield CounterMetricFamily(PREFIX + "split_transfers", transfers, value=placements.transfers)
    yield _counter("split_choices", "Pairs of engines chosen, by reason.", "reason", placements.pairs)
    fall_backs = "Pairs that were left for one engine before the answer began, by reason."
    yield _counter("split_fallbacks", fall_backs, "reason", placements.fall_backs)
    yield _counter("role_changes", "Engines that got another role, by reason.", "reason", placements.role_changes)
    roles = "1 for the present role of each engine that exchanges KV blocks with others."
    family = GaugeMetricFamily(PREFIX + "engine_role", roles, labels=["engine", "role"])
    for engine, role in sorted(placements.roles.items()):
        family.add_metric([engine, role], 1.0)
    yield family


def _target_values(state: TargetState, now_s: float, stale_after_s: float) -> dict[str, float | None]:
    return {
        "in_flight_requests": state.in_flight,
        "unanswered_prefill_tokens": state.unanswered_prefill_tokens,
        "engine_accepting": state.accepting,
        "signal_age_seconds": state.signal_age_s(now_s),
        "signal_stale": not state.is_fresh(now_s, stale_after_s),
        "ttft_factor": state.ttft_factor,
    }


def _counter(name: str, help_text: str, label: str, counts: Mapping[str, int]) -> Metric:
    family = CounterMetricFamily(PREFIX + name, help_text, labels=[label])
    for value, count in sorted(counts.items()):
        family.add_metric([value], count)
    return family


def _histogram(name: str, help_text: str, histogram: Histogram) -> Metric:
    family = HistogramMetricFamily(PREFIX + name, help_text)
    family.add_metric([], buckets=histogram.buckets(), sum_value=histogram.total)
    return family


def render_metrics(collector: Collector) -> bytes:
    """All families in Prometheus' text format."""
    registry = CollectorRegistry()
    registry.register(collector)
    return generate_latest(registry)
