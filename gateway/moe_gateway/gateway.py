"""The gateway as a whole: its ports, its connections, a watcher for each engine, and a clean end."""

import asyncio
import contextlib
import itertools
import logging
import os
import secrets
import time
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import aiohttp
from aiohttp import web
from moe_contract.addresses import bind_socket
from moe_contract.control_tokens import ControlTokens
from moe_contract.gateway_config import EngineAddress, GatewayConfig, GatewaySettings, initial_settings
from moe_contract.page_keys import PageKeys
from moe_contract.peer_tokens import PeerTokens
from moe_contract.picker_config import EndpointPickerConfig
from moe_contract.pod_identity import read_identity

from moe_gateway.access.gate import Gate
from moe_gateway.access.tls import ServingPort
from moe_gateway.admin import Admin
from moe_gateway.engines.discovery import connect
from moe_gateway.engines.dispatcher import Dispatcher
from moe_gateway.engines.endpoints import Endpoint
from moe_gateway.engines.name_refresh import NameRefresh
from moe_gateway.engines.response_search import ResponseSearch
from moe_gateway.engines.signals import list_all_models, watch_engine
from moe_gateway.http.client import ClientConnection
from moe_gateway.http.cors import OriginPolicy
from moe_gateway.http.upstream import Pool
from moe_gateway.live_page.publisher import LivePublisher
from moe_gateway.live_page.routes import LivePage
from moe_gateway.request.body_reader import BodyReader
from moe_gateway.request.context import ExchangeContext
from moe_gateway.request.dispatched import DispatchedRequest
from moe_gateway.request.recent_requests import RecentRequests
from moe_gateway.request_stats import RequestStats

if TYPE_CHECKING:
    from moe_gateway.endpoint_picker.server import EndpointPicker
    from moe_gateway.tracing import RequestTracer

CHECK_PERIOD_S = 0.1
# What the admin port's requests have at the end before they are cut off: a client that does not read delays it no more.
ADMIN_END_S = 2.0
# A check that comes later than this follows a suspension of the process: what came meanwhile is read before it.
SUSPENDED_S = 1.0
BACKLOG = 4096
# Streams that leave engines that drain in one check: each costs up to a millisecond, in which no other one moves.
MOVES_PER_CHECK = 8

log = logging.getLogger("moeserving.gateway")


class Gateway:
    """One gateway; `start`, then `drain`.

    Raises:
        InvalidInput: engines are to be discovered, and no API server is known; keys or certificates cannot be used.
    """

    def __init__(self, config: GatewayConfig, tokens: ControlTokens, *, access_log: bool = False) -> None:
        self._config = config
        self._tokens = tokens
        self._peer_tokens = None if config.token_file is None else PeerTokens(config.token_file)
        self._access_log = access_log
        self.clock = time.monotonic
        self.stats = RequestStats(self.clock())
        self.recent = RecentRequests()
        # Gateways that share engines do not begin their rounds at the same one.
        self.dispatcher = Dispatcher(config, first_turn=secrets.randbelow(1 << 16))
        self.in_force = initial_settings(config)
        self.stats.bounded.set_bounds(config.dispatch.targets)
        discovery = config.discovery
        self._discovery = None if discovery is None else connect(discovery, self._on_endpoints, self._on_gateways)
        self.gateways: tuple[str, ...] = ()
        self._discovering: asyncio.Task[None] | None = None
        self._issuing: asyncio.Task[None] | None = None
        self._connections: set[ClientConnection] = set()
        self._pools: dict[str, Pool] = {}
        self._watchers: dict[EngineAddress, asyncio.Task[None]] = {}
        self._empty = asyncio.Event()
        self._listener = ServingPort(self._connection, config.tls, config.limits.header_timeout_s)
        self._runner: web.AppRunner | None = None
        self._picker: EndpointPicker | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._request_ids = itertools.count(1)
        self._request_id_prefix = secrets.token_hex(4).encode()
        self._context = ExchangeContext(
            dispatcher=self.dispatcher,
            stats=self.stats,
            pool_of=self._pool_of,
            bodies=BodyReader(),
            responses=ResponseSearch(self._pool_of),
            names=NameRefresh(self._ask_names, self._spawn, self.clock),
            clock=self.clock,
            spawn=self._spawn,
            on_end=self._on_end,
            recent=self.recent,
            tracer=_make_tracer(config),
            model=config.model,
            tenant_header=config.tenant_header.encode(),
            cors=OriginPolicy(config.cors.allowed_origins),
            gate=None if config.auth is None else Gate(config.auth, self.clock),
            continuation=config.continuation,
        )
        if config.endpoint_picker is not None:
            self._picker = self._make_picker(config.endpoint_picker)

    @property
    def draining(self) -> bool:
        """Whether the gateway takes no new requests because it stops."""
        return self._context.draining

    @property
    def tenant_names(self) -> dict[str, str]:
        """Names of the tenants by their digests, as far as keys name them."""
        return {} if self._context.gate is None else self._context.gate.tenant_names

    @property
    def ready(self) -> bool:
        """Whether requests should be sent to this gateway."""
        return not self.not_ready

    @property
    def not_ready(self) -> str:
        """Why no requests should be sent to this gateway; empty when they may be.

        With discovery they may be as soon as it is known which engines there are, even none: requests are held for
        those that come.
        """
        if self.draining:
            return "the gateway drains"
        if self._discovery is not None:
            return "" if self._discovery.synced else "the API server has not answered yet"
        return "" if self.dispatcher.accepting else "no engine accepts requests"

    def _make_picker(self, settings: EndpointPickerConfig) -> "EndpointPicker":
        """The endpoint picker; gRPC, which takes most of a second, is imported only where it is wanted.

        Raises:
            InvalidInput: gRPC is not installed, or an engine has no IP address.
        """
        from moe_gateway.endpoint_picker.start import make_picker

        return make_picker(
            settings,
            self._config,
            self._context,
            new_request_id=self._new_request_id,
            peer_tokens=self._peer_tokens,
            is_ready=lambda: not self.draining and (self._discovery is None or self._discovery.synced),
        )

    async def start(self) -> None:
        """Opens the ports.

        Raises:
            OSError: a port is taken.
        """
        # 0: no bound. The watch of each agent keeps a connection, and with many engines others would wait for ever.
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
        listen, admin = self._config.listen, self._config.admin
        try:
            if listen is not None:
                await self._listener.start(bind_socket(listen.host, listen.port), BACKLOG)
            if self._picker is not None:
                await self._picker.start()
            self._runner = web.AppRunner(self._build_admin(), access_log=None, shutdown_timeout=ADMIN_END_S)
            await self._runner.setup()
            await web.SockSite(self._runner, bind_socket(admin.host, admin.port)).start()
        except OSError:
            await self._abandon_start()
            raise
        self._follow(self.in_force.engines)
        self._discover()
        self._checker = self._spawn(self._check())
        if (gate := self._context.gate) is not None and gate.issuer is not None:
            self._issuing = self._spawn(gate.issuer.run(self._session))

    def _build_admin(self) -> web.Application:
        application = Admin(self, self._tokens).build()
        if self._config.ui and self._config.token_file is not None:
            pod = read_identity(os.environ)
            publisher = LivePublisher(self, self._config.limits, pod, self._session)
            LivePage(publisher, self.recent, PageKeys(self._config.token_file)).add_to(application)
        return application

    async def _abandon_start(self) -> None:
        self._listener.close()
        if self._picker is not None:
            await self._picker.stop()
        if self._runner is not None:
            await self._runner.cleanup()
        await self._session.close()

    def apply(self, change: GatewaySettings) -> None:
        """Puts other settings and engines in force, all of them or none: nothing here can fail half-way."""
        before, self.in_force = self.in_force, change
        if change.engines != before.engines:
            self.dispatcher.set_engines(change.engines)
            self._follow(change.engines)
        if change.groups != before.groups:
            self.dispatcher.set_groups(change.groups or (), self.clock())
        if _services(change) != _services(before):
            self._discover()
        self.stats.bounded.set_bounds(change.dispatch.targets)
        self.dispatcher.set_policies(change.dispatch, change.request, self.clock())

    async def drain(self) -> None:
        """Takes no new requests, waits for the running ones, then closes. A silent one ends by the idle timeout."""
        self._context.draining = True
        taking = asyncio.ensure_future(self._listener.drain())
        for connection in list(self._connections):
            connection.drain()
        if self._picker is not None:
            await self._picker.drain()
        await taking
        while self._connections:
            self._empty.clear()
            await self._empty.wait()
        await self.close()

    async def close(self) -> None:
        """Closes at once; requests that run are ended by force."""
        self._listener.close()
        for task in (self._checker, self._discovering, self._issuing, *self._watchers.values()):
            if task is not None:
                task.cancel()
        for connection in list(self._connections):
            connection.force_stop()
        for pool in self._pools.values():
            pool.close()
        if self._picker is not None:
            await self._picker.stop()
        await self._context.bodies.close()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._context.tracer is not None:
            await asyncio.to_thread(self._context.tracer.close)
        if self._runner is not None:
            await self._runner.cleanup()
        await self._session.close()
        if self._discovery is not None:
            await self._discovery.close()
        for connection in list(self._connections):
            if connection.transport is not None:
                connection.transport.abort()

    # Engines.

    def _discover(self) -> None:
        """Looks for the engines of the groups in force."""
        if self._discovery is None:
            return
        if self._discovering is not None:
            self._discovering.cancel()
        self._discovering = self._spawn(self._discovery.run(_services(self.in_force)))

    def _on_endpoints(self, endpoints: tuple[Endpoint, ...]) -> None:
        addresses = tuple(endpoint.address for endpoint in endpoints)
        if addresses != tuple(engine.address for engine in self.dispatcher.engines.values()):
            self.dispatcher.set_engines(addresses)
            self._follow(addresses)
        groups = {endpoint.address.name: endpoint.group for endpoint in endpoints}
        offered = {endpoint.address.name for endpoint in endpoints if endpoint.offered}
        self.dispatcher.set_offers(groups, offered, self.clock())

    def _on_gateways(self, names: tuple[str, ...]) -> None:
        self.gateways = names
        if self._context.gate is not None:
            self._context.gate.divide(len(names))

    def _pool_of(self, server: str) -> Pool | None:
        return self._pools.get(server)

    def _follow(self, addresses: tuple[EngineAddress, ...]) -> None:
        for address in [known for known in self._watchers if known not in addresses]:
            self._watchers.pop(address).cancel()
        pools = {}
        for address in addresses:
            parts = urlsplit(address.url)
            pool = self._pools.get(address.name)
            if pool is None or address not in self._watchers:
                limit_s = self._config.limits.connect_timeout_s
                # A server without an agent is not the deployment's own.
                tokens = None if address.agent_url is None else self._peer_tokens
                pool = Pool(parts.hostname or "", parts.port or 80, limit_s, tokens)
            pools[address.name] = pool
            if address not in self._watchers:
                engine = self.dispatcher.engines[address.name]
                self._watchers[address] = self._spawn(watch_engine(engine, self.dispatcher, self._session))
        for pool in set(self._pools.values()) - set(pools.values()):
            pool.close()
        self._pools = pools

    async def _ask_names(self) -> None:
        await list_all_models(self.dispatcher, self._session)

    # Clients.

    def _connection(self) -> ClientConnection:
        return ClientConnection(
            self._context, self._config.limits, self._new_request_id, self._connections.add, self._on_close
        )

    def _on_close(self, connection: ClientConnection) -> None:
        self._connections.discard(connection)
        if not self._connections and self.draining:
            self._empty.set()

    def _new_request_id(self) -> bytes:
        return b"%b-%x" % (self._request_id_prefix, next(self._request_ids))

    async def _check(self) -> None:
        while True:
            began_s = self.clock()
            await asyncio.sleep(CHECK_PERIOD_S)
            if self.clock() - began_s > SUSPENDED_S:
                await asyncio.sleep(CHECK_PERIOD_S)
            self._check_once(self.clock())
            try:
                await self._listener.reload(self.clock())
            except Exception:
                log.exception("a periodic check failed")

    def _check_once(self, now_s: float) -> None:
        self._context.moves_left = MOVES_PER_CHECK
        for check in (self.dispatcher.tick, self._reload_access, self._check_connections, self._check_picker):
            try:
                check(now_s)
            except Exception:
                # The other checks go on, and so does this one the next time.
                log.exception("a periodic check failed")

    def _reload_access(self, now_s: float) -> None:
        if self._peer_tokens is not None:
            self._peer_tokens.refresh()
        if self._context.gate is not None:
            self._context.gate.tick(now_s)

    def _check_connections(self, now_s: float) -> None:
        for connection in list(self._connections):
            self._check_connection(connection, now_s)

    def _check_picker(self, now_s: float) -> None:
        if self._picker is not None:
            self._picker.check(now_s)

    def _check_connection(self, connection: ClientConnection, now_s: float) -> None:
        """Checks one connection; whatever is wrong with it ends it alone."""
        try:
            connection.check(now_s)
        except Exception:
            log.exception("the check of a connection failed")
            if connection.transport is not None:
                # Its request ends as that of a client that went away.
                connection.transport.abort()

    def _on_end(self, exchange: DispatchedRequest, status: int, reason: str) -> None:
        if self._context.gate is not None and exchange.request.admission is not None:
            self._context.gate.end(exchange.request.admission, status)
        self.recent.end(exchange, status, reason, self.clock())
        if self._context.tracer is not None:
            self._context.tracer.end(exchange, status, reason)
        if not reason and not self._access_log:
            return
        target, request = exchange.target, exchange.request
        log.log(
            logging.INFO if status < 500 and not reason else logging.WARNING,
            "request",
            extra={
                "request_id": request.request_id.decode(),
                "route": exchange.route.label,
                "status": status,
                "reason": reason,
                "engine": None if target is None else target.server,
                "rank": None if target is None else target.rank,
                "prompt_tokens": exchange.job.prompt_tokens,
                "ttft_s": None if exchange.ttft_s is None else round(exchange.ttft_s, 6),
                "duration_s": round(self.clock() - request.arrived_s, 6),
            },
        )

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _services(in_force: GatewaySettings) -> list[str]:
    return [group.service for group in in_force.groups or ()]


def _make_tracer(config: GatewayConfig) -> "RequestTracer | None":
    """The tracer that the configuration asks for; its SDK is imported only then, for it takes a second and 15 MiB."""
    if config.tracing is None:
        return None
    from moe_gateway.tracing import RequestTracer

    return RequestTracer(config.tracing)


async def run_gateway(gateway: Gateway, stop: asyncio.Event, force_stop: asyncio.Event) -> None:
    """Serves until `stop`, then drains; `force_stop` ends the draining at once.

    Raises:
        OSError: a port is taken.
    """
    await gateway.start()
    await stop.wait()
    draining = asyncio.ensure_future(gateway.drain())
    forced = asyncio.ensure_future(force_stop.wait())
    await asyncio.wait({draining, forced}, return_when=asyncio.FIRST_COMPLETED)
    forced.cancel()
    if not draining.done():
        draining.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await draining
        await gateway.close()
