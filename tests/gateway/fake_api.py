"""A Kubernetes API server at its HTTP seam, for EndpointSlices alone: lists, watches, and failures of both.

`tests/gateway/test_discovery_api.py` runs the same gateway against a real one.
"""

import asyncio
import itertools
import json
from pathlib import Path
from typing import Any

from aiohttp import web

PATH = "/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices"
SERVICE = "kubernetes.io/service-name"


def make_slice(name: str, service: str, rows: dict[str, dict[str, Any]], **changes: Any) -> dict[str, Any]:
    """`rows`: name of a pod -> `address`, and the conditions that it has."""
    ports = [{"name": "engine", "port": 8000, "protocol": "TCP"}, {"name": "agent", "port": 8080, "protocol": "TCP"}]
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": name, "labels": {SERVICE: service}},
        "addressType": "IPv4",
        "ports": ports,
        "endpoints": [
            {
                "addresses": [row["address"]],
                "conditions": {key: value for key, value in row.items() if key != "address"},
                "targetRef": {"kind": "Pod", "name": pod},
            }
            for pod, row in rows.items()
        ],
    } | changes


def engine_slice(engine: Any, service: str = "tiny-engine", *, name: str = "", **conditions: Any) -> dict[str, Any]:
    """A slice of one engine, at its address and under the ports that it has."""
    ports = [{"name": "engine", "port": engine.port}, {"name": "agent", "port": engine.agent.port}]
    rows = {engine.name: {"address": engine.host, **conditions}}
    return make_slice(name or f"slice-{engine.name}", service, rows, ports=ports)


class FakeApi:
    """The API server.

    Attributes:
        lists: number of lists that were asked for, each page as one.
        watches: number of watches that were asked for.
        answer: status of the refusal of every request; None answers them.
        refusals: answers to the next watches in place of events, each used once.
        mute: watches send nothing, as over a connection that died unseen.
        page: most objects in an answer to a list; None: as many as the request asks for.
        watched_from: versions that the watches began at.
    """

    def __init__(self, folder: Path, port: int) -> None:
        self.port = port
        self.kubeconfig = folder / "kubeconfig"
        self.lists = self.watches = 0
        self.answer: int | None = None
        self.gone_as_event = self.mute = False
        self.page: int | None = None
        self.refusals: list[web.Response] = []
        self.watched_from: list[int] = []
        self._gone = self._ending = False
        self._slices: dict[str, dict[str, Any]] = {}
        self._events: list[tuple[int, dict[str, Any]]] = []
        self._versions = itertools.count(1)
        self._version = 0
        self._changed = asyncio.Event()
        self._generation = 0
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
        self.kubeconfig.write_text(
            json.dumps(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "clusters": [{"name": "fake", "cluster": {"server": f"http://127.0.0.1:{self.port}"}}],
                    "users": [{"name": "nobody", "user": {}}],
                    "contexts": [{"name": "fake", "context": {"cluster": "fake", "user": "nobody"}}],
                    "current-context": "fake",
                }
            )
        )
        application = web.Application()
        application.router.add_get(PATH, self._get)
        self._runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.01)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port).start()

    async def stop(self) -> None:
        if self._runner is not None:
            self.drop()
            await self._runner.cleanup()
            self._runner = None

    # What a test does.

    def put(self, row: dict[str, Any]) -> None:
        name = row["metadata"]["name"]
        self._tell("MODIFIED" if name in self._slices else "ADDED", row)
        self._slices[name] = row

    def delete(self, name: str) -> None:
        self._tell("DELETED", self._slices.pop(name))

    def drop(self) -> None:
        """Ends all watches in the midst."""
        self._generation += 1
        self._changed.set()

    def bookmark(self, version: int) -> None:
        """Sends a bookmark to the watches."""
        self._version = version
        self._versions = itertools.count(version + 1)
        row = {"kind": "EndpointSlice", "metadata": {"resourceVersion": str(version), "labels": {SERVICE: ""}}}
        self._events.append((version, {"type": "BOOKMARK", "object": row}))
        self._changed.set()

    def end_watches(self) -> None:
        """Ends all watches as a server does when their time is over."""
        self._ending = True
        self.drop()

    def forget(self) -> None:
        """The next watch is refused because its version is too old, and no event has the changes since."""
        self._gone = True
        self._events.clear()

    def _tell(self, kind: str, row: dict[str, Any]) -> None:
        self._version = next(self._versions)
        row["metadata"]["resourceVersion"] = str(self._version)
        self._events.append((self._version, {"type": kind, "object": json.loads(json.dumps(row))}))
        self._changed.set()

    # What the gateway sees.

    async def _get(self, request: web.Request) -> web.StreamResponse:
        if self.answer is not None:
            return web.json_response(status_of(self.answer), status=self.answer)
        if request.query.get("watch") == "true":
            return await self._watch(request)
        self.lists += 1
        items = [row for row in self._slices.values() if selected(row, request)]
        first, limit = int(request.query.get("continue", 0)), self.page or int(request.query["limit"])
        metadata = {"resourceVersion": str(self._version)}
        if first + limit < len(items):
            metadata["continue"] = str(first + limit)
        # As of a real one, the items do not say their kind.
        page = [{name: value for name, value in row.items() if name not in ("kind", "apiVersion")} for row in items]
        return web.json_response({"metadata": metadata, "items": page[first : first + limit]})

    async def _watch(self, request: web.Request) -> web.StreamResponse:
        self.watches += 1
        self.watched_from.append(int(request.query["resourceVersion"]))
        assert request.query["allowWatchBookmarks"] == "true"
        if self.refusals:
            return self.refusals.pop(0)
        gone, self._gone = self._gone, False
        if gone and not self.gone_as_event:
            return web.json_response(status_of(410), status=410)
        assert int(request.query["timeoutSeconds"]) > 0
        seen, generation = int(request.query["resourceVersion"]), self._generation
        stream = web.StreamResponse(headers={"Content-Type": "application/json"})
        await stream.prepare(request)
        if gone:
            await stream.write(json.dumps({"type": "ERROR", "object": status_of(410)}).encode() + b"\n")
            return stream
        while generation == self._generation:
            self._changed = changed = asyncio.Event() if self._changed.is_set() else self._changed
            for version, event in [row for row in self._events if row[0] > seen]:
                seen = version
                if (event["type"] == "BOOKMARK" or selected(event["object"], request)) and not self.mute:
                    await stream.write(json.dumps(event).encode() + b"\n")
            await changed.wait()
        if not self._ending and request.transport is not None:
            request.transport.abort()
        return stream


def status_of(code: int) -> dict[str, Any]:
    return {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "message": f"status {code}"}


def selected(row: dict[str, Any], request: web.Request) -> bool:
    """Whether a slice is of the Services that `kubernetes.io/service-name in (a,b)` names."""
    name, _, values = request.query["labelSelector"].partition(" in ")
    assert name == SERVICE, request.query["labelSelector"]
    return row["metadata"]["labels"][SERVICE] in values.strip("()").split(",")
