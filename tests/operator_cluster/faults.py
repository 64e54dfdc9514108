"""One life of a resource under many faults, beside real controllers; what stands for a kubelet and Prometheus is here.

Each fault is done, reported by a condition where it lasts, mended, and followed by a check that the resource is whole:
as many ready engines as it asks for and each of them once, its claim the same, all its objects there.
"""

import asyncio
import contextlib
import json
import random
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from aiohttp import web
from cluster_problem import ClusterProblem
from controlled import ControlledCluster, Node
from fresh_operator import FreshOperator, conditions, fetch_children, fetch_serving
from moe_contract.api_server import ApiError, ApiServer
from moe_operator.kubernetes.api import Api
from moe_operator.kubernetes.kinds import CLAIM, EVENT, SERVING
from moe_operator.kubernetes.store import Key
from scissors import Killed, Scissors
from serving_documents import serving

Document = dict[str, Any]
ENGINES, PATIENCE_S = 2, 90.0
MOST_CALLS_BETWEEN_KILLS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """A kind of fault.

    Attributes:
        name: of the fault, as the table has it.
        smoke: times in a short run.
        full: times in a full run.
        condition: that each of these faults must set, naming what it happened to; empty where none can.
        reason: of the condition.
        at_the_end: reason of an event that what is left of the fault must have when the resource is deleted.
        otherwise: where it is reported, or why it need not be, for a fault without a condition.
    """

    name: str
    smoke: int
    full: int
    condition: str = ""
    reason: str = ""
    at_the_end: str = ""
    otherwise: str = ""

    @property
    def report(self) -> str:
        """Where it is reported, as the table has it."""
        if not self.condition:
            return self.otherwise
        more = f"; at the end `{self.at_the_end}`" if self.at_the_end else ""
        return f"`{self.condition}`: `{self.reason}`{more}"


KILL = Fault(name="operator killed amid a change", smoke=8, full=200, otherwise="nothing is left half-done")
OUTAGE = Fault(
    name="API server away",
    smoke=1,
    full=20,
    otherwise="no condition can be written; metric `moeserving_operator_reconciles_total`",
)
SILENCE = Fault(name="Prometheus away", smoke=1, full=20, condition="AutoscalingLimited", reason="NoSignal")
EVICTION = Fault(name="engine evicted by its kubelet", smoke=1, full=25, condition="Degraded", reason="PodFailed")
DRAIN = Fault(
    name="engine evicted by a drain of its node", smoke=1, full=25, condition="Progressing", reason="EnginesStarting"
)
LOSS = Fault(
    name="node lost with an engine",
    smoke=2,
    full=20,
    condition="Degraded",
    reason="NodeNotReady",
    at_the_end="NotEnding",
)
QUOTA = Fault(name="quota that comes and goes", smoke=1, full=10, condition="Degraded", reason="Refused")
FAULTS = (KILL, OUTAGE, SILENCE, EVICTION, DRAIN, LOSS, QUOTA)


def render_table(counts: Mapping[str, int]) -> str:
    """The table of a run: each fault, how often, by which condition each of them was reported."""
    rows = [f"| {fault.name} | {counts[fault.name]} | {fault.report} |" for fault in FAULTS]
    return "\n".join(["| fault | times | reported by |", "|---|---|---|", *rows])


@dataclass(slots=True, kw_only=True)
class Prometheus:
    """Has every gateway and nothing to do for engines, while it is there."""

    is_there: bool = True
    port: int = 0

    async def query(self, request: web.Request) -> web.Response:
        if not self.is_there:
            return web.Response(status=503)
        now_s = time.time()
        value = "100" if request.query.get("query", "").startswith("count(") else "0"
        rows = [{"metric": {}, "value": [now_s, value]}]
        return web.json_response({"status": "success", "data": {"resultType": "vector", "result": rows}})


@asynccontextmanager
async def prometheus_listening() -> AsyncIterator[Prometheus]:
    """A Prometheus until the end of the block."""
    prometheus = Prometheus()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", prometheus.query)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        prometheus.port = listener.getsockname()[1]
        await web.SockSite(runner, listener).start()
        try:
            yield prometheus
        finally:
            await runner.cleanup()


def resource(port: int) -> Document:
    """A resource with a claim, whose number of engines follows Prometheus and stays at the least."""
    return serving(
        model={"uri": "hf://org/tiny", "cache": {"path": "/cache", "size": "1Gi", "whenDeleted": "Delete"}},
        engine={"drainTimeout": "1s"},
        autoscaling={"minReplicas": ENGINES, "maxReplicas": 4},
        metrics={"prometheus": {"url": f"http://127.0.0.1:{port}"}},
    )


@dataclass(slots=True, kw_only=True)
class Life:
    """The resource, the operators that follow one another, and the faults that were done."""

    cluster: ControlledCluster
    server: ApiServer
    session: aiohttp.ClientSession
    prometheus: Prometheus
    key: Key
    chance: random.Random
    counts: dict[str, int] = field(default_factory=lambda: {fault.name: 0 for fault in FAULTS})
    reported: dict[str, int] = field(default_factory=lambda: {fault.name: 0 for fault in FAULTS})
    failed_passes: int = 0
    operator: Any = None
    node: Any = None
    claim: str = ""
    lost: set[str] = field(default_factory=set)
    starts_pods: bool = True

    async def begin(self) -> None:
        """Makes the resource, and waits until it is whole."""
        self.node = Node(self.cluster, self.key.namespace)
        self.start()
        place = {"name": self.key.name, "namespace": self.key.namespace}
        await self.operator.api.create(SERVING, resource(self.prometheus.port) | {"metadata": place})
        await self.until(self.is_whole, "it is made")
        self.claim = (await self.operator.api.get(CLAIM, self.key.namespace, "tiny-cache"))["metadata"]["uid"]

    def start(self, calls_left: int = 0) -> None:
        """A fresh operator; with a number of calls it is killed at the last of them."""
        server: Any = self.server
        if calls_left:
            server = Scissors(self.server, calls_left, after=self.chance.random() < 0.5)
        self.operator = FreshOperator(Api(server), self.session, [self.key.namespace])

    async def until(self, holds: Callable[[], Awaitable[bool]], what: str) -> None:
        """Passes, each followed by a kubelet's look at its pods, until it holds."""
        give_up_s = time.monotonic() + PATIENCE_S
        while True:
            try:
                await self.operator.relist()
                await self.operator.reconciler.reconcile(self.key)
                if self.starts_pods:
                    await asyncio.to_thread(self.node.run_pods)
                if await holds():
                    return
            except (ApiError, ClusterProblem):
                self.failed_passes += 1
            assert time.monotonic() < give_up_s, f"{what}: {await self.describe()}"
            await asyncio.sleep(0.05)

    async def describe(self) -> Document:
        """The status, for the message of a failure."""
        return dict((await fetch_serving(Api(self.server), self.key) or {}).get("status", {}))

    async def is_whole(self) -> bool:
        """Whether as many engines are ready as the resource asks for, each counted once, and the conditions say so."""
        live = await fetch_serving(self.operator.api, self.key) or {}
        status, rows = live.get("status", {}), conditions(live)
        running = self.engines()
        names = [row["name"] for row in status.get("engines", []) if row["name"] in running]
        whole = status.get("readyReplicas") == ENGINES == len(set(names)) == len(names) == len(running)
        return whole and rows["Degraded"]["status"] == "False" and rows["AutoscalingLimited"]["reason"] != "NoSignal"

    def engines(self) -> set[str]:
        """The engines that run."""
        pods = [pod for pod in self.node.pods("engine") if "deletionTimestamp" not in pod["metadata"]]
        return {pod["metadata"]["name"] for pod in pods if pod["status"].get("phase") == "Running"}

    async def see(self, fault: Fault, named: str) -> None:
        """Waits until the fault's condition has its reason, and names what the fault happened to."""

        async def is_reported() -> bool:
            row = conditions(await fetch_serving(self.operator.api, self.key) or {})[fault.condition]
            return row["reason"] == fault.reason and named in row["message"]

        await self.until(is_reported, f"{fault.report} names {named}")
        self.reported[fault.name] += 1

    async def do(self, fault: Fault) -> None:
        """Does a fault, has it reported and mended, and checks that all is whole."""
        await {
            KILL.name: self.kill,
            OUTAGE.name: self.outage,
            SILENCE.name: self.silence,
            EVICTION.name: self.evict,
            DRAIN.name: self.drain,
            LOSS.name: self.lose_node,
            QUOTA.name: self.refuse,
        }[fault.name]()
        self.counts[fault.name] += 1
        await self.until(self.is_whole, f"whole after: {fault.name}")
        claim = await self.operator.api.get(CLAIM, self.key.namespace, "tiny-cache")
        assert claim is not None, "the claim is there"
        assert (claim["metadata"]["uid"], "deletionTimestamp" in claim["metadata"]) == (self.claim, False)

    async def kill(self) -> None:
        """Changes several objects, and kills the operator at any call that this takes."""
        port, away = self.chance.randint(1000, 9999), self.chance.randint(1, 9)
        spec = {"gateway": {"service": {"port": port}}, "disruption": {"maxUnavailable": str(away)}}
        await Api(self.server).merge(SERVING, *self.key, {"spec": spec})
        self.start(self.chance.randint(1, MOST_CALLS_BETWEEN_KILLS))
        with contextlib.suppress(Killed):
            # One that has made the change in fewer calls ends at rest.
            for _ in range(3):
                await self.operator.relist()
                await self.operator.reconciler.reconcile(self.key)
        self.start()

        async def is_changed() -> bool:
            found = await fetch_children(self.operator.api, self.key.namespace)
            ports = found["Service", "tiny"]["spec"]["ports"]
            budget = found["PodDisruptionBudget", "tiny-engine"]["spec"]["maxUnavailable"]
            return (ports[0]["port"], budget) == (port, away)

        await self.until(is_changed, "the change is made by the next operator")

    async def outage(self) -> None:
        """Kills the API server; a pass fails; the server comes back."""
        before = self.failed_passes
        self.cluster.stop_api_server(kill=True)
        try:
            await self.operator.relist()
            await self.operator.reconciler.reconcile(self.key)
        except ApiError:
            self.failed_passes += 1
        # Here and not in a thread: a server that is tied ends with the thread that started it.
        self.cluster.start_api_server()
        assert self.failed_passes > before

    async def silence(self) -> None:
        """Prometheus is away until the resource says so."""
        self.prometheus.is_there = False
        await self.see(SILENCE, "Prometheus")
        self.prometheus.is_there = True

    async def evict(self) -> None:
        """A kubelet evicts an engine: its pod is over and stays an object; later it is collected."""
        name = min(self.engines())
        conditions = [{"type": "DisruptionTarget", "status": "True", "reason": "TerminationByKubelet"}]
        await self.set_status(name, {"phase": "Failed", "reason": "Evicted", "conditions": conditions})
        await self.see(EVICTION, name)
        await self.until(self.is_replaced(name), "another engine is ready")
        await asyncio.to_thread(self.node.remove, name)

    async def drain(self) -> None:
        """A node is drained: the eviction API has an engine end, as far as the budget allows it."""
        name, namespace = min(self.engines()), self.key.namespace
        metadata = {"name": name, "namespace": namespace}
        eviction = json.dumps({"apiVersion": "policy/v1", "kind": "Eviction", "metadata": metadata})
        path = f"/api/v1/namespaces/{namespace}/pods/{name}/eviction"

        async def is_allowed() -> bool:
            # Refused until the controller of budgets has counted.
            try:
                await asyncio.to_thread(
                    lambda: self.cluster.kubectl("create", "--raw", path, "-f", "-", stdin=eviction)
                )
            except ClusterProblem:
                # The API server may have carried it out and not have said so.
                if name in self.engines():
                    raise
            return True

        # Until the condition was seen no other engine is ready: a pass may fail, and an eviction have no answer.
        self.starts_pods = False
        await self.until(is_allowed, "the budget lets it go")
        await self.see(DRAIN, f"pod {name} is taken away (EvictionByEvictionAPI)")
        self.starts_pods = True
        await self.until(self.is_replaced(name), "another engine is ready")
        await asyncio.to_thread(self.node.remove, name)

    async def lose_node(self) -> None:
        """A node is lost with an engine; once another one serves, a person deletes the Node, and its pods go."""
        name = await self.lose_engine()
        await asyncio.to_thread(self.node.remove, name)

    async def lose_engine(self) -> str:
        """The pod of a lost node is no longer ready, later marked for deletion, and does not go; returns its name."""
        name = min(self.engines())
        rows = [{"type": "Ready", "status": "False"}, {"type": "ContainersReady", "status": "True"}]
        await self.set_status(name, {"conditions": rows})
        await self.see(LOSS, f"pod {name}")
        target = {"type": "DisruptionTarget", "status": "True", "reason": "DeletionByTaintManager"}
        await self.set_status(name, {"conditions": [*rows, target]})
        words = ("delete", "pod", name, "-n", self.key.namespace, "--wait=false")
        await asyncio.to_thread(self.cluster.kubectl, *words)
        await self.until(self.is_replaced(name), "another engine is ready")
        return name

    async def set_status(self, pod: str, status: Document) -> None:
        """Writes the status of a pod, as a kubelet or a controller does."""
        words = ("pod", pod, "-n", self.key.namespace, "--subresource=status", "--type=merge")
        await asyncio.to_thread(self.cluster.kubectl, "patch", *words, "-p", json.dumps({"status": status}))

    def is_replaced(self, name: str) -> Callable[[], Awaitable[bool]]:
        """Whether all engines are ready without this one."""

        async def holds() -> bool:
            running = self.engines()
            return name not in running and len(running) == ENGINES and await self.is_whole()

        return holds

    async def refuse(self) -> None:
        """A quota refuses an object that has to be made anew, until it is taken away."""
        namespace = self.key.namespace
        words = ("create", "quota", "none", "-n", namespace, "--hard=count/configmaps=0")
        await asyncio.to_thread(self.cluster.kubectl, *words)
        await asyncio.to_thread(self._wait_for_quota)
        await asyncio.to_thread(self.cluster.kubectl, "delete", "configmap", "tiny-settings", "-n", namespace)
        await self.see(QUOTA, "exceeded quota: none")
        await asyncio.to_thread(self.cluster.kubectl, "delete", "quota", "none", "-n", namespace)

    def _wait_for_quota(self) -> None:
        """The API server keeps to a quota once its controller has counted."""
        give_up_s = time.monotonic() + PATIENCE_S
        words = ("get", "quota", "none", "-n", self.key.namespace, "-o", "jsonpath={.status.hard}")
        while not self.cluster.kubectl(*words):
            assert time.monotonic() < give_up_s, "the quota is counted"
            time.sleep(0.1)

    async def end(self) -> None:
        """Deletes the resource while the pod of a lost node still hangs, and has all else go."""
        await self.lose_engine()
        await self.operator.api.delete(SERVING, {"metadata": {"name": "tiny", "namespace": self.key.namespace}})

        async def is_gone() -> bool:
            running = [pod for pod in self.node.pods() if pod["metadata"]["name"] not in self.lost]
            await asyncio.to_thread(self.node.remove_ended_of, {pod["metadata"]["name"] for pod in running})
            return await fetch_serving(Api(self.server), self.key) is None

        self.lost = {pod["metadata"]["name"] for pod in self.node.pods() if "deletionTimestamp" in pod["metadata"]}
        await self.until(is_gone, "it is gone")
        fields = "involvedObject.kind=MoEServing,involvedObject.name=tiny"
        events = await Api(self.server).select(EVENT, self.key.namespace, fields=fields)
        reasons = {row["reason"] for row in events}
        assert not self.lost or LOSS.at_the_end in reasons, f"pods of lost nodes are reported: {reasons}"
        left = await fetch_children(Api(self.server), self.key.namespace)
        assert [place for place, row in left.items() if "deletionTimestamp" not in row["metadata"]] == []
        assert {pod["metadata"]["name"] for pod in self.node.pods()} <= self.lost
