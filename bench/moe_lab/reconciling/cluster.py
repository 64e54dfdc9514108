"""Resources and pods on an API server that has no nodes, and a stand-in for all agents and gateways.

Where no controller runs nobody makes pods of a Deployment: one engine and one gateway of each resource are made here,
as ready as a kubelet would tell, at an address where the stand-in answers.
"""

import asyncio
import contextlib
import ipaddress
import socket
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any

import httpx2
from aiohttp import web
from lightkube import AsyncClient, KubeConfig
from lightkube.generic_resource import GenericGlobalResource, create_api_info
from lightkube.types import PatchType
from moe_operator.api.crd import build_crd
from moe_operator.api.resource import API_VERSION, KIND
from moe_operator.kubernetes.api import Api
from moe_operator.kubernetes.kinds import DEPLOYMENT, POD, SERVING, Kind
from moe_operator.plan.names import Names

Document = dict[str, Any]
NAMESPACE = "bench"
AT_A_TIME = 8
_NAMESPACES = Kind("", "v1", "Namespace", "namespaces")
_CRDS = Kind("apiextensions.k8s.io", "v1", "CustomResourceDefinition", "customresourcedefinitions")
READY = [{"type": "Ready", "status": "True"}]


def build_serving(name: str) -> Document:
    """A small resource."""
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
                    {"name": component, "image": "none", "ports": [{"name": port_name, "containerPort": port}]}
                ]
            },
        }
        for component, workload, labels, port_name in (
            ("engine", names.engine, names.labels("engine", "stable"), "agent"),
            ("gateway", names.gateway, names.labels("gateway"), "admin"),
        )
    ]


class Cluster:
    """The API server as this benchmark uses it."""

    def __init__(self, client: AsyncClient) -> None:
        self._client: Any = client
        self.api = Api(client)

    async def prepare(self) -> None:
        """The CRD and a namespace."""
        patch = {"patch_type": PatchType.APPLY, "field_manager": "bench", "force": True}
        crd = build_crd()
        await self._client.patch(_cluster_wide(_CRDS), crd["metadata"]["name"], crd, **patch)
        namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}}
        await self._client.patch(_cluster_wide(_NAMESPACES), NAMESPACE, namespace, **patch)
        while True:
            with contextlib.suppress(httpx2.HTTPStatusError):
                await self.api.list(SERVING, [NAMESPACE])
                return
            await asyncio.sleep(0.1)

    async def create(self, names: Iterable[str]) -> None:
        """Resources."""
        await _each(names, lambda name: self.api.create(SERVING, build_serving(name)))

    async def create_pods(self, names: Iterable[str], port: int) -> None:
        """Their pods, ready, each at a loopback address of its own; their Deployments say so."""
        addresses = map(str, ipaddress.IPv4Network("127.1.0.0/16").hosts())

        async def create(name: str) -> None:
            for pod in build_pods(name, port):
                await self.api.create(POD, pod)
                status = {"phase": "Running", "podIP": next(addresses), "conditions": READY}
                await self._set_status(POD, pod["metadata"]["name"], status)
            for workload in (Names(name).engine, Names(name).gateway):
                counts = {"observedGeneration": 1, "replicas": 1, "updatedReplicas": 1, "readyReplicas": 1}
                await self._set_status(DEPLOYMENT, workload, counts)

        await _each(names, create)

    async def _set_status(self, kind: Kind, name: str, status: Document) -> None:
        await self._client.patch(kind.status, name, {"status": status}, namespace=NAMESPACE, patch_type=PatchType.MERGE)

    async def delete(self, names: Iterable[str]) -> None:
        """Resources; their pods go at once, as no kubelet has to end them."""

        async def delete(name: str) -> None:
            await self.api.delete(SERVING, build_serving(name))
            for pod in build_pods(name, 1):
                await self.api.delete(POD, pod)

        await _each(names, delete)

    async def servings(self) -> list[Document]:
        """All resources."""
        return await self.api.list(SERVING, [NAMESPACE]) or []

    async def set_replicas(self, name: str, replicas: int) -> None:
        """A change of one resource."""
        await self.api.merge(SERVING, NAMESPACE, name, {"spec": {"engine": {"replicas": replicas}}})

    async def deployed_replicas(self, name: str) -> int:
        """What its engines' Deployment has."""
        found = await self.api.get(DEPLOYMENT, NAMESPACE, Names(name).engine)
        return int(found["spec"]["replicas"]) if found is not None else -1


def is_converged(document: Document) -> bool:
    """Whether the operator says that this generation is as it should be."""
    status = document.get("status", {})
    conditions = {row["type"]: row["status"] for row in status.get("conditions", [])}
    told = status.get("observedGeneration") == document["metadata"]["generation"]
    return bool(told and conditions.get("Degraded") == "False")


@contextlib.asynccontextmanager
async def connect(kubeconfig: Path) -> AsyncIterator[Cluster]:
    """The cluster that the file names.

    Raises:
        ConfigError: there is no such file, or it is no kubeconfig.
    """
    client = AsyncClient(KubeConfig.from_file(kubeconfig).get(), timeout=httpx2.Timeout(60.0), trust_env=False)
    try:
        yield Cluster(client)
    finally:
        await client.close()


@contextlib.asynccontextmanager
async def stand_in() -> AsyncIterator[int]:
    """Answers at every loopback address as an idle agent and an idle gateway; gives its port.

    What it is told at an address is in force there from then on.
    """
    settings: defaultdict[str, Document] = defaultdict(dict)

    def address(request: web.Request) -> str:
        transport = request.transport
        return str(transport.get_extra_info("sockname")[0]) if transport is not None else ""

    async def tell(request: web.Request) -> web.Response:
        return web.json_response(build_state(settings[address(request)]))

    async def take(request: web.Request) -> web.Response:
        settings[address(request)].update(await request.json())
        return web.json_response({})

    app = web.Application()
    app.router.add_get("/v1/state", tell)
    app.router.add_put("/v1/config", take)
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


def _cluster_wide(kind: Kind) -> Any:
    info = create_api_info(kind.group, kind.version, kind.name, kind.plural)
    return type(kind.name, (GenericGlobalResource,), {"_api_info": info})
