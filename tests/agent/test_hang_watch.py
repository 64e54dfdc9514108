"""A core that hangs is found by requests without a step, or, while idle, by a question without an answer."""

import asyncio
from contextlib import closing

import aiohttp
import pytest
from aiohttp import web
from moe_agent.supervisor.hang_watch import HangWatch
from moe_contract.serving_routes import CORE

QUESTION_S = 10.0


class Engine:
    """What an engine's server answers, and for how long it made no step."""

    def __init__(self) -> None:
        self.answers = asyncio.Event()
        self.asked = 0
        self.asleep = False
        self.unstepped_s = 0.0
        self.status = 200

    async def answer(self, request: web.Request) -> web.Response:
        if request.path == CORE:
            self.asked += 1
            await self.answers.wait()
            return web.json_response({"answers": True}, status=self.status)
        return web.json_response({"is_sleeping": self.asleep})


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
async def watch(engine):
    app = web.Application()
    app.router.add_get("/{path:.*}", engine.answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    async with aiohttp.ClientSession(f"http://127.0.0.1:{runner.addresses[0][1]}") as session:
        with closing(HangWatch(session, lambda now_s: engine.unstepped_s, limit_s=600.0)) as watch:
            yield watch
    await runner.cleanup()


async def until_asked(engine: Engine, number: int) -> None:
    async with asyncio.timeout(60):
        while engine.asked < number:
            await asyncio.sleep(0.01)


async def until_answered(watch: HangWatch) -> None:
    async with asyncio.timeout(60):
        while not watch._question.done():
            await asyncio.sleep(0.01)


async def test_an_idle_core_that_does_not_answer_hangs(engine, watch):
    assert [await watch.look(now_s) for now_s in (0.0, 1.0, 600.0)] == [None] * 3
    await until_asked(engine, 1)
    assert await watch.look(601.0) == "the idle core gives no answer for 600 s"
    assert engine.asked == 1


@pytest.mark.parametrize("status", [200, 404, 500])
async def test_any_answer_of_the_server_ends_the_question_and_it_is_put_again(engine, watch, status):
    engine.status = status
    engine.answers.set()
    assert await watch.look(0.0) is None
    await until_answered(watch)
    assert await watch.look(QUESTION_S - 1.0) is None
    assert engine.asked == 1
    assert await watch.look(1000.0) is None
    await until_asked(engine, 2)
    await until_answered(watch)


async def test_a_core_with_requests_is_judged_by_its_steps(engine, watch):
    assert await watch.look(0.0) is None
    engine.unstepped_s = 599.0
    assert await watch.look(500.0) is None
    engine.unstepped_s = 601.0
    assert await watch.look(501.0) == "no step for 600 s though there are requests"
    engine.asleep = True
    assert await watch.look(502.0) is None
    engine.unstepped_s = 0.0
    assert [await watch.look(now_s) for now_s in (503.0, 1103.0)] == [None, None]
    assert await watch.look(1104.0) == "the idle core gives no answer for 600 s"


async def test_a_server_that_is_gone_is_not_a_core_that_hangs(unused_tcp_port):
    async with aiohttp.ClientSession(f"http://127.0.0.1:{unused_tcp_port}") as session:
        watch = HangWatch(session, lambda now_s: 0.0, limit_s=600.0)
        assert await watch.look(0.0) is None
        await until_answered(watch)
        assert await watch.look(1000.0) is None
        watch.close()
