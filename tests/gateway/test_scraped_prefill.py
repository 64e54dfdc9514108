"""A plain vLLM server says nothing of its prefill work: the gateway's own requests in flight stand in for it."""

import asyncio
import time

import aiohttp
from aiohttp import web
from moe_contract.gateway_config import EngineAddress, GatewayConfig
from moe_contract.sections import Listen
from moe_gateway.engines.dispatcher import Dispatcher
from moe_gateway.engines.signals import watch_engine

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


async def test_a_scrape_keeps_the_prefill_of_the_requests_in_flight(tmp_path):
    runner = await serve_plain_engine()
    address = EngineAddress(name="plain", url=f"http://127.0.0.1:{runner.addresses[0][1]}")
    config = GatewayConfig(listen=Listen(port=1), admin=Listen(port=2), token_file=tmp_path, engines=(address,))
    dispatcher = Dispatcher(config)
    (engine,) = dispatcher.engines.values()
    (state,) = dispatcher.target_states.values()
    state.sent("a long one", 5000, time.monotonic())
    async with aiohttp.ClientSession() as session:
        watcher = asyncio.create_task(watch_engine(engine, dispatcher, session))
        while state.signal is None:
            await asyncio.sleep(0.01)
        watcher.cancel()
    await runner.cleanup()
    assert state.signal.waiting == 2
    assert state.ahead_prefill_tokens(time.monotonic(), 60.0) == 5000
