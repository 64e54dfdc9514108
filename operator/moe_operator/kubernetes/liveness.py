"""The operator's `/healthz`, on all addresses of both families. kopf's own endpoint listens on one family alone."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web
from moe_contract.addresses import ANY, bind_socket
from moe_contract.routes import HEALTHZ


@asynccontextmanager
async def serve_liveness(port: int, probe: Callable[[], Awaitable[dict[str, Any]]]) -> AsyncIterator[None]:
    """Answers `GET /healthz` with the JSON of `probe` while the block runs.

    Raises:
        OSError: the port is taken.
    """

    async def answer(request: web.Request) -> web.Response:
        return web.json_response(await probe())

    app = web.Application()
    app.router.add_get(HEALTHZ, answer)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    try:
        await web.SockSite(runner, bind_socket(ANY, port)).start()
        yield
    finally:
        await runner.cleanup()
