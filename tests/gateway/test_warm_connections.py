"""An engine that begins to fail on connections that have served before gets one attempt of a request, not both."""

import pytest

from tests.gateway.messages import OK, post, prompt
from tests.gateway.peers import answer_ok

TURNS = {"policy": "roundRobin"}


@pytest.mark.parametrize("bad_answer", [b"", b"\x00\xff no HTTP\r\n\r\n"], ids=["closed", "not HTTP"])
async def test_another_engine_takes_over_from_one_that_fails_on_a_warm_connection(make_engine, serve, bad_answer):
    fails = False

    async def turns_bad(request, writer):
        if not fails:
            await answer_ok(request, writer)
            return
        writer.write(bad_answer)
        writer.close()

    bad, good = await make_engine(turns_bad), await make_engine()
    served = await serve(bad, good, dispatch=TURNS)
    clients = [await served.connect() for _ in range(8)]
    for client in clients:
        client.send(post(prompt()))
    assert [(await client.answer()).json for client in clients] == [OK] * 8
    fails, before = True, len(bad.requests)
    for client in clients:
        client.send(post(prompt()))
    assert [(await client.answer()).json for client in clients] == [OK] * 8
    assert len(bad.requests) > before
    assert served.in_flight == 0
