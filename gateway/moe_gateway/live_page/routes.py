"""The routes of the live page on the admin port: its files for everyone, all that it shows for holders of the key."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import aclosing
from pathlib import Path

import orjson
from aiohttp import web
from moe_contract.input_errors import InputError, error_document
from moe_contract.page_keys import PageKeys
from moe_contract.request_record import write_request_record
from moe_contract.routes import UI

from moe_gateway.live_page.publisher import LivePublisher, TooManyWatchers
from moe_gateway.request.recent_requests import RecentRequests

# Written by `make ui`; the wheel has them.
ASSETS = Path(__file__).with_name("assets")
JSON = "application/json"
# A page that takes nothing for this time is cut off, and its place is free. At the gateway's end it has less time.
LONGEST_WRITE_S, LAST_WRITE_S = 10.0, 0.5
_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
# The page loads nothing from elsewhere, runs its own script alone, and is in no other page.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
NOT_BUILT = """<!doctype html><html lang="en"><meta charset="utf-8"><title>MoEServing</title>
<h1>The live page is not built</h1>
<p>This gateway runs from a source checkout. Build the page there with <code>make ui</code> (it needs Node.js), then
reload.</p>
<p>Wheels and images have the page in them. Until then: <code>moeserving status</code>,
<code>moeserving explain REQUEST_ID</code>.</p>
</html>
"""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class LivePage:
    """The routes under `/ui`.

    Args:
        publisher: of the events.
        recent: the remembered requests.
        keys: that open the page.
        assets: folder of the built page.
    """

    def __init__(self, publisher: LivePublisher, recent: RecentRequests, keys: PageKeys, assets: Path = ASSETS) -> None:
        self._publisher, self._recent, self._keys = publisher, recent, keys
        self._assets = assets
        self._writes: set[asyncio.Timeout] = set()

    def add_to(self, application: web.Application) -> None:
        """Adds the routes, and the end of the streams to that of the application."""
        router = application.router
        router.add_get(UI, self._redirect)
        router.add_get(f"{UI}/events", self._for_holders(self._events))
        router.add_get(f"{UI}/requests/{{request_id}}", self._for_holders(self._request))
        router.add_get(f"{UI}/", self._file)
        router.add_get(f"{UI}/{{name}}", self._file)
        application.on_shutdown.append(self._end)
        application.on_cleanup.append(self._close)

    async def _redirect(self, request: web.Request) -> web.Response:
        return web.Response(status=308, headers={"Location": f"{UI}/"})

    async def _file(self, request: web.Request) -> web.Response:
        """One of the built files, which lie in one folder without others below it."""
        name = request.match_info.get("name", "index.html")
        files = self._list_files()
        if not files:
            return web.Response(status=503, text=NOT_BUILT, content_type="text/html", headers=HEADERS)
        if (path := files.get(name)) is None:
            return _refuse(404, InputError("", f"no such file: {name[:80]!r}"))
        kind = _TYPES.get(path.suffix, "application/octet-stream")
        return web.Response(body=path.read_bytes(), content_type=kind, charset="utf-8", headers=HEADERS)

    def _list_files(self) -> Mapping[str, Path]:
        return {path.name: path for path in self._assets.glob("*.*")} if self._assets.is_dir() else {}

    async def _events(self, request: web.Request) -> web.StreamResponse:
        headers = HEADERS | {"Content-Type": "text/event-stream", "Cache-Control": "no-store"}
        stream = web.StreamResponse(headers=headers)
        async with aclosing(self._publisher.watch(request.query.get("experts", ""))) as events:
            try:
                first = await anext(events)
            except TooManyWatchers:
                return _refuse(503, InputError("", "too many pages are open; close one"))
            # A client that goes away ends the stream at the next write, one that does not read at its limit.
            try:
                await stream.prepare(request)
                await self._write(stream, first)
                async for event in events:
                    await self._write(stream, event)
            except TimeoutError:
                if request.transport is not None:
                    request.transport.abort()
            except ConnectionError:
                pass
        return stream

    async def _write(self, stream: web.StreamResponse, event: bytes) -> None:
        """Sends an event.

        Raises:
            TimeoutError: the client did not take it in time.
            ConnectionError: the client is gone.
        """
        async with asyncio.timeout(LONGEST_WRITE_S) as limit:
            self._writes.add(limit)
            try:
                await stream.write(event)
            finally:
                self._writes.discard(limit)

    async def _request(self, request: web.Request) -> web.Response:
        record = self._recent.record(request.match_info["request_id"])
        if record is None:
            return _refuse(404, InputError("request_id", "not among the last requests that were meant for an engine"))
        return web.Response(body=write_request_record(record), content_type=JSON, headers=HEADERS)

    def _for_holders(self, handler: Handler) -> Handler:
        async def checked(request: web.Request) -> web.StreamResponse:
            if not self._keys.allow(request.headers.get("Authorization", "")):
                return _refuse(401, InputError("Authorization", "the page key is needed: open it with `moeserving ui`"))
            return await handler(request)

        return checked

    async def _end(self, application: web.Application) -> None:
        self._publisher.end()
        last_s = asyncio.get_running_loop().time() + LAST_WRITE_S
        for limit in self._writes:
            limit.reschedule(last_s)

    async def _close(self, application: web.Application) -> None:
        await self._publisher.close()


def _refuse(status: int, error: InputError) -> web.Response:
    return web.Response(status=status, body=orjson.dumps(error_document([error])), content_type=JSON, headers=HEADERS)
