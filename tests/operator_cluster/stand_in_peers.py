"""Pods with the status that a kubelet would set, and agents and gateways that answer at their addresses."""

import contextlib
import itertools
import socket
from collections import defaultdict
from collections.abc import AsyncIterator
from typing import Any

from aiohttp import web
from moe_contract.pod_identity import identity_variables
from moe_operator.kubernetes.api import Api
from moe_operator.kubernetes.kinds import POD
from moe_operator.kubernetes.serving import ENDPOINT_SLICE, SERVICE_LABEL
from moe_operator.kubernetes.store import Key
from moe_operator.plan.names import Names

Document = dict[str, Any]
READY = [{"type": "Ready", "status": "True"}]


class Peers:
    """Answers at every loopback address as an agent or a gateway.

    By address: `settings` holds what was put there, `calls` the tokens that came with it, `pods` who answers, `further`
    what its state has beside the usual.
    """

    def __init__(self, tokens: set[str] | None = None) -> None:
        self.settings: dict[str, Document] = {}
        self.calls: dict[str, list[str]] = defaultdict(list)
        self.pods: dict[str, Document] = {}
        self.further: dict[str, Document] = defaultdict(dict)
        self.tokens = tokens
        self.port = 0
        self.accepting = True
        self._addresses = (f"127.2.0.{number}" for number in itertools.count(1))

    async def make(
        self, api: Api, key: Key, component: str, name: str, *, revision: str = "stable", **labels: str
    ) -> str:
        """A ready pod; its address."""
        names, address = Names(key.name), next(self._addresses)
        own = names.labels(component, revision if component == "engine" else None)
        port = {"name": "agent" if component == "engine" else "admin", "containerPort": self.port}
        metadata = {"name": name, "namespace": key.namespace, "labels": own | labels}
        container = {"name": component, "image": "none", "ports": [port], "env": identity_variables()}
        spec = {"containers": [container]}
        made = await api.create(POD, {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec})
        self.pods[address] = {"name": name, "uid": made["metadata"]["uid"]}
        status = {"phase": "Running", "podIP": address, "conditions": READY}
        await api.server.merge(POD, key.namespace, name, {"status": status}, "kubelet", subresource="status")
        if component == "gateway":
            await api.create(ENDPOINT_SLICE, endpoint_slice(key, name, names.service))
        return address

    async def get_state(self, request: web.Request) -> web.Response:
        rank = {"rank": 0, "running": 1, "waiting": 0, "kv_usage": 0.5, "computed_tokens": 0}
        config = self.settings.setdefault(_address(request), {})
        state = {
            "phase": "ready",
            "accepting": self.accepting,
            "engine": {"restarts": 0},
            "ranks": [rank],
            "config": config,
            "held": 0,
        }
        state |= self.further[_address(request)]
        return web.json_response(state | {"pod": self.pods.get(_address(request), {})})

    async def put_config(self, request: web.Request) -> web.Response:
        token = request.headers["Authorization"].removeprefix("Bearer ")
        self.calls[_address(request)].append(token)
        if self.tokens is not None and token not in self.tokens:
            return web.json_response({"errors": []}, status=401)
        self.settings.setdefault(_address(request), {}).update(await request.json())
        return web.json_response({})


def endpoint_slice(key: Key, name: str, service: str) -> Document:
    """What the controller of EndpointSlices makes of a ready pod behind a Service, but for the address.

    The API server takes no loopback address there.
    """
    return {
        "apiVersion": ENDPOINT_SLICE.api_version,
        "kind": ENDPOINT_SLICE.name,
        "metadata": {"name": name, "namespace": key.namespace, "labels": {SERVICE_LABEL: service}},
        "addressType": "IPv4",
        "endpoints": [{"addresses": ["192.0.2.1"], "conditions": {"ready": True}}],
        "ports": [{"name": "http", "port": 8000, "protocol": "TCP"}],
    }


def _address(request: web.Request) -> str:
    assert request.transport is not None
    return str(request.transport.get_extra_info("sockname")[0])


@contextlib.asynccontextmanager
async def peers_listening() -> AsyncIterator[Peers]:
    """Until the end of the block."""
    peers = Peers()
    app = web.Application()
    app.router.add_get("/v1/state", peers.get_state)
    app.router.add_put("/v1/config", peers.put_config)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    with socket.create_server(("0.0.0.0", 0)) as listener:
        peers.port = listener.getsockname()[1]
        await web.SockSite(runner, listener).start()
        try:
            yield peers
        finally:
            await runner.cleanup()
