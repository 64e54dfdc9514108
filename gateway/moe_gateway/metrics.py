"""The gateway's Prometheus metrics: rendered from the stats and the books when they are asked for."""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, SummaryMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from moe_gateway.engines.dispatcher import Dispatcher
from moe_gateway.request_stats import Histogram

PREFIX = "moeserving_gateway_"


class GatewayCollector(Collector):
    """Reads; holds nothing."""

    def __init__(self, dispatcher: Dispatcher, clock: Callable[[], float]) -> None:
        self._dispatcher = dispatcher
        self._clock = clock

    def collect(self) -> Iterator[Metric]:
        """All families."""
        yield from self._requests()
        yield from self._targets()

    def _requests(self) -> Iterator[Metric]:
        stats = self._dispatcher.stats
        requests = CounterMetricFamily(PREFIX + "requests", "Finished requests.", labels=["route", "code"])
        for (route, status), count in sorted(stats.requests.items()):
            requests.add_metric([route, str(status)], count)
        yield requests
        yield _counter("refusals", "Requests that no engine answered, by outcome.", "outcome", stats.refusals)
        yield _counter("dispatch", "Choices of an engine, by reason.", "reason", stats.decisions)
        yield _counter("ejections", "Failures that took an engine out for a while.", "engine", stats.ejections)
        yield CounterMetricFamily(PREFIX + "retries", "Requests sent a second time.", value=stats.retried)
        yield GaugeMetricFamily(PREFIX + "held_requests", "Requests held in the gateway.", value=self._dispatcher.held)
        share = "Own part of the requests that the engines have; less than 1 beside other gateways."
        yield GaugeMetricFamily(PREFIX + "traffic_share", share, value=self._dispatcher.traffic_share)
        yield from self._demand()
        yield _histogram("ttft_seconds", "From arrival to the first byte of the body.", stats.ttft)
        yield _histogram(
            "prediction_error_seconds", "Predicted less measured time to first token.", stats.prediction_error
        )

    def _demand(self) -> Iterator[Metric]:
        """What tells how many engines are needed."""
        dispatcher, now_s = self._dispatcher, self._clock()
        stats = dispatcher.stats
        yield CounterMetricFamily(PREFIX + "arrivals", "Requests that engines compute for.", value=stats.arrivals)
        yield CounterMetricFamily(PREFIX + "prompt_tokens", "Their prompt tokens.", value=stats.prompt_tokens)
        oldest = "Age of the request that is held longest; 0 when none is."
        yield GaugeMetricFamily(PREFIX + "held_seconds", oldest, value=dispatcher.held_since_s(now_s) or 0.0)
        if (wait_s := dispatcher.least_wait_s(now_s)) is not None:
            text = "Least predicted wait of a new request before it is computed; absent without a target."
            yield GaugeMetricFamily(PREFIX + "wait_seconds", text, value=wait_s)

    def _targets(self) -> Iterator[Metric]:
        dispatcher, now_s = self._dispatcher, self._clock()
        families = {
            name: GaugeMetricFamily(PREFIX + name, help_text, labels=["engine", "rank"])
            for name, help_text in (
                ("in_flight_requests", "Requests sent and not ended."),
                ("unanswered_prefill_tokens", "Uncached prompt tokens of requests without an answer yet."),
                ("engine_accepting", "1 when the engine takes new requests."),
                ("signal_age_seconds", "Age of the newest signal; absent before the first."),
                ("signal_stale", "1 when the own books stand alone."),
                ("ttft_factor", "Factor that measured times to first token put on predicted ones."),
            )
        }
        for target, books in dispatcher.target_states.items():
            age_s = books.signal_age_s(now_s)
            values = {
                "in_flight_requests": books.in_flight,
                "unanswered_prefill_tokens": books.unanswered_prefill_tokens,
                "engine_accepting": books.accepting,
                "signal_age_seconds": age_s,
                "signal_stale": not books.is_fresh(now_s, dispatcher.settings.stale_after_s),
                "ttft_factor": books.ttft_factor,
            }
            for name, value in values.items():
                if value is not None:
                    families[name].add_metric([target.server, str(target.rank)], float(value))
        yield from families.values()
        yield self._prediction_ratios()

    def _prediction_ratios(self) -> Metric:
        text = "Measured over predicted time to first token, where the first byte shows it."
        family = SummaryMetricFamily(PREFIX + "prediction_ratio", text, labels=["engine", "rank"])
        for target, (count, total) in sorted(self._dispatcher.stats.prediction_ratios.items()):
            family.add_metric([target.server, str(target.rank)], count_value=count, sum_value=total)
        return family


def _counter(name: str, help_text: str, label: str, counts: dict[str, int]) -> Metric:
    family = CounterMetricFamily(PREFIX + name, help_text, labels=[label])
    for value, count in sorted(counts.items()):
        family.add_metric([value], count)
    return family


def _histogram(name: str, help_text: str, histogram: Histogram) -> Metric:
    family = HistogramMetricFamily(PREFIX + name, help_text)
    family.add_metric([], buckets=histogram.buckets(), sum_value=histogram.total)
    return family


def render_metrics(collector: Collector) -> bytes:
    """The text format."""
    registry = CollectorRegistry()
    registry.register(collector)
    return generate_latest(registry)
