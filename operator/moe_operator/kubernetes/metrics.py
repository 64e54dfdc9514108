"""The operator's own Prometheus metrics, on a port of their own."""

from collections import Counter as Counts
from collections.abc import Iterator
from typing import Any

from aiohttp import web
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from moe_operator.kubernetes.kinds import SERVING
from moe_operator.kubernetes.queue import WorkQueue
from moe_operator.kubernetes.store import Store

PREFIX = "moeserving_operator_"
BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Metrics:
    """Counters, gauges and the HTTP server of `/metrics`.

    Attributes:
        calls: number of calls to the API server by verb and kind.
    """

    def __init__(self, queue: WorkQueue[Any], store: Store) -> None:
        self.calls: Counts[tuple[str, str]] = Counts()
        self._registry = CollectorRegistry()
        self._seconds = Histogram(
            f"{PREFIX}reconcile_seconds", "Length of a pass.", buckets=BUCKETS_S, registry=self._registry
        )
        self._passes = Counter(f"{PREFIX}reconciles", "Passes by outcome.", ["outcome"], registry=self._registry)
        Gauge(f"{PREFIX}queue", "Resources that wait for a worker.", registry=self._registry).set_function(
            lambda: len(queue)
        )
        Gauge(f"{PREFIX}resources", "Resources known.", registry=self._registry).set_function(
            lambda: store.count(SERVING)
        )
        self._registry.register(_Calls(self))

    def observe(self, outcome: str, seconds: float) -> None:
        """Counts a pass that ended, with its outcome and length."""
        self._passes.labels(outcome).inc()
        self._seconds.observe(seconds)

    async def start(self, port: int) -> None:
        """Serves `/metrics` on this port of all addresses."""
        app = web.Application()
        app.router.add_get("/metrics", self._answer)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, "0.0.0.0", port).start()

    async def stop(self) -> None:
        """Ends the HTTP server of the metrics."""
        await self._runner.cleanup()

    async def _answer(self, request: web.Request) -> web.Response:
        return web.Response(body=generate_latest(self._registry), headers={"Content-Type": CONTENT_TYPE_LATEST})


class _Calls(Collector):
    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        family = CounterMetricFamily(f"{PREFIX}api_calls", "Calls to the API server.", labels=["verb", "kind"])
        for (verb, kind), count in sorted(self._metrics.calls.items()):
            family.add_metric([verb, kind], count)
        yield family
