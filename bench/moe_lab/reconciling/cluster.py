"""Resources and pods on an API server that has no nodes, and a stand-in for all agents and gateways.

Where no controller runs nobody makes pods of a Deployment: one engine and one gateway of each resource are made here,
with the status that a kubelet would set, at an address where the stand-in answers.
"""

import asyncio
import contextlib
import ipaddress
import socket
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from aiohttp import web
from moe_contract.api_server import ApiError, ApiServer, Kind
from moe_contract.pod_identity import identity_variables
from moe_operator.api.crd import build_crd
from moe_operator.api.resource import API_VERSION, KIND
from moe_operator.kubernetes.api import Api
from moe_operator.kubernetes.kinds import DEPLOYMENT, POD, SERVING
from moe_operator.kubernetes.serving import ENDPOINT_SLICE, SERVICE_LABEL
from moe_operator.plan.names import Names

Document = dict[str, Any]
NAMESPACE = "bench"
AT_A_TIME = 8
_NAMESPACES = Kind("", "v1", "Namespace", "namespaces", namespaced=False)
_CRDS = Kind("apiextensions.k8s.io", "v1", "CustomResourceDefinition", "customresourcedefinitions", namespaced=False)
_MANAGER = "bench"
READY = [{"type": "Ready", "status": "True"}]


def build_serving(name: str) -> Document:
    """The smallest resource of this name with one engine."""
    metadata = {"name": name, "namespace": NAMESPACE}
    spec = {"model": {"uri": "hf://org/model"}, "engine": {"replicas": 1}}
    return {"apiVersion": API_VERSION, "kind": KIND, "metadata": metadata, "spec": spec}


def build_pods(name: str, port: int) -> list[Document]:
    """An engine and a gateway of a resource, whose agent and admin port are the stand-in's."""
    names = Names(name)
    return [
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": f"{workload}-0", "namespace": NAMESPACE, "labels": labels},
            "spec": {
                "containers": [
                    {
                        "name": component,
                        "image": "none",
                        "ports": [{"name": port_name, "containerPort": port}],
                        "env": identity_variables(),
                    }
                ]
            },
        }
        for component, workload, labels, port_name in (
            ("engine", names.engine, names.labels("engine", "stable"), "agent"),
            ("gateway", names.gateway, names.labels("gateway"), "admin"),
        )
    ]


def build_endpoints(name: str) -> Document:
    """What the controller of EndpointSlices makes of the ready gateway behind a resource's Service."""
    return {
        "apiVersion": ENDPOINT_SLICE.api_version,
        "kind": ENDPOINT_SLICE.name,
        "metadata": {"name": name, "namespace": NAMESPACE, "labels": {SERVICE_LABEL: Names(name).service}},
        "addressType": "IPv4",
        # The API server takes no loopback address, which is where the stand-in answers.
        "endpoints": [{"addresses": ["192.0.2.1"], "conditions": {"ready": True}}],
        "ports": [{"name": "http", "port": 8000, "protocol": "TCP"}],
    }


class BenchmarkCluster:
    """The API server as this benchmark uses it; `pods` has name and uid of each pod by its address."""

    def __init__(self, server: ApiServer) -> None:
        self._server = server
        self.pods: dict[str, Document] = {}
        self.api = Api(server)

    async def prepare(self) -> None:
        """Applies the CRD and the namespace; returns once the kind is served."""
        await self._server.apply(_CRDS, build_crd(), _MANAGER)
        namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}}
        await self._server.apply(_NAMESPACES, namespace, _MANAGER)
        while True:
            with contextlib.suppress(ApiError):
                await self.api.list(SERVING, NAMESPACE)
                return
            await asyncio.sleep(0.1)

    async def create(self, names: Iterable[str]) -> None:
        """Creates the resources of these names."""
        await _each(names, lambda name: self.api.create(SERVING, build_serving(name)))

    async def create_pods(self, names: Iterable[str], port: int) -> None:
        """Creates their pods, ready, each at its own loopback address, and sets the status of their Deployments."""
        addresses = map(str, ipaddress.IPv4Network("127.1.0.0/16").hosts())

        async def create(name: str) -> None:
            for pod in build_pods(name, port):
                made, address = (await self.api.create(POD, pod))["metadata"], next(addresses)
                self.pods[address] = {"name": made["name"], "uid": made["uid"]}
                status = {"phase": "Running", "podIP": address, "conditions": READY}
                await self._set_status(POD, pod["metadata"]["name"], status)
            await self.api.create(ENDPOINT_SLICE, build_endpoints(name))
            for workload in (Names(name).engine, Names(name).gateway):
                counts = {"observedGeneration": 1, "replicas": 1, "updatedReplicas": 1, "readyReplicas": 1}
                await self._set_status(DEPLOYMENT, workload, counts)

        await _each(names, create)

    async def _set_status(self, kind: Kind, name: str, status: Document) -> None:
        await self._server.merge(kind, NAMESPACE, name, {"status": status}, _MANAGER, subresource="status")

    async def delete(self, names: Iterable[str]) -> None:
        """Deletes the resources and their pods; no kubelet delays the end of a pod here."""

        async def delete(name: str) -> None:
            await self.api.delete(SERVING, build_serving(name))
            for pod in build_pods(name, 1):
                await self.api.delete(POD, pod)
            await self.api.delete(ENDPOINT_SLICE, build_endpoints(name))

        await _each(names, delete)

    async def servings(self) -> list[Document]:
        """All resources of the benchmark's namespace."""
        listing = await self.api.list(SERVING, NAMESPACE)
        return [] if listing is None else listing.items

    async def set_replicas(self, name: str, replicas: int) -> None:
        """Changes the replicas of one resource."""
        await self.api.merge(SERVING, NAMESPACE, name, {"spec": {"engine": {"replicas": replicas}}})

    async def deployed_replicas(self, name: str) -> int:
        """Replicas of its engines' Deployment; -1 without one."""
        found = await self.api.get(DEPLOYMENT, NAMESPACE, Names(name).engine)
        return int(found["spec"]["replicas"]) if found is not None else -1


def is_converged(document: Document) -> bool:
    """Whether the operator says that this generation is as it should be."""
    status = document.get("status", {})
    conditions = {row["type"]: row["status"] for row in status.get("conditions", [])}
    is_current = status.get("observedGeneration") == document["metadata"]["generation"]
    return bool(is_current and conditions.get("Degraded") == "False")


@contextlib.asynccontextmanager
async def connect(kubeconfig: Path) -> AsyncIterator[BenchmarkCluster]:
    """The cluster that the file names.

    Raises:
        LoginError: there is no such file, or it is no kubeconfig.
    """
    server = ApiServer(kubeconfig, trust_env=False)
    try:
        yield BenchmarkCluster(server)
    finally:
        await server.close()


@contextlib.asynccontextmanager
async def stand_in(pods: Mapping[str, Document]) -> AsyncIterator[int]:
    """Answers at every loopback address as an idle agent and an idle gateway; yields its port.

    Settings that are put at an address are in force there from then on; `pods` has the pod of each address.
    """
    settings: defaultdict[str, Document] = defaultdict(dict)

    def address(request: web.Request) -> str:
        transport = request.transport
        return str(transport.get_extra_info("sockname")[0]) if transport is not None else ""

    async def get_state(request: web.Request) -> web.Response:
        at = address(request)
        return web.json_response(build_state(settings[at]) | {"pod": pods.get(at, {})})

    async def put_config(request: web.Request) -> web.Response:
        settings[address(request)].update(await request.json())
        return web.json_response({})

    app = web.Application()
    app.router.add_get("/v1/state", get_state)
    app.router.add_put("/v1/config", put_config)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    with socket.create_server(("0.0.0.0", 0), backlog=1024) as listener:
        await web.SockSite(runner, listener).start()
        try:
            yield int(listener.getsockname()[1])
        finally:
            await runner.cleanup()


def build_state(settings: Document) -> Document:
    """The state of an idle agent and of an idle gateway at once."""
    return {
        "phase": "ready",
        "accepting": True,
        "engine": {"restarts": 0, "last_exit": ""},
        "ranks": [{"rank": 0, "running": 0, "waiting": 0, "kv_usage": 0.0, "computed_tokens": 0}],
        "config": settings,
        "held": 0,
    }


async def _each(names: Iterable[str], do: Callable[[str], Awaitable[object]]) -> None:
    gate = asyncio.Semaphore(AT_A_TIME)

    async def guarded(name: str) -> None:
        async with gate:
            await do(name)

    await asyncio.gather(*map(guarded, names))
