"""The agent's HTTP server: state for any client, control for holders of the token."""

import asyncio
import os
import socket
import time
from collections.abc import Awaitable, Callable, Iterable
from contextlib import aclosing
from dataclasses import asdict
from http import HTTPStatus

from aiohttp import web
from moe_contract.agent_config import AgentConfig, AgentSettings, parse_agent_settings
from moe_contract.agent_state import AgentState, write_agent_state
from moe_contract.control_tokens import ControlTokens
from moe_contract.documents import parse_document
from moe_contract.engine_identity import identify_engine
from moe_contract.input_errors import InputError, InvalidInput, error_document
from moe_contract.pod_identity import read_identity
from moe_contract.routes import CONFIG, DRAIN, EXPERTS, HEALTHZ, METRICS, READYZ, RESUME, STATE, TAKE_TIMEOUT_S
from moe_contract.state_stream import SparseStream, parse_interval, stream_headers
from moe_scheduling.expert.decision import ExpertMode
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from moe_agent.api.broadcaster import StateBroadcaster, Version
from moe_agent.api.metrics import AgentCollector
from moe_agent.api.state import build_state
from moe_agent.experts.directive import parse_directive, write_directive
from moe_agent.experts.document import Document, PublishedExperts, shape_of
from moe_agent.experts.obstacle import read_obstacle
from moe_agent.shared_memory.control_record import NotTaken, SettingsPublisher
from moe_agent.shared_memory.rank_record import RankRecords
from moe_agent.shared_memory.transfer_record import TransferRecords
from moe_agent.supervisor.supervisor import EngineSupervisor

# Twice the size of a placement of a hundred layers over a thousand slots.
_MAX_BODY_BYTES = 1024 * 1024

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class AgentServer:
    """Routes over the agent's parts; holds no state but the broadcaster of the watched stream.

    `experts` is None where this agent's engine has no expert group, or where another node has the group's first rank;
    `transfers` where the engine exchanges no KV blocks.
    """

    def __init__(
        self,
        config: AgentConfig,
        tokens: ControlTokens,
        supervisor: EngineSupervisor,
        ranks: RankRecords,
        control: SettingsPublisher,
        experts: PublishedExperts | None,
        changed: asyncio.Event,
        transfers: TransferRecords | None = None,
    ) -> None:
        self._transfers = transfers
        self._tokens, self._run_dir, self._experts = tokens, config.run_dir, experts
        self._name, self._model = config.name or socket.gethostname(), config.engine.served_name
        self._identity = identify_engine(config.engine)
        self._supervisor, self._ranks, self._control = supervisor, ranks, control
        self._pod = read_identity(os.environ)
        self._registry = CollectorRegistry()
        self._registry.register(AgentCollector(self.snapshot, self._read_experts))
        self._broadcaster = StateBroadcaster(changed, self._snapshot_version, self._serialise)

    def build_app(self) -> web.Application:
        app = web.Application(client_max_size=_MAX_BODY_BYTES)
        app.router.add_get(STATE, self._get_state)
        app.router.add_get(EXPERTS, self._get_experts)
        app.router.add_post(EXPERTS, self._with_token(self._post_experts))
        app.router.add_get(METRICS, self._get_metrics)
        app.router.add_get(HEALTHZ, self._get_health)
        app.router.add_get(READYZ, self._get_ready)
        app.router.add_put(CONFIG, self._with_token(self._put_config))
        app.router.add_post(DRAIN, self._with_token(self._post_drain))
        app.router.add_post(RESUME, self._with_token(self._post_resume))
        return app

    def end_streams(self) -> None:
        """Ends the watched streams after one last snapshot."""
        self._broadcaster.end()

    def snapshot(self) -> AgentState:
        """The state as of now."""
        return build_state(
            self._name,
            self._model,
            self._supervisor,
            self._control.control,
            self._ranks.read(),
            time.monotonic(),
            self._pod,
            self._identity,
            "" if self._experts is None else read_obstacle(self._run_dir),
            None if self._transfers is None else self._transfers.read(),
        )

    async def _get_state(self, request: web.Request) -> web.StreamResponse:
        try:
            watch = _read_flag(request, "watch")
            interval_s = parse_interval(request.query)
        except InvalidInput as error:
            return _errors(HTTPStatus.UNPROCESSABLE_ENTITY, error.errors)
        if not watch:
            return web.Response(body=self._serialise(), content_type="application/json")
        stream = web.StreamResponse(headers=stream_headers(interval_s))
        await stream.prepare(request)
        sparse = None if interval_s is None else SparseStream(interval_s)
        async with aclosing(self._broadcaster.watch()) as snapshots:
            try:
                async for version, snapshot in snapshots:
                    if line := snapshot if sparse is None else _thin(sparse, version, snapshot):
                        await stream.write(line)
            except ConnectionResetError:
                return stream
        return stream

    def _serialise(self) -> bytes:
        return write_agent_state(self.snapshot())

    def _snapshot_version(self) -> tuple[int, ...]:
        transfers = () if self._transfers is None else self._transfers.versions()
        own = (self._supervisor.revision, self._control.control.version)
        return (*own, self._supervisor.look_at_start(), *self._ranks.versions(), *transfers)

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
            current = self._control.control
            settings = parse_agent_settings(document, AgentSettings(request=current.request, expert=current.expert))
        except InvalidInput as error:
            return _errors(HTTPStatus.UNPROCESSABLE_ENTITY, error.errors)
        taken = await self._control.apply(settings.request, settings.expert, TAKE_TIMEOUT_S)
        if isinstance(taken, NotTaken):
            ranks = ", ".join(map(str, taken.ranks))
            message = f"not taken within {TAKE_TIMEOUT_S:g} s by rank {ranks}; it takes it at its next step"
            return _errors(HTTPStatus.GATEWAY_TIMEOUT, [InputError("request", message)])
        answer = {"version": taken.version, "request": asdict(taken.request), "expert": asdict(taken.expert)}
        return web.json_response(answer)

    def _read_experts(self, *, short: bool = True) -> Document | None:
        return None if self._experts is None else self._experts.read(time.monotonic(), short=short)

    def _read_heat(self) -> Document | None:
        return None if self._experts is None else self._experts.read_heat(time.monotonic())

    async def _get_experts(self, request: web.Request) -> web.Response:
        try:
            short, heat = _read_flag(request, "brief"), _read_flag(request, "heat")
        except InvalidInput as error:
            return _errors(HTTPStatus.UNPROCESSABLE_ENTITY, error.errors)
        document = self._read_heat() if heat else self._read_experts(short=short)
        return self._no_experts() if document is None else web.json_response(document)

    async def _post_experts(self, request: web.Request) -> web.Response:
        if (document := self._read_experts()) is None:
            return self._no_experts()
        control = self._control.control
        if control.expert.mode is ExpertMode.OFF:
            error = InputError("mode", "off: nothing is recorded; others: active, dryRun, observe")
            return _errors(HTTPStatus.CONFLICT, [error])
        try:
            asked = parse_document(await request.read())
            directive = parse_directive(asked, control.directive + 1, shape_of(document))
        except InvalidInput as error:
            return _errors(HTTPStatus.UNPROCESSABLE_ENTITY, error.errors)
        write_directive(self._run_dir, directive)
        self._control.announce_directive(directive.version)
        return web.json_response({"version": directive.version}, status=HTTPStatus.ACCEPTED)

    def _no_experts(self) -> web.Response:
        if self._experts is None:
            error = InputError("", "this node's engine has no expert group whose first rank is here")
            return _errors(HTTPStatus.NOT_FOUND, [error])
        if obstacle := read_obstacle(self._run_dir):
            return _errors(HTTPStatus.NOT_FOUND, [InputError("", obstacle)])
        return _errors(HTTPStatus.SERVICE_UNAVAILABLE, [InputError("", "the expert group has published nothing yet")])

    async def _post_drain(self, request: web.Request) -> web.Response:
        self._supervisor.request_drain()
        return web.json_response(
            {"phase": self._supervisor.phase.value, "accepting": False}, status=HTTPStatus.ACCEPTED
        )

    async def _post_resume(self, request: web.Request) -> web.Response:
        if not self._supervisor.request_resume():
            return _errors(HTTPStatus.CONFLICT, [InputError("", "the engine is not drained, or its agent ends")])
        return web.json_response({"phase": self._supervisor.phase.value}, status=HTTPStatus.ACCEPTED)

    def _with_token(self, handler: Handler) -> Handler:
        async def check(request: web.Request) -> web.StreamResponse:
            if not self._tokens.allow(request.headers.get("Authorization", "")):
                return _errors(HTTPStatus.UNAUTHORIZED, [InputError("Authorization", "the control token is needed")])
            return await handler(request)

        return check


def _thin(sparse: SparseStream, version: Version, snapshot: bytes) -> bytes:
    revision, settings, *ranks = version
    return sparse.next_line(time.monotonic(), (revision, settings), lambda: ranks, lambda: snapshot)


def _read_flag(request: web.Request, name: str) -> bool:
    value = request.query.get(name) or "0"
    if value not in ("0", "1"):
        raise InvalidInput([InputError(name, f"unknown {value!r}; known: 0, 1")])
    return value == "1"


def _errors(status: HTTPStatus, errors: Iterable[InputError]) -> web.Response:
    return web.json_response(error_document(errors), status=status)
