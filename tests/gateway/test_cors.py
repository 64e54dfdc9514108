"""Pages in browsers use the gateway as they use vLLM itself: preflights are answered, and every answer can be read."""

import pytest
from moe_contract.documents import parse_model
from moe_contract.gateway_config import Cors
from moe_contract.input_errors import InvalidInput
from moe_gateway.http.cors import OriginPolicy

from tests.gateway.messages import OK, SSE_END, SSE_HEAD, event, json_answer, post, prompt
from tests.gateway.peers import always

PAGE = "https://chat.example.org"
ORIGIN = f"Origin: {PAGE}\r\n".encode()
ONE = {"allowed_origins": [PAGE]}


def preflight(path="/v1/chat/completions", origin=ORIGIN):
    asked = b"Access-Control-Request-Method: POST\r\nAccess-Control-Request-Headers: authorization,content-type\r\n"
    return b"OPTIONS %b HTTP/1.1\r\nhost: g\r\n%b%b\r\n" % (path.encode(), origin, asked)


@pytest.mark.parametrize(
    ("cors", "allowed"), [({}, b"*"), (ONE, PAGE.encode()), ({"allowed_origins": ["https://other.org", "*"]}, b"*")]
)
async def test_a_preflight_is_answered_by_the_gateway(make_engine, serve, cors, allowed):
    engine = await make_engine()
    served = await serve(engine, cors=cors)
    client = await served.connect()
    for path in ("/v1/chat/completions", "/v1/models", "/health"):
        client.send(preflight(path))
        answer = await client.answer()
        assert (answer.status, answer.headers[b"access-control-allow-origin"]) == (200, allowed)
        assert answer.headers[b"access-control-allow-headers"] == b"authorization,content-type"
        assert b"POST" in answer.headers[b"access-control-allow-methods"]
    assert engine.requests == []


@pytest.mark.parametrize("cors", [{"allowed_origins": []}, {"allowed_origins": ["http://chat.example.org"]}])
async def test_another_origin_is_not_allowed(make_engine, serve, cors):
    engine = await make_engine(always(json_answer(OK, extra=b"access-control-allow-origin: *\r\n")))
    served = await serve(engine, cors=cors)
    for request in (preflight(), post(prompt(), extra=ORIGIN), post(b"{", extra=ORIGIN)):
        answer = await served.ask(request)
        assert b"access-control-allow-origin" not in answer.headers


async def test_other_options_and_unknown_paths_are_no_preflights(make_engine, serve):
    served = await serve(await make_engine())
    assert (await served.ask(preflight("/pause"))).status == 404
    assert (await served.ask(preflight(origin=b""))).status == 405
    plain = b"OPTIONS /v1/models HTTP/1.1\r\nhost: g\r\n%b\r\n" % ORIGIN
    assert (await served.ask(plain)).status == 405


ERRORS = {
    "bad body": (post(b"{", extra=ORIGIN), 400),
    "unknown model": (post({"model": "other"}, extra=ORIGIN), 404),
    "unknown path": (post(prompt(), "/pause", extra=ORIGIN), 404),
    "method": (b"GET /v1/completions HTTP/1.1\r\nhost: g\r\n%b\r\n" % ORIGIN, 405),
    "too large": (post(b"x" * 2000, extra=ORIGIN), 413),
    "own models": (b"GET /health HTTP/1.1\r\nhost: g\r\n%b\r\n" % ORIGIN, 200),
}


@pytest.mark.parametrize(("request_bytes", "status"), ERRORS.values(), ids=ERRORS)
async def test_the_gateways_own_answers_can_be_read(make_engine, serve, request_bytes, status):
    served = await serve(await make_engine(), limits={"max_body_bytes": 1000}, cors=ONE)
    answer = await served.ask(request_bytes)
    assert answer.status == status
    assert answer.headers[b"access-control-allow-origin"] == PAGE.encode()
    assert answer.headers[b"vary"] == b"origin"


@pytest.mark.parametrize(
    "engines_answer",
    [
        json_answer(OK),
        json_answer(OK, extra=b"Access-Control-Allow-Origin: https://other.org\r\n"),
        json_answer({}, status="400 Bad Request"),
        SSE_HEAD + event("a") + SSE_END,
    ],
)
async def test_an_engines_answer_gets_the_gateways_word_once(make_engine, serve, engines_answer):
    served = await serve(await make_engine(always(engines_answer)))
    answer = await served.ask(post(prompt(stream=True), extra=ORIGIN))
    assert answer.raw.lower().count(b"access-control-allow-origin") == 1
    assert answer.headers[b"access-control-allow-origin"] == b"*"


async def test_a_failed_engine_and_an_early_head_can_be_read_too(make_engine, serve):
    engine = await make_engine()
    served = await serve(engine, limits={"hold_timeout_s": 0.5, "stream_head_after_s": 0.1})
    engine.agent.say(accepting=False)
    await served.takes()
    waiting, streaming = await served.connect(), await served.connect()
    waiting.send(post(prompt(), extra=ORIGIN))
    streaming.send(post(prompt(stream=True), extra=ORIGIN))
    for client, status in ((streaming, 200), (waiting, 503)):
        answer = await client.answer()
        assert (answer.status, answer.headers[b"access-control-allow-origin"]) == (status, b"*")


async def test_without_an_origin_nothing_is_said(make_engine, serve):
    served = await serve(await make_engine())
    for request in (post(prompt()), post(b"{"), post(prompt(), extra=b"x-origin: a\r\nx-rigin: b\r\n")):
        assert b"access-control" not in (await served.ask(request)).raw


@pytest.mark.parametrize(
    "line", [b"origin: null\r\n", b"ORIGIN:null\r\n", b"a: b\r\nOrigin:  null \t\r\nc: d\r\n", b"Origin: null\r\n"]
)
def test_the_origin_is_found_however_it_is_spelt(line):
    assert b"access-control-allow-origin: null\r\n" in OriginPolicy(["null"]).answer_lines(line)


@pytest.mark.parametrize("origin", ["chat.example.org", "https://chat.example.org/", "https://A.org", "", "**", "a b"])
def test_what_is_no_origin_is_refused(origin):
    with pytest.raises(InvalidInput, match="allowed_origins"):
        parse_model(Cors, {"allowed_origins": [origin]})
