"""The admin port: health, metrics, state, and the control route, which takes the deployment's token alone."""

from collections.abc import Awaitable, Callable
from typing import Protocol

import orjson
from aiohttp import web
from moe_contract.input_errors import InputError, InvalidInput

from moe_gateway.configuration import InForce, parse_change, parse_document
from moe_gateway.control_tokens import ControlTokens
from moe_gateway.engines.dispatcher import Dispatcher
from moe_gateway.metrics import GatewayCollector, render_metrics
from moe_gateway.request_stats import RequestStats
from moe_gateway.state import build_state

MOST_BODY_BYTES = 1024 * 1024
JSON = "application/json"


class Administered(Protocol):
    """What the routes read and change."""

    dispatcher: Dispatcher
    stats: RequestStats
    in_force: InForce
    clock: Callable[[], float]

    @property
    def draining(self) -> bool: ...

    @property
    def not_ready(self) -> str: ...

    def apply(self, change: InForce) -> None: ...


class Admin:
    """The routes; `gateway` is what they read and change."""

    def __init__(self, gateway: Administered, tokens: ControlTokens) -> None:
        self._gateway = gateway
        self._tokens = tokens

    def build(self) -> web.Application:
        """The application."""
        application = web.Application(client_max_size=MOST_BODY_BYTES)
        application.router.add_get("/healthz", self._healthz)
        application.router.add_get("/readyz", self._readyz)
        application.router.add_get("/metrics", self._metrics)
        application.router.add_get("/v1/state", self._state)
        application.router.add_put("/v1/config", self._authorised(self._put_config))
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

    async def _state(self, request: web.Request) -> web.Response:
        gateway = self._gateway
        now_s = gateway.clock()
        document = build_state(
            gateway.dispatcher, gateway.stats, gateway.in_force, draining=gateway.draining, now_s=now_s
        )
        return web.Response(body=orjson.dumps(document), content_type=JSON)

    async def _put_config(self, request: web.Request) -> web.Response:
        try:
            change = parse_change(parse_document(await request.read()), self._gateway.in_force)
        except InvalidInput as error:
            return _problems(422, error.problems)
        self._gateway.apply(change)
        return web.Response(body=orjson.dumps(change.document()), content_type=JSON)

    def _authorised(self, handler: "Handler") -> "Handler":
        async def checked(request: web.Request) -> web.StreamResponse:
            if not self._tokens.allow(request.headers.get("Authorization", "")):
                return _problems(401, [InputError("Authorization", "the deployment's control token is needed")])
            return await handler(request)

        return checked


Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def _problems(status: int, problems: "list[InputError] | tuple[InputError, ...]") -> web.Response:
    rows = [{"path": problem.path, "message": problem.message} for problem in problems]
    return web.Response(status=status, body=orjson.dumps({"errors": rows}), content_type=JSON)
