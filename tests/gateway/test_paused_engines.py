"""A paused engine of vLLM 0.33 refuses new requests in a way that may be retried; another engine takes them."""

import pytest

from tests.gateway.messages import OK, SSE_END, SSE_HEAD, chunk, json_answer, post, prompt
from tests.gateway.peers import always, answer_ok
from tests.gateway.waiting import until

TURNS = {"policy": "roundRobin"}
# What vLLM 0.33.0 makes of its `engine_paused`.
_TEXT = "Generation is paused. Please retry after it resumes."
_PLAIN = b'{"error":{"message":"%b","type":"ServiceUnavailableError","param":null,"code":503}}' % _TEXT.encode()
_NESTED = (
    b'event: error\ndata: {"type":"error","error":{"type":"internal_error","message":"1 validation error for '
    b"ChatCompletionStreamResponse\\n  input_value={'error': {'message': 'Generation is paused.', 'code': 503}}\"}}"
)
REFUSALS = {
    "in one piece": (
        {"stream": False},
        always(json_answer({"error": {"message": _TEXT, "code": 503}}, status="503 Service Unavailable")),
    ),
    "in a stream": ({"stream": True}, always(SSE_HEAD + chunk(b"data: " + _PLAIN + b"\n\n") + SSE_END)),
    "in a stream of messages": ({"stream": True}, always(SSE_HEAD + chunk(_NESTED + b"\n\n") + SSE_END)),
}


@pytest.mark.parametrize(("fields", "refuse"), REFUSALS.values(), ids=REFUSALS)
async def test_another_engine_answers_and_the_paused_one_is_not_ejected(make_engine, serve, fields, refuse):
    paused, good = await make_engine(refuse), await make_engine()
    served = await serve(paused, good, dispatch=TURNS)
    for _ in range(4):
        assert b"paused" not in (await served.ask(post(prompt(**fields)))).body
    assert len(good.requests) == 4
    assert not served.gateway.dispatcher.ejections


@pytest.mark.parametrize(("fields", "refuse"), REFUSALS.values(), ids=REFUSALS)
async def test_the_only_engine_is_asked_once_more_and_then_says_it_itself(make_engine, serve, fields, refuse):
    served = await serve(engine := await make_engine(refuse))
    answer = await served.ask(post(prompt(**fields)))
    assert b"paused" in answer.body
    assert len(engine.requests) == 2


async def test_the_only_engine_answers_once_it_goes_on(make_engine, serve):
    fields, refuse = REFUSALS["in a stream"]
    served = await serve(engine := await make_engine(refuse))
    client = await served.connect()
    client.send(post(prompt(**fields)))
    await until(lambda: bool(engine.requests))
    engine.script = answer_ok
    assert (await client.answer()).json == OK
