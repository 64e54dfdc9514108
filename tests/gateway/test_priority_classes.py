"""The class of a key on its way to an engine: by the body, by vLLM's header, and by the id of the request."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_contract.tenancy import hash_tenant, priority_of, tenant_of
from moe_gateway.access.key_table import build_caller
from moe_gateway.access.priorities import apply_class, build_engine_id, read_priority
from moe_gateway.endpoint_picker.request_head import find_given
from moe_gateway.http.routes import Route
from moe_gateway.request.context import ClientRequest
from moe_gateway.request.reading import NO_BODY
from moe_scheduling.request.order import LARGEST_EXACT

from tests.gateway.messages import post, prompt
from tests.gateway.test_forms import form
from tests.gateway.test_quotas import BEARER
from tests.gateway.waiting import until

HEADER = b"x-vllm-priority"


def request_of(headers: bytes, body: bytes = b"{}") -> ClientRequest:
    return ClientRequest(b"POST", b"/", headers, body, b"id", None, True, False, 0.0)


def seen_by_vllm(received) -> int:
    """The priority that vLLM gives a request of a chat or completion."""
    header = received.headers.get(HEADER)
    return json.loads(received.body).get("priority", 0) if header is None else int(header)


@pytest.mark.parametrize(
    ("asked", "fields", "level"),
    [
        (b"", {}, 10),
        (b"X-Vllm-Priority: -100\r\n", {}, 10),
        (b"x-vllm-priority:-100\r\n", {"priority": 4}, 10),
        (b"X-VLLM-PRIORITY: 7\r\n", {"priority": 4}, 17),
        (b"X-Vllm-Priority: -5\r\nX-Vllm-Priority: -6\r\n", {}, 10),
        (b"X-Vllm-Priority: urgent\r\n", {"priority": 4}, 14),
        (b"X-Vllm-Priority: 0\r\n", {}, 10),
    ],
)
async def test_no_header_raises_a_client_above_its_class(limited, asked, fields, level):
    engine, served = await limited(priority=10)
    # The second head is read by the parser.
    for kind in (b"", b"Connection: x-nothing\r\n"):
        answer = await served.ask(post(prompt(**fields), extra=BEARER + kind + asked))
        assert answer.status == 200
        assert seen_by_vllm(engine.requests[-1]) == level
        assert engine.requests[-1].head.lower().count(HEADER) <= 1
        assert priority_of(engine.requests[-1].headers[b"x-request-id"].decode()) == level


@pytest.mark.parametrize("asked", [b"", b"X-Vllm-Priority: -3\r\n"])
async def test_the_class_reaches_messages_by_the_header(limited, asked):
    engine, served = await limited(priority=10)
    body = {"model": "tiny", "max_tokens": 1, "messages": [{"role": "user", "content": "x"}]}
    await served.ask(post(body, "/v1/messages", extra=BEARER + asked))
    assert engine.requests[0].headers[HEADER] == b"10"
    assert json.loads(engine.requests[0].body) == body


async def test_the_class_reaches_forms_by_the_id(limited):
    engine, served = await limited(priority=10)
    request = post(form(("model", b"tiny"), ("file", b"x")), "/v1/audio/transcriptions", extra=BEARER)
    kind = b"content-type: multipart/form-data; boundary=b-1"
    await served.ask(request.replace(b"content-type: application/json", kind))
    request_id = engine.requests[0].headers[b"x-request-id"].decode()
    assert (priority_of(request_id), tenant_of(request_id)) == (10, hash_tenant(b"team-a"))


async def test_without_a_class_a_head_passes_as_it_is(limited):
    engine, served = await limited()
    await served.ask(post(prompt(), extra=BEARER + b"X-Vllm-Priority: -3\r\n"))
    assert engine.requests[0].headers[HEADER] == b"-3"
    assert priority_of(engine.requests[0].headers[b"x-request-id"].decode()) is None


async def test_held_requests_are_ordered_by_the_header_that_vllm_reads(make_engine, serve):
    engine = await make_engine()
    served = await serve(engine, request={"policy": "priority"})
    engine.agent.say(accepting=False)
    await served.takes()
    rows = [("late", b"4", 1), ("first", b"-2", 9), ("last", b"5", -9)]
    for count, (text, header, field) in enumerate(rows, start=1):
        client = await served.connect()
        client.send(post(prompt(text, priority=field), extra=b"X-Vllm-Priority: %b\r\n" % header))
        await served.held(count)
    engine.agent.say(accepting=True)
    await until(lambda: len(engine.requests) == 3, "all requests")
    assert [json.loads(row.body)["prompt"] for row in engine.requests] == ["first", "late", "last"]


@pytest.mark.parametrize(
    ("route", "priority"),
    [
        *((route, 7) for route in (Route.CHAT, Route.COMPLETIONS, Route.RESPONSES, Route.MESSAGES)),
        *((route, 3) for route in (Route.EMBEDDINGS, Route.GENERATE, Route.TRANSCRIPTIONS)),
    ],
)
def test_the_header_counts_where_vllm_reads_it(route, priority):
    assert (
        read_priority(request_of(b"X-Vllm-Priority: 7\r\n"), route, NO_BODY._replace(priority=3)).priority == priority
    )


names = st.sampled_from([b"x-vllm-priority", b"X-Vllm-Priority", b"x-vllm-priority2", b"a-x-vllm-priority", b"x-other"])
lines = st.lists(st.tuples(names, st.integers(-9, 9).map(lambda value: b"%d" % value) | st.just(b"none")), max_size=5)


@given(lines=lines, level=st.integers(-5, 5), route=st.sampled_from([row for row in Route if row.has_job]))
def test_an_engine_reads_no_level_above_the_class(lines, level, route):
    request = request_of(b"".join(b"%b: %b\r\n" % line for line in lines))
    parsed = apply_class(request, route, read_priority(request, route, NO_BODY), level)
    assert parsed.priority >= level
    sent = [line.split(b": ") for line in request.headers.split(b"\r\n")[:-1]]
    assert [int(value) for name, value in sent if name.lower() == HEADER] in ([], [parsed.priority])
    rest = [list(line) for line in lines if line[0].lower() != HEADER]
    assert [line for line in sent if line[0].lower() != HEADER] == rest


@given(headers=st.lists(st.tuples(st.just("x-vllm-priority"), st.sampled_from([b"1", b"2", b"-9"])), max_size=3))
def test_a_proxy_replaces_what_a_client_asks_for_by_what_its_class_allows(headers):
    written = b"accept: a\r\nx-vllm-priority: 2\r\n"
    expected = {} if headers == [("x-vllm-priority", b"2")] else {"x-vllm-priority": b"2"}
    assert find_given(headers, written) == expected
    theirs = b"".join(b"%b: %b\r\n" % (name.encode(), value) for name, value in headers)
    assert find_given(headers, theirs) == {}


@pytest.mark.parametrize(
    ("caller", "is_fair", "expected"),
    [
        (None, False, b"id"),
        (None, True, b"id"),
        (build_caller("t"), False, b"id"),
        (build_caller("t"), True, b"id.t" + hash_tenant(b"t").encode()),
        (build_caller("t", 4), True, b"id.t" + hash_tenant(b"t").encode() + b"p6"),
        (build_caller("t", 4), False, b"id.t00000000p6"),
    ],
)
def test_the_id_for_an_engine(caller, is_fair, expected):
    tenant = caller.tenant if caller is not None and is_fair else ""
    request = replace(request_of(b""), caller=caller)
    assert build_engine_id(request, tenant, 6, is_fair=is_fair) == expected


@pytest.mark.parametrize("is_fair", [True, False])
@pytest.mark.parametrize("caller", [None, build_caller("t")])
def test_no_client_writes_its_priority_or_tenant_into_its_id(caller, is_fair):
    request = replace(request_of(b""), caller=caller, request_id=b"a.t1a2b3c4dp-5")
    signed = build_engine_id(request, "", 6, is_fair=is_fair).decode()
    assert (priority_of(signed), tenant_of(signed)) == (None, "")


@pytest.mark.parametrize(
    "asked", [2**64, -(2**64), 10**4000, -(10**4000)], ids=["64 bits", "below", "many digits", "many below"]
)
def test_a_header_asks_for_no_more_than_numbers_that_every_reader_takes(asked):
    parsed = read_priority(request_of(b"X-Vllm-Priority: %d\r\n" % asked), Route.CHAT, NO_BODY)
    assert parsed.priority == (LARGEST_EXACT if asked > 0 else -LARGEST_EXACT)


@pytest.mark.parametrize("asked", ["9" * 30, "-" + "9" * 30])
async def test_a_body_of_a_class_asks_for_no_more_either(limited, asked):
    engine, served = await limited(priority=0)
    assert (await served.ask(post(prompt(priority=asked), extra=BEARER))).status == 200
    assert seen_by_vllm(engine.requests[-1]) == max(0, min(int(asked), LARGEST_EXACT))
