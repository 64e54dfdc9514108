"""A request that its head shows to be refused gets its answer before its body has come, and none of it is kept."""

import pytest
from moe_contract.access_config import Quota
from moe_gateway.access.key_table import build_caller
from moe_gateway.access.quotas import OverQuota, QuotaBound, Quotas
from moe_gateway.http import client as client_module
from moe_gateway.http.request_reader import LONGEST_AWAITED_BYTES

from tests.gateway.messages import post, prompt
from tests.gateway.test_bad_clients import error_of
from tests.gateway.test_slow_uploads import Owner
from tests.gateway.waiting import until

KEY = "sk-0123456789abcdef0123"
BEARER = b"Authorization: Bearer " + KEY.encode() + b"\r\n"
CHUNKED = b"transfer-encoding: chunked\r\n"
EXPECT = b"Expect: 100-continue\r\n"
# A shorter body is waited for, unless the client itself waits.
LONG = b"content-length: %d\r\n" % (LONGEST_AWAITED_BYTES + 1)


def head_of(extra: bytes, path: bytes = b"/v1/completions", framing: bytes = LONG) -> bytes:
    return b"POST %b HTTP/1.1\r\nhost: g\r\n%b%b\r\n" % (path, extra, framing)


@pytest.fixture
def protect(make_engine, serve, tmp_path):
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "team").write_text(KEY)

    async def start(**quota):
        engine = await make_engine()
        auth = {"key_dirs": [str(tmp_path / "keys")], **({"quota": quota} if quota else {})}
        return engine, await serve(engine, auth=auth)

    return start


@pytest.mark.parametrize("framing", [LONG, CHUNKED, EXPECT + CHUNKED, EXPECT + b"content-length: 9\r\n"])
@pytest.mark.parametrize("credential", [b"", b"Authorization: Bearer nope\r\n", b"x-api-key: nope\r\n"])
async def test_without_a_key_the_answer_comes_before_the_body(protect, credential, framing):
    engine, served = await protect()
    client = await served.connect()
    client.send(head_of(credential, framing=framing))
    answer = await client.answer()
    assert error_of(answer)[:2] == (401, "invalid_api_key")
    assert b"www-authenticate" in answer.headers
    assert answer.headers[b"connection"] == b"close"
    assert await client.ended()
    assert engine.requests == []


async def test_the_rest_of_a_body_is_thrown_away_and_the_answer_is_not_lost(protect):
    _, served = await protect()
    client = await served.connect(limit=2**16)
    client.send(head_of(b"", framing=b"content-length: 8000000\r\n"))
    for _ in range(80):
        client.send(b"x" * 100_000)
        await client.writer.drain()
    assert (await client.answer()).status == 401
    connections = served.gateway._connections
    assert all(not connection._reader._body for connection in connections)


async def test_the_rest_of_a_body_is_no_request(protect):
    engine, served = await protect()
    client = await served.connect()
    hidden = post(prompt("x" * LONGEST_AWAITED_BYTES), extra=BEARER)
    client.send(head_of(b"", framing=b"content-length: %d\r\n" % len(hidden)))
    assert (await client.answer()).status == 401
    client.send(hidden + hidden)
    assert await client.ended()
    assert engine.requests == []


async def test_a_client_that_sends_on_without_end_is_ended(protect, monkeypatch):
    monkeypatch.setattr(client_module, "LINGER_S", 0.1)
    _, served = await protect()
    client = await served.connect()
    client.send(head_of(b"", framing=CHUNKED))
    assert (await client.answer()).status == 401
    await until(lambda: not served.gateway._connections, "the end of the connection")


@pytest.mark.parametrize(
    ("head", "status", "code"),
    [
        (head_of(b"", b"/v1/nothing"), 404, "not_found"),
        (head_of(EXPECT, b"/v1/nothing"), 404, "not_found"),
        (head_of(b"").replace(b"POST", b"PUT"), 405, "method_not_allowed"),
        (head_of(b"X-Request-Timeout: soon\r\n"), 400, "bad_request"),
        (head_of(b"Content-Encoding: br\r\n"), 415, "unsupported_encoding"),
    ],
)
async def test_what_else_the_head_shows_is_refused_at_once(make_engine, serve, head, status, code):
    served = await serve(await make_engine())
    client = await served.connect()
    client.send(head)
    assert error_of(await client.answer())[:2] == (status, code)
    assert await client.ended()


@pytest.mark.parametrize("expect", [b"", EXPECT])
async def test_over_the_quota_of_requests_the_answer_comes_before_the_body(protect, expect):
    engine, served = await protect(requests_per_minute=1)
    assert (await served.ask(post(prompt(), extra=BEARER))).status == 200
    client = await served.connect()
    client.send(head_of(BEARER + expect))
    answer = await client.answer()
    assert error_of(answer)[:2] == (429, "rate_limit_exceeded")
    assert int(answer.headers[b"retry-after"]) in range(1, 61)
    assert len(engine.requests) == 1


async def test_a_head_costs_no_quota(protect):
    _, served = await protect(requests_per_minute=1, concurrency=1)
    whole = post(prompt(), extra=BEARER + EXPECT)
    head, body = whole.split(b"\r\n\r\n")
    client = await served.connect()
    client.send(head + b"\r\n\r\n")
    assert (await client.answer()).status == 100
    client.send(body)
    assert (await client.answer()).status == 200


async def test_models_are_free_of_quotas(protect):
    _, served = await protect(requests_per_minute=1)
    assert (await served.ask(post(prompt(), extra=BEARER))).status == 200
    client = await served.connect()
    client.send(b"GET /v1/models HTTP/1.1\r\nhost: g\r\n%bcontent-length: 2\r\n\r\n" % BEARER)
    client.send(b"{}")
    assert (await client.answer()).status == 200


async def test_a_pipelined_request_is_refused_after_the_answer_before_it(protect):
    engine, served = await protect()
    client = await served.connect()
    client.send(post(prompt(), extra=BEARER) + head_of(EXPECT))
    assert (await client.answer()).status == 200
    assert (await client.answer()).status == 401
    assert await client.ended()
    assert len(engine.requests) == 1


async def test_a_pipelined_request_that_waits_for_100_continue_gets_it_in_its_turn(make_engine, serve):
    served = await serve(await make_engine())
    client = await served.connect()
    head, body = post(prompt(), extra=EXPECT).split(b"\r\n\r\n")
    client.send(post(prompt()) + head + b"\r\n\r\n")
    assert [(await client.answer()).status for _ in range(2)] == [200, 100]
    client.send(body)
    assert (await client.answer()).status == 200


@pytest.mark.parametrize(("credential", "status"), [(BEARER, 200), (b"", 401)])
async def test_a_short_body_behind_its_head_costs_no_second_look(protect, monkeypatch, credential, status):
    """Clients by h11 and httpx send head and body apart."""
    looks = []
    monkeypatch.setattr(client_module, "look_at_head", lambda *_: looks.append(1))
    engine, served = await protect()
    client = await served.connect()
    head, body = post(prompt(), extra=credential).split(b"\r\n\r\n")
    client.send(head + b"\r\n\r\n")
    await until(
        lambda: any(row._reader.url and not row._reader.in_head for row in served.gateway._connections), "the head"
    )
    client.send(body)
    assert (await client.answer()).status == status
    assert (looks, len(engine.requests)) == ([], status == 200)


@pytest.mark.parametrize(
    ("length", "looks"), [(0, False), (LONGEST_AWAITED_BYTES, False), (LONGEST_AWAITED_BYTES + 1, True)]
)
def test_the_head_of_a_long_body_is_looked_at(length, looks):
    owner = Owner()
    owner.reader.feed(head_of(b"", framing=b"content-length: %d\r\n" % length))
    assert owner.reader.has_open_head is looks


@pytest.mark.parametrize(
    ("sent", "version", "expects"), [(b"", b"1.1", True), (b"{", b"1.1", False), (b"", b"1.0", False)]
)
def test_100_continue_is_for_a_client_that_waits_for_it(sent, version, expects):
    owner = Owner()
    owner.reader.feed(head_of(EXPECT).replace(b"HTTP/1.1", b"HTTP/" + version) + sent)
    assert owner.reader.take_head().expects is expects
    assert not owner.reader.has_open_head


async def test_pages_in_browsers_see_the_refusal(make_engine, serve, tmp_path):
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "team").write_text(KEY)
    auth, cors = {"key_dirs": [str(tmp_path / "keys")]}, {"allowed_origins": ["*"]}
    served = await serve(await make_engine(), auth=auth, cors=cors)
    client = await served.connect()
    client.send(head_of(b"Origin: https://page.example\r\n"))
    answer = await client.answer()
    assert (answer.status, answer.headers[b"access-control-allow-origin"]) == (401, b"*")


async def test_a_refusal_by_the_head_is_counted_by_its_route(protect):
    _, served = await protect()
    client = await served.connect()
    client.send(head_of(b"", b"/v1/messages"))
    answer = await client.answer()
    assert answer.json["error"]["type"] == "authentication_error"
    assert served.gateway.stats.requests["messages", 401] == 1


@pytest.mark.parametrize("bound", list(QuotaBound))
def test_a_look_at_a_quota_finds_each_bound_and_takes_nothing(bound):
    field = {"requests a minute": "requests_per_minute", "tokens a minute": "tokens_per_minute"}.get(
        bound, "concurrency"
    )
    quotas, caller = Quotas(Quota(**{field: 1})), build_caller("team")
    assert quotas.look(caller, 0.0) is None
    assert quotas.look(caller, 0.0) is None
    lease = quotas.admit(caller, 1, 0.0)
    assert not isinstance(lease, OverQuota)
    over = quotas.look(caller, 0.0)
    assert over is not None
    assert over.limit is bound
