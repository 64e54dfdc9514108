"""A plain vLLM server says nothing of its prefill work: the gateway's own books stand in for it."""

import asyncio
import time

import aiohttp
from aiohttp import web
from moe_contract.gateway_config import EngineAddress, GatewayConfig
from moe_contract.sections import Listen
from moe_gateway.engines.dispatcher import Dispatcher
from moe_gateway.engines.signals import watch_engine
from moe_gateway.request_stats import RequestStats

METRICS = 'vllm:num_requests_running{engine="0"} 1.0\nvllm:num_requests_waiting{engine="0"} 2.0\n'


async def serve_plain_engine() -> web.AppRunner:
    async def answer_health(request: web.Request) -> web.Response:
        return web.Response()

    async def answer_metrics(request: web.Request) -> web.Response:
        return web.Response(text=METRICS)

    async def answer_models(request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "m"}]})

    application = web.Application()
    application.router.add_get("/health", answer_health)
    application.router.add_get("/metrics", answer_metrics)
    application.router.add_get("/v1/models", answer_models)
    runner = web.AppRunner(application)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    return runner


async def test_a_scrape_does_not_wipe_out_the_prefill_that_the_books_know_of(tmp_path):
    runner = await serve_plain_engine()
    address = EngineAddress(name="plain", url=f"http://127.0.0.1:{runner.addresses[0][1]}")
    config = GatewayConfig(listen=Listen(port=1), admin=Listen(port=2), token_file=tmp_path, engines=(address,))
    dispatcher = Dispatcher(config, RequestStats())
    (engine,) = dispatcher.engines.values()
    (books,) = dispatcher.target_states.values()
    books.sent("a long one", 5000, time.monotonic())
    async with aiohttp.ClientSession() as session:
        watcher = asyncio.create_task(watch_engine(engine, dispatcher, session))
        while books.signal is None:
            await asyncio.sleep(0.01)
        watcher.cancel()
    await runner.cleanup()
    assert books.signal.waiting == 2
    assert books.ahead_prefill_tokens(time.monotonic(), 60.0) == 5000
