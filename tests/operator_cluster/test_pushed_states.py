"""States that agents push: a change calls for a pass and reaches the status, and nobody is asked meanwhile."""

import asyncio
from collections import Counter

import aiohttp
import orjson
from aiohttp import web
from aiohttp.test_utils import TestServer
from cluster_api import ApiCluster
from fresh_operator import fetch_serving, served, started
from moe_contract.pod_identity import identity_variables
from moe_contract.state_stream import stream_headers
from moe_operator.kubernetes.kinds import POD
from moe_operator.kubernetes.reconciler import Reconciler
from moe_operator.kubernetes.state_streams import StateStreams
from moe_operator.kubernetes.store import Key
from moe_operator.plan import Defaults
from moe_operator.plan.names import Names
from stand_in_peers import READY

PATIENCE_S = 30.0


class Agent:
    """An agent that streams what it is made to say."""

    def __init__(self) -> None:
        self.lines: asyncio.Queue[bytes] = asyncio.Queue()
        self.asked: Counter[str] = Counter()
        self.settings: dict[str, object] = {}
        self.pod: dict[str, str] = {}

    def state(self, restarts: int) -> dict[str, object]:
        engine = {"restarts": restarts}
        return {"phase": "ready", "accepting": True, "engine": engine, "config": self.settings, "pod": self.pod}

    def say(self, restarts: int) -> None:
        self.lines.put_nowait(orjson.dumps(self.state(restarts)) + b"\n")

    async def get_state(self, request: web.Request) -> web.StreamResponse:
        self.asked[request.query.get("watch", "once")] += 1
        if "watch" not in request.query:
            return web.json_response(self.state(0))
        stream = web.StreamResponse(headers=stream_headers(15.0))
        await stream.prepare(request)
        while line := await self.lines.get():
            await stream.write(line)
        return stream

    async def put_config(self, request: web.Request) -> web.Response:
        self.settings.update(await request.json())
        self.say(0)
        return web.json_response({})

    def build(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/v1/state", self.get_state)
        app.router.add_put("/v1/config", self.put_config)
        return app


def pod_of(key: Key, port: int) -> dict[str, object]:
    names = Names(key.name)
    metadata = {"name": "e-0", "namespace": key.namespace, "labels": names.labels("engine", "stable")}
    ports = [{"name": "agent", "containerPort": port}]
    spec = {"containers": [{"name": "engine", "image": "none", "ports": ports, "env": identity_variables()}]}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


async def test_a_change_that_is_pushed_reaches_the_status_and_nobody_is_asked(
    serving_cluster: ApiCluster, namespace: str
) -> None:
    agent, changes = Agent(), asyncio.Queue[tuple[Key, bool]]()
    async with (
        TestServer(agent.build()) as server,
        started(serving_cluster.kubeconfig, namespace) as operator,
        aiohttp.ClientSession() as session,
    ):
        streams = StateStreams(session, lambda key, numbers_only: changes.put_nowait((key, numbers_only)))
        operator.reconciler = Reconciler(
            operator.api, operator.store, session, Defaults(), lambda: operator.kinds, streams=streams
        )
        key = await served(operator, namespace)
        made = await operator.api.create(POD, pod_of(key, server.port or 0))
        agent.pod = {"name": "e-0", "uid": made["metadata"]["uid"]}
        status = {"phase": "Running", "podIP": "127.0.0.1", "conditions": READY}
        await operator.api.server.merge(POD, namespace, "e-0", {"status": status}, "kubelet", subresource="status")
        await operator.relist()
        agent.say(0)
        await operator.reconciler.reconcile(key)
        assert await asyncio.wait_for(changes.get(), PATIENCE_S) == (key, False), "the settings that the pass gave it"
        await operator.settle(key)
        agent.say(7)
        assert await asyncio.wait_for(changes.get(), PATIENCE_S) == (key, False)
        await operator.settle(key)
        document = await fetch_serving(operator.api, key) or {}
        assert [row["restarts"] for row in document["status"]["engines"]] == [7]
        assert agent.asked == {"1": 1, "once": 1}, "once for its identity, before it got settings"
        agent.lines.put_nowait(b"")
        await streams.close()
