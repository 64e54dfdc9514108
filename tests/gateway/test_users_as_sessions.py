"""`user` is a session while its requests follow one another; an application with one name pins nothing."""

import asyncio

from moe_gateway.request.open_users import OpenUsers

from tests.gateway.messages import OK, json_answer, post, prompt
from tests.gateway.waiting import until


def test_only_the_first_open_request_of_a_user_is_alone():
    users = OpenUsers()
    assert [users.enter("a"), users.enter("b"), users.enter("a")] == [True, True, False]
    users.leave("a")
    assert not users.enter("a")
    users.leave("a")
    users.leave("a")
    assert users.enter("a")
    users.leave("a")
    users.leave("b")
    assert len(users) == 0


async def test_requests_side_by_side_of_one_user_use_all_engines(make_engine, serve):
    go = asyncio.Event()

    async def waits(_request, writer):
        await go.wait()
        writer.write(json_answer(OK))

    engines = [await make_engine(waits) for _ in range(2)]
    served = await serve(*engines, dispatch={"stickiness_s": 1000.0})
    clients = [await served.connect() for _ in range(8)]
    for client in clients:
        client.send(post(prompt(user="app")))
    await until(lambda: sum(len(engine.requests) for engine in engines) == 8)
    assert [len(engine.requests) for engine in engines] == [4, 4]
    go.set()
    assert [(await client.answer()).status for client in clients] == [200] * 8
    assert len(served.gateway._context.open_users) == 0


async def test_long_prompts_without_a_common_prefix_are_no_session(make_engine, serve):
    engines = [await make_engine() for _ in range(2)]
    served = await serve(*engines, dispatch={"stickiness_s": 1000.0})
    for number in range(8):
        await served.ask(post(prompt(f"{number} " * 1000, user="app")))
    assert min(len(engine.requests) for engine in engines) > 0


async def test_a_conversation_of_a_user_stays_at_its_engine(make_engine, serve):
    engines = [await make_engine() for _ in range(2)]
    served = await serve(*engines, dispatch={"stickiness_s": 1000.0})
    text = "once upon a time " * 100
    for _ in range(8):
        text += "and then " * 100
        await served.ask(post(prompt(text, user="person")))
    assert sorted(len(engine.requests) for engine in engines) == [0, 8]
