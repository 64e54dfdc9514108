"""The operator's own Prometheus metrics and its readiness, on a port of their own."""

from collections import Counter as Counts
from collections.abc import Callable, Iterator
from typing import Any

from aiohttp import web
from moe_contract.addresses import ANY, bind_socket
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from moe_operator.kubernetes.kinds import SERVING
from moe_operator.kubernetes.presence import Presence, Role
from moe_operator.kubernetes.queue import WorkQueue
from moe_operator.kubernetes.store import Store

PREFIX = "moeserving_operator_"
BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Metrics:
    """Counters, gauges and the HTTP server of `/metrics`.

    Attributes:
        calls: number of calls to the API server by verb and kind.
        describe: says what this operator does now.
    """

    def __init__(self, queue: WorkQueue[Any], store: Store) -> None:
        self.calls: Counts[tuple[str, str]] = Counts()
        self.describe: Callable[[], Presence] = Presence
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
        self._registry.register(_Presence(self))

    def observe(self, outcome: str, seconds: float) -> None:
        """Counts a pass that ended, with its outcome and length."""
        self._passes.labels(outcome).inc()
        self._seconds.observe(seconds)

    async def start(self, port: int) -> None:
        """Serves `/metrics` on this port of all addresses, of both families."""
        app = web.Application()
        app.router.add_get("/metrics", self._answer)
        app.router.add_get("/readyz", self._answer_readiness)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        await web.SockSite(self._runner, bind_socket(ANY, port)).start()

    async def stop(self) -> None:
        """Ends the HTTP server of the metrics."""
        await self._runner.cleanup()

    async def _answer(self, request: web.Request) -> web.Response:
        return web.Response(body=generate_latest(self._registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def _answer_readiness(self, request: web.Request) -> web.Response:
        presence = self.describe()
        return web.json_response(presence.document(), status=200 if presence.is_ready else 503)


class _Presence(Collector):
    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        presence = self._metrics.describe()
        role = GaugeMetricFamily(f"{PREFIX}role", "1 for the part that this operator has now.", labels=["role"])
        for known in Role:
            role.add_metric([known.value], float(known is presence.role))
        yield role
        blind = GaugeMetricFamily(
            f"{PREFIX}unreadable",
            "1 for each kind in a namespace (empty: all) that cannot be read.",
            labels=["kind", "namespace"],
        )
        for kind, namespace in presence.unreadable:
            blind.add_metric([kind, namespace], 1.0)
        yield blind


class _Calls(Collector):
    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        family = CounterMetricFamily(f"{PREFIX}api_calls", "Calls to the API server.", labels=["verb", "kind"])
        for (verb, kind), count in sorted(self._metrics.calls.items()):
            family.add_metric([verb, kind], count)
        yield family
