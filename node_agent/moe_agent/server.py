"""The agent's HTTP server: state for anyone who can reach it, control for whoever has the token."""

import asyncio
import json
import socket
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from http import HTTPStatus
from typing import Any

from aiohttp import web
from moe_scheduling.problems import InvalidInput, Problem
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from moe_agent.config import AgentConfig
from moe_agent.control_tokens import ControlTokens
from moe_agent.metrics import AgentCollector
from moe_agent.parsing import parse_document, parse_request_change
from moe_agent.state import build_snapshot
from moe_agent.supervisor import Supervisor
from moe_agent.telemetry import ControlPage, NotTaken, RankPages

TAKE_TIMEOUT_S = 5.0
_WATCH_LEAST_S = 0.01
_WATCH_MOST_S = 1.0
_MAX_BODY_BYTES = 64 * 1024

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class AgentServer:
    """Routes over the agent's parts; holds no state but the wish to end."""

    def __init__(
        self,
        config: AgentConfig,
        tokens: ControlTokens,
        supervisor: Supervisor,
        ranks: RankPages,
        control: ControlPage,
    ) -> None:
        self._tokens = tokens
        self._name, self._model = config.name or socket.gethostname(), config.engine.served_name
        self._supervisor, self._ranks, self._control = supervisor, ranks, control
        self._registry = CollectorRegistry()
        self._registry.register(AgentCollector(self.snapshot))
        self._ending = asyncio.Event()

    def build_app(self) -> web.Application:
        app = web.Application(client_max_size=_MAX_BODY_BYTES)
        app.router.add_get("/v1/state", self._get_state)
        app.router.add_get("/metrics", self._get_metrics)
        app.router.add_get("/healthz", self._get_health)
        app.router.add_get("/readyz", self._get_ready)
        app.router.add_put("/v1/config", self._with_token(self._put_config))
        app.router.add_post("/v1/drain", self._with_token(self._post_drain))
        return app

    def end_streams(self) -> None:
        """Lets the watched streams end after their last line."""
        self._ending.set()

    def snapshot(self) -> dict[str, Any]:
        """The state as of now."""
        return build_snapshot(
            self._name,
            self._model,
            self._supervisor,
            self._control.control,
            self._ranks.read(),
            time.monotonic(),
        )

    async def _get_state(self, request: web.Request) -> web.StreamResponse:
        if request.query.get("watch") not in (None, "", "0", "1"):
            problem = Problem("watch", f"unknown {request.query['watch']!r}; known: 0, 1")
            return _errors(HTTPStatus.UNPROCESSABLE_ENTITY, [problem])
        if request.query.get("watch") != "1":
            return web.json_response(self.snapshot())
        stream = web.StreamResponse(headers={"Content-Type": "application/x-ndjson", "Cache-Control": "no-store"})
        await stream.prepare(request)
        try:
            await self._write_changes(stream)
        except ConnectionResetError:
            return stream
        return stream

    async def _write_changes(self, stream: web.StreamResponse) -> None:
        ending = False
        while True:
            seen, sent_s = self._fingerprint(), time.monotonic()
            await stream.write(json.dumps(self.snapshot(), separators=(",", ":")).encode() + b"\n")
            if ending:
                return
            await asyncio.sleep(_WATCH_LEAST_S)
            while self._fingerprint() == seen and time.monotonic() - sent_s < _WATCH_MOST_S:
                if ending := self._ending.is_set():
                    break
                await asyncio.sleep(_WATCH_LEAST_S)

    def _fingerprint(self) -> tuple[int, ...]:
        return (self._supervisor.revision, self._control.control.version, *self._ranks.fingerprint())

    async def _get_metrics(self, request: web.Request) -> web.Response:
        return web.Response(body=generate_latest(self._registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def _get_health(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "alive"})

    async def _get_ready(self, request: web.Request) -> web.Response:
        status = HTTPStatus.OK if self._supervisor.accepting else HTTPStatus.SERVICE_UNAVAILABLE
        return web.json_response({"phase": self._supervisor.phase.value}, status=status)

    async def _put_config(self, request: web.Request) -> web.Response:
        try:
            document = parse_document(await request.read())
            settings = parse_request_change(document, self._control.control.request)
        except InvalidInput as error:
            return _errors(HTTPStatus.UNPROCESSABLE_ENTITY, error.problems)
        taken = await self._control.apply(settings, TAKE_TIMEOUT_S)
        if isinstance(taken, NotTaken):
            ranks = ", ".join(map(str, taken.ranks))
            message = f"not taken within {TAKE_TIMEOUT_S:g} s by rank {ranks}; it takes it at its next step"
            return _errors(HTTPStatus.GATEWAY_TIMEOUT, [Problem("request", message)])
        return web.json_response({"version": taken.version, "request": asdict(taken.request)})

    async def _post_drain(self, request: web.Request) -> web.Response:
        self._supervisor.request_drain()
        return web.json_response(
            {"phase": self._supervisor.phase.value, "accepting": False}, status=HTTPStatus.ACCEPTED
        )

    def _with_token(self, handler: Handler) -> Handler:
        async def check(request: web.Request) -> web.StreamResponse:
            if not self._tokens.allow(request.headers.get("Authorization", "")):
                return _errors(HTTPStatus.UNAUTHORIZED, [Problem("Authorization", "the control token is needed")])
            return await handler(request)

        return check


def _errors(status: HTTPStatus, problems: Any) -> web.Response:
    rows = [{"path": problem.path, "message": problem.message} for problem in problems]
    return web.json_response({"errors": rows}, status=status)
