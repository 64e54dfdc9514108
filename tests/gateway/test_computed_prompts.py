"""Only prompts that an engine has computed, or is about to, count as cached there."""

import asyncio

import pytest
from moe_gateway.http.routes import Route
from moe_gateway.request.parsing import parse_body

from tests.gateway.messages import SSE_END, SSE_HEAD, event, json_answer, post, prompt
from tests.gateway.peers import always, never, reset
from tests.gateway.waiting import until

TEXT = "once upon a time " * 1000
REFUSED = {"error": {"message": "too long", "type": "BadRequestError", "code": 400}}


def cached(served) -> int:
    parsed = parse_body(Route.COMPLETIONS, post(prompt(TEXT)).split(b"\r\n\r\n")[1])
    return sum(served.gateway.dispatcher.build_job(parsed, None)[0].cached.values())


@pytest.mark.parametrize(
    "answer",
    [
        json_answer(REFUSED, status="400 Bad Request"),
        json_answer(REFUSED, status="500 Internal Server Error"),
        SSE_HEAD + b'28\r\ndata: {"error": {"code": 400, "a": "bcd"}}\n\n\r\n' + SSE_END,
    ],
)
async def test_a_refused_prompt_is_not_cached(make_engine, serve, answer):
    served = await serve(await make_engine(always(answer)))
    await served.ask(post(prompt(TEXT, stream=True)))
    assert served.in_flight == 0
    assert cached(served) == 0


async def test_an_answered_prompt_is_cached_from_when_it_is_sent(make_engine, serve):
    go = asyncio.Event()

    async def slow(_request, writer):
        await go.wait()
        writer.write(SSE_HEAD + event("a") + SSE_END)

    engine = await make_engine(slow)
    served = await serve(engine)
    client = await served.connect()
    client.send(post(prompt(TEXT, stream=True)))
    await until(lambda: engine.requests)
    assert cached(served) > 0
    go.set()
    await client.answer()
    assert cached(served) > 0


@pytest.mark.parametrize("first", [b"", SSE_HEAD + event("a")], ids=["before the first token", "after it"])
async def test_a_prompt_whose_client_leaves_before_the_first_token_is_not_cached(make_engine, serve, first):
    async def begins(request, writer):
        writer.write(first)
        await never(request, writer)

    engine = await make_engine(begins)
    served = await serve(engine)
    client = await served.connect()
    client.send(post(prompt(TEXT, stream=True)))
    await until(lambda: engine.requests)
    if first:
        await client.reader.readuntil(b"\r\n\r\n")
    client.reset()
    await until(lambda: served.in_flight == 0)
    assert (cached(served) > 0) is bool(first)


async def test_a_prompt_is_cached_at_the_engine_that_answers_alone(make_engine, serve):
    async def breaks(_request, writer):
        reset(writer)

    bad, good = await make_engine(breaks), await make_engine()
    served = await serve(bad, good, dispatch={"policy": "roundRobin"})
    for _ in range(2):
        await served.ask(post(prompt(TEXT)))
    parsed = parse_body(Route.COMPLETIONS, post(prompt(TEXT)).split(b"\r\n\r\n")[1])
    assert {target.server for target in served.gateway.dispatcher.build_job(parsed, None)[0].cached} == {good.name}
