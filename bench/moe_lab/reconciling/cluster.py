"""Resources and pods on an API server that has no nodes.

Where no controller runs nobody makes pods of a Deployment: one engine and one gateway of each resource are made here,
with the status that a kubelet would set, at an address where `stand_in` answers.
"""

import asyncio
import contextlib
import ipaddress
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any, cast

from moe_contract.api_server import ApiError, ApiServer, Kind
from moe_contract.pod_identity import identity_variables
from moe_operator.api.resource import API_VERSION, KIND
from moe_operator.kubernetes.api import Api
from moe_operator.kubernetes.kinds import CHILDREN, DEPLOYMENT, POD, SERVING
from moe_operator.kubernetes.serving import ENDPOINT_SLICE, SERVICE_LABEL
from moe_operator.plan.names import Names

from moe_lab.reconciling.bound import Bound, measure_bound

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
        self._crd: Document | None = None

    async def prepare(self, crd: Document) -> None:
        """Has this CRD and no other, and the namespace; returns once the kind is served.

        Another CRD goes before, with the resources: a changed one would fill in the old defaults for a while.
        """
        if crd == self._crd:
            return
        name = crd["metadata"]["name"]
        if self._crd is not None:
            await self._server.delete(_CRDS, "", name)
            await _until(lambda: self._has_crd(name), wanted=False)
        await self._server.apply(_CRDS, crd, _MANAGER)
        namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}}
        await self._server.apply(_NAMESPACES, namespace, _MANAGER)
        await _until(self._serves_kind, wanted=True)
        self._crd = crd

    async def _has_crd(self, name: str) -> bool:
        return name in {row["metadata"]["name"] for row in (await self._server.list(_CRDS, None)).items}

    async def _serves_kind(self) -> bool:
        with contextlib.suppress(ApiError):
            await self.api.list(SERVING, NAMESPACE)
            return True
        return False

    async def create(self, names: Iterable[str]) -> None:
        """Creates the resources of these names."""
        await _each(names, lambda name: self.api.create(SERVING, build_serving(name)))

    async def create_pods(self, names: Iterable[str], port: int) -> dict[str, str]:
        """Creates their pods, ready, each at its own loopback address, and sets the status of their Deployments.

        Returns the address of each resource's engine.
        """
        addresses = map(str, ipaddress.IPv4Network("127.1.0.0/16").hosts())
        engines: dict[str, str] = {}

        async def create(name: str) -> None:
            for pod in build_pods(name, port):
                made, address = (await self.api.create(POD, pod))["metadata"], next(addresses)
                self.pods[address] = {"name": made["name"], "uid": made["uid"]}
                engines.setdefault(name, address)
                status = {"phase": "Running", "podIP": address, "conditions": READY}
                await self._set_status(POD, pod["metadata"]["name"], status)
            await self.api.create(ENDPOINT_SLICE, build_endpoints(name))
            for workload in (Names(name).engine, Names(name).gateway):
                counts = {"observedGeneration": 1, "replicas": 1, "updatedReplicas": 1, "readyReplicas": 1}
                await self._set_status(DEPLOYMENT, workload, counts)

        await _each(names, create)
        return engines

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

    async def bound(self, names: Iterable[str], processes: Iterable[int]) -> Bound:
        """Measures the bare client on resources of these names, which it makes and takes away again."""
        made: list[Document] = []

        async def create(name: str) -> None:
            made.append(await self.api.create(SERVING, build_serving(name)))

        await _each(names, create)
        bound = await measure_bound(self._server, made, AT_A_TIME, processes)
        await self.empty()
        return bound

    async def empty(self) -> None:
        """Deletes all that the benchmark and an operator made, without one."""
        for kind in (SERVING, *CHILDREN):
            await self._empty(kind)

    async def _empty(self, kind: Kind) -> None:
        """Deletes all objects of a kind that the benchmark made."""

        async def delete(name: str) -> None:
            if kind == SERVING:
                patch: Document = {"metadata": {"finalizers": None}}
                await self._server.merge(kind, NAMESPACE, name, patch, _MANAGER)
            await self.api.delete(kind, {"metadata": {"namespace": NAMESPACE, "name": name}})

        listing = await self.api.list(kind, NAMESPACE)
        await _each([row["metadata"]["name"] for row in ([] if listing is None else listing.items)], delete)

    async def version(self) -> str:
        """The version of the resources, from which `wait_until` can go on."""
        return (await self._server.list(SERVING, NAMESPACE)).version

    async def wait_until(
        self, names: Iterable[str], shows: Callable[[Document], bool], version: str, started_s: float
    ) -> tuple[float, ...]:
        """Seconds from a start until each of these resources, as it was written after a version, shows something."""
        left, seconds = set(names), []
        while left:
            async with contextlib.aclosing(
                cast(
                    AsyncGenerator[Document],
                    self._server.watch(SERVING, NAMESPACE, "", version, watch_s=60.0, silence_s=90.0),
                )
            ) as events:
                async for event in events:
                    row, version = event["object"], event["object"]["metadata"]["resourceVersion"]
                    if row["metadata"].get("name") in left and shows(row):
                        left.discard(row["metadata"]["name"])
                        seconds.append(time.monotonic() - started_s)
                    if not left:
                        break
        return tuple(seconds)

    async def set_all_ready(self, names: Iterable[str], *, ready: bool) -> None:
        """Sets the readiness of the engines of these resources, some at a time."""
        await _each(names, lambda name: self.set_ready(name, ready=ready))

    async def set_ready(self, name: str, *, ready: bool) -> None:
        """Sets the readiness of a resource's engine, as a kubelet does."""
        conditions = READY if ready else [{"type": "Ready", "status": "False"}]
        await self._set_status(POD, f"{Names(name).engine}-0", {"conditions": conditions})


async def _until(holds: Callable[[], Awaitable[bool]], *, wanted: bool) -> None:
    while True:
        if await holds() is wanted:
            return
        await asyncio.sleep(0.1)


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


async def _each(names: Iterable[str], do: Callable[[str], Awaitable[object]]) -> None:
    gate = asyncio.Semaphore(AT_A_TIME)

    async def guarded(name: str) -> None:
        async with gate:
            await do(name)

    await asyncio.gather(*map(guarded, names))
