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

from moe_operator.api.status import ConditionStatus
from moe_operator.kubernetes.conditions import READY, is_bad, read_conditions
from moe_operator.kubernetes.kinds import SERVING
from moe_operator.kubernetes.presence import Presence, Role
from moe_operator.kubernetes.queue import WorkQueue
from moe_operator.kubernetes.store import Key, Mark, Store

PREFIX = "moeserving_operator_"
BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Metrics:
    """Counters, gauges and the HTTP server of `/metrics`.

    Attributes:
        calls: number of calls to the API server by verb and kind.
        describe: says what this operator does now.
        registry: all families of the operator.
    """

    def __init__(self, queue: WorkQueue[Any], store: Store) -> None:
        self.calls: Counts[tuple[str, str]] = Counts()
        self.describe: Callable[[], Presence] = Presence
        self.registry = CollectorRegistry()
        self._seconds = Histogram(
            f"{PREFIX}reconcile_seconds", "Length of a pass.", buckets=BUCKETS_S, registry=self.registry
        )
        self._passes = Counter(f"{PREFIX}reconciles", "Passes by outcome.", ["outcome"], registry=self.registry)
        Gauge(f"{PREFIX}queue", "Resources that wait for a worker.", registry=self.registry).set_function(
            lambda: len(queue)
        )
        Gauge(f"{PREFIX}resources", "Resources known.", registry=self.registry).set_function(
            lambda: store.count(SERVING)
        )
        self.registry.register(_Calls(self))
        self.registry.register(_Presence(self))
        self.registry.register(_Conditions(store))

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
        return web.Response(body=generate_latest(self.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

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


class _Conditions(Collector):
    """Of each resource the condition `Ready`, and the others that are True or that a person has to act on.

    A resource is read again when it has changed: with 1,000 of them a scrape would read all statuses for nothing.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._rows: dict[Key, tuple[Mark, list[list[str]]]] = {}

    def describe(self) -> list[Metric]:
        """No names ahead of the first scrape: a registry would otherwise read all resources to learn them."""
        return []

    def collect(self) -> Iterator[Metric]:
        text = (
            "1 for the condition Ready of each resource, and for each other one that is True or wants a person to act."
        )
        labels = ["resource_namespace", "resource", "condition", "status", "reason"]
        family = GaugeMetricFamily(f"{PREFIX}condition", text, labels=labels)
        before, self._rows = self._rows, {}
        for key, mark in self._store.marks(SERVING):
            known = before.get(key)
            rows = known[1] if known is not None and known[0] == mark else self._read(key)
            self._rows[key] = mark, rows
            for row in rows:
                family.add_metric(row, 1.0)
        yield family

    def _read(self, key: Key) -> list[list[str]]:
        return [
            [key.namespace, key.name, kind, condition.status.value, condition.reason]
            for kind, condition in read_conditions(self._store.serving(key) or {}).items()
            if kind == READY or condition.status is ConditionStatus.TRUE or is_bad(condition)
        ]
