"""With keys a response belongs to the tenant that it was made for, and escapes no quota."""

import json
import os
import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_contract.access_config import Quota
from moe_gateway.access.stored_responses import refuse_fields
from moe_gateway.engines.response_homes import ResponseHomes
from moe_gateway.http.routes import Route
from moe_gateway.request.parsing import parse_body

from tests.gateway.messages import OK, json_answer, post
from tests.gateway.peers import always, never
from tests.gateway.test_kept_responses import about, keeps
from tests.gateway.test_large_bodies import BODY
from tests.gateway.waiting import until

A, B = "sk-0123456789abcdef0123", "sk-another-key-456789"


def bearer(key):
    return b"Authorization: Bearer %b\r\n" % key.encode()


def turn(key, previous=None, **fields):
    body = {"model": "tiny", "input": "x", "previous_response_id": previous, **fields}
    return post(body, "/v1/responses", extra=bearer(key))


def with_key(request, key):
    return request.replace(b"\r\n", b"\r\n" + bearer(key), 1)


@pytest.fixture
def protect(make_engine, serve, tmp_path):
    async def start(script=keeps, *, engines=1, **quota):
        folder = tmp_path / "team-keys"
        folder.mkdir()
        (folder / "team-a").write_text(A)
        (folder / "team-b").write_text(B)
        made = [await make_engine(script) for _ in range(engines)]
        return made, await serve(*made, auth={"key_dirs": [str(folder)], "quota": quota})

    return start


@pytest.mark.parametrize("engines", [1, 2])
@pytest.mark.parametrize("stream", [False, True], ids=["one piece", "stream"])
async def test_a_response_is_read_continued_and_cancelled_by_its_own_tenant_alone(protect, engines, stream):
    made, served = await protect(engines=engines)
    answer = await served.ask(turn(A, stream=stream))
    start = answer.body.index(b'"resp_') + 1
    name = answer.body[start : answer.body.index(b'"', start)].decode()
    for request in (about(name), about(name, cancel=True), turn(B, name)):
        answer = await served.ask(request if b"Bearer" in request else with_key(request, B))
        assert (answer.status, answer.json["error"]["code"]) == (404, "response_not_found")
    assert sum(len(engine.requests) for engine in made) == 1
    for request in (about(name), turn(A, name), about(name, cancel=True)):
        assert (await served.ask(request if b"Bearer" in request else with_key(request, A))).status == 200


async def test_a_response_that_is_not_known_is_not_asked_for(protect):
    made, served = await protect()
    answer = await served.ask(with_key(about("resp_of_another_gateway"), A))
    assert (answer.status, answer.json["error"]["code"]) == (404, "response_not_found")
    assert made[0].requests == []


async def test_the_id_of_a_response_is_not_chosen_by_a_client_with_a_key(protect):
    made, served = await protect()
    answer = await served.ask(turn(A, request_id="resp_of_mine"))
    assert (answer.status, answer.json["error"]["param"]) == (400, "request_id")
    assert made[0].requests == []


@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
@pytest.mark.parametrize("quota", [{"concurrency": 1}, {"tokens_per_minute": 10**9}], ids=["concurrency", "tokens"])
async def test_a_background_response_is_refused_where_it_would_escape_a_quota(protect, quota, large):
    made, served = await protect(**quota)
    answer = await served.ask(turn(A, background=True, pad="x" * (2_000_000 if large else 0)))
    assert (answer.status, answer.json["error"]["param"]) == (400, "background")
    assert "go on after their answer" in answer.json["error"]["message"]
    assert made[0].requests == []
    assert (await served.ask(turn(A, background=False))).status == 200


async def test_a_background_response_is_possible_with_a_quota_of_requests(protect):
    _, served = await protect(requests_per_minute=100)
    assert (await served.ask(turn(A, background=True))).status == 200


async def test_a_stream_of_a_stored_response_has_a_place_in_the_quota(protect):
    made, served = await protect(concurrency=1)
    name = (await served.ask(turn(A))).json["id"]
    made[0].script = never
    client = await served.connect()
    client.send(with_key(about(name, query="?stream=true"), A))
    await until(lambda: len(made[0].requests) == 2, "the request")
    assert (await served.ask(with_key(about(name), A))).status == 429
    client.reset()


async def test_get_counts_as_a_request_and_the_models_do_not(protect):
    _, served = await protect(requests_per_minute=2)
    name = (await served.ask(turn(A))).json["id"]
    assert (await served.ask(with_key(b"GET /v1/models HTTP/1.1\r\nhost: g\r\n\r\n", A))).status == 200
    assert [(await served.ask(with_key(about(name), A))).status for _ in range(2)] == [200, 429]


async def test_a_body_that_is_being_read_has_a_place_in_the_quota(protect):
    _, served = await protect(always(json_answer(OK)), concurrency=2)
    large = post(BODY, extra=bearer(A))
    assert (await served.ask(large)).status == 200
    process = served.gateway._context.bodies._process
    os.kill(process.pid, signal.SIGSTOP)
    try:
        clients = [await served.connect() for _ in range(2)]
        for client in clients:
            client.send(large)
        await until(lambda: sum(row._exchange is not None for row in served.gateway._connections) == 2, "two bodies")
        assert (await served.ask(large)).status == 429
        assert (await served.ask(post({"model": "tiny", "prompt": "x"}, extra=bearer(A)))).status == 429
        clients[1].reset()
    finally:
        os.kill(process.pid, signal.SIGCONT)
    assert (await clients[0].answer()).status == 200
    uses = served.gateway._context.gate._quotas._uses
    await until(lambda: uses["team-a"].in_flight == 0, "no request in flight")
    assert (await served.ask(post(BODY[:-1], extra=bearer(A)))).status == 400
    await until(lambda: uses["team-a"].in_flight == 0, "no request in flight")


NAMES = st.sampled_from(["resp_1", "resp_2", "resp_3"])
TENANTS = st.sampled_from(["a", "b"])


@given(st.lists(st.tuples(NAMES, TENANTS, st.sampled_from(["x", "y"])), max_size=20))
def test_the_first_tenant_of_a_response_stays_its_owner(rows):
    homes, owners, servers = ResponseHomes(), {}, {}
    for name, tenant, server in rows:
        homes.record(name, server, tenant)
        if owners.setdefault(name, tenant) == tenant:
            servers[name] = server
    for name in ("resp_1", "resp_2", "resp_3"):
        assert homes.find(name) == servers.get(name)
        assert [tenant for tenant in "ab" if homes.belongs_to(name, tenant)] == [*owners.get(name, "")]


@pytest.mark.parametrize(
    ("fields", "quota", "param"),
    [
        ({}, {"concurrency": 1}, None),
        ({"background": True}, {}, None),
        ({"background": True}, {"requests_per_minute": 1}, None),
        ({"background": "true"}, {"concurrency": 1}, "background"),
        ({"background": 1}, {"tokens_per_minute": 1}, "background"),
        ({"background": None}, {"tokens_per_minute": 1}, None),
        ({"request_id": "resp_1"}, {}, "request_id"),
        ({"request_id": None}, {}, "request_id"),
    ],
)
def test_fields_that_are_refused(fields, quota, param):
    parsed = parse_body(Route.RESPONSES, json.dumps({"input": "x", **fields}).encode())
    denial = refuse_fields(parsed, Quota(**quota))
    assert (None if denial is None else denial.param) == param
