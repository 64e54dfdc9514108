"""The admin port: health, metrics, state, and the control route, which takes the deployment's token alone."""

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from typing import Protocol

import orjson
from aiohttp import web
from moe_contract.control_tokens import ControlTokens
from moe_contract.documents import parse_document
from moe_contract.gateway_config import GatewaySettings, parse_gateway_settings
from moe_contract.gateway_state import write_gateway_state
from moe_contract.input_errors import InputError, InvalidInput, error_document
from moe_contract.pod_identity import read_identity
from moe_contract.request_record import write_request_record
from moe_contract.routes import CONFIG, HEALTHZ, METRICS, READYZ, REQUESTS, STATE
from moe_contract.state_stream import SparseStream, parse_interval, stream_headers

from moe_gateway.engines.dispatcher import Dispatcher
from moe_gateway.engines.load_report import least_wait_s
from moe_gateway.metrics import GatewayCollector, render_metrics
from moe_gateway.request.recent_requests import REMEMBERED_REQUESTS, RecentRequests
from moe_gateway.request_stats import RequestStats
from moe_gateway.state import build_state

MOST_BODY_BYTES = 1024 * 1024
JSON = "application/json"
# How often a stream of states looks for a change: a request held while no engine runs is known to the operator so soon.
LOOK_EVERY_S = 0.2


class Administered(Protocol):
    """What the routes read and change."""

    dispatcher: Dispatcher
    stats: RequestStats
    recent: RecentRequests
    in_force: GatewaySettings
    clock: Callable[[], float]

    @property
    def draining(self) -> bool: ...

    @property
    def not_ready(self) -> str: ...

    def apply(self, change: GatewaySettings) -> None: ...


class Admin:
    """The routes; `gateway` is what they read and change."""

    def __init__(self, gateway: Administered, tokens: ControlTokens) -> None:
        self._gateway = gateway
        self._tokens = tokens
        self._pod = read_identity(os.environ)
        self._ends = asyncio.Event()

    def build(self) -> web.Application:
        """Returns the application with the routes of the admin address."""
        application = web.Application(client_max_size=MOST_BODY_BYTES)
        application.router.add_get(HEALTHZ, self._healthz)
        application.router.add_get(READYZ, self._readyz)
        application.router.add_get(METRICS, self._metrics)
        application.router.add_get(STATE, self._state)
        application.router.add_get(REQUESTS + "/{request_id}", self._request)
        application.router.add_put(CONFIG, self._authorised(self._put_config))
        # A server that is closed waits for its answers, and these have no end.
        application.on_shutdown.append(self._end_streams)
        return application

    async def _healthz(self, request: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def _readyz(self, request: web.Request) -> web.Response:
        if not self._gateway.not_ready:
            return web.Response(text="ok\n")
        return web.Response(status=503, text=self._gateway.not_ready + "\n")

    async def _metrics(self, request: web.Request) -> web.Response:
        collector = GatewayCollector(self._gateway.dispatcher, self._gateway.stats, self._gateway.clock)
        return web.Response(body=render_metrics(collector), headers={"Content-Type": "text/plain; version=0.0.4"})

    async def _state(self, request: web.Request) -> web.StreamResponse:
        try:
            interval_s = parse_interval(request.query)
        except InvalidInput as error:
            return _refuse(422, error.errors)
        if request.query.get("watch") != "1" or interval_s is None:
            return web.Response(body=self._write_state(), content_type=JSON)
        stream = web.StreamResponse(headers=stream_headers(interval_s))
        await stream.prepare(request)
        sparse = SparseStream(interval_s)
        with suppress(ConnectionError):
            while not self._ends.is_set():
                if line := self._next_line(sparse):
                    await stream.write(line)
                with suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_EVERY_S):
                        await self._ends.wait()
        return stream

    def _write_state(self) -> bytes:
        gateway = self._gateway
        document = build_state(
            gateway.dispatcher,
            gateway.stats,
            gateway.in_force,
            draining=gateway.draining,
            now_s=gateway.clock(),
            pod=self._pod,
        )
        return write_gateway_state(document)

    def _next_line(self, sparse: SparseStream) -> bytes:
        """What a watcher gets now; ages of signals, which never stay the same, are no change."""
        gateway, now_s = self._gateway, self._gateway.clock()
        held = gateway.dispatcher.held
        accepting = gateway.dispatcher.accepting and not gateway.draining
        # Under load requests are held now and then; where no engine takes any, one is waited for.
        notable = (accepting, held > 0 and not accepting, gateway.in_force)
        return sparse.next_line(now_s, notable, lambda: self._numbers(now_s), lambda: self._write_state() + b"\n")

    def _numbers(self, now_s: float) -> tuple[object, ...]:
        """What the autoscaler reads; requests of other gateways and time alone change it too."""
        dispatcher, stats = self._gateway.dispatcher, self._gateway.stats
        return (
            dispatcher.held,
            dispatcher.in_flight,
            stats.finished,
            stats.bounded.measured(now_s),
            stats.recent.arrivals_per_s(now_s),
            _rounded(stats.recent.mean_ttft_s(now_s), digits=3),
            _rounded(least_wait_s(dispatcher, now_s), digits=3),
            _rounded(dispatcher.held_since_s(now_s), digits=0),
        )

    async def _end_streams(self, application: web.Application) -> None:
        self._ends.set()

    async def _request(self, request: web.Request) -> web.Response:
        request_id = request.match_info["request_id"]
        record = self._gateway.recent.record(request_id)
        if record is None:
            message = f"not among the last {REMEMBERED_REQUESTS} requests that were meant for an engine"
            return _refuse(404, [InputError("request_id", message)])
        return web.Response(body=write_request_record(record), content_type=JSON)

    async def _put_config(self, request: web.Request) -> web.Response:
        try:
            change = parse_gateway_settings(parse_document(await request.read()), self._gateway.in_force)
        except InvalidInput as error:
            return _refuse(422, error.errors)
        self._gateway.apply(change)
        return web.Response(body=orjson.dumps(change.document()), content_type=JSON)

    def _authorised(self, handler: "Handler") -> "Handler":
        async def checked(request: web.Request) -> web.StreamResponse:
            if not self._tokens.allow(request.headers.get("Authorization", "")):
                return _refuse(401, [InputError("Authorization", "the deployment's control token is needed")])
            return await handler(request)

        return checked


Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def _rounded(seconds: float | None, *, digits: int) -> float | None:
    return None if seconds is None else round(seconds, digits)


def _refuse(status: int, errors: Iterable[InputError]) -> web.Response:
    return web.Response(status=status, body=orjson.dumps(error_document(errors)), content_type=JSON)
