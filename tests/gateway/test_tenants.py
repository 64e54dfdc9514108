"""Whose a request is: from the client's header to the engine's request id and to the order of held requests."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_contract.documents import parse_model
from moe_contract.gateway_config import GatewayConfig
from moe_contract.input_errors import InvalidInput
from moe_contract.tenancy import DEFAULT_HEADER, hash_tenant, tenant_of
from moe_gateway.http.heads import read_tenant
from moe_scheduling.request.fairness import ANONYMOUS_TENANT

from tests.gateway.messages import post, prompt

HEADER = DEFAULT_HEADER.encode()
OFF = {"fairness_horizon_s": 0.0}


def of(tenant: bytes, request_id: bytes = b"mine", header: bytes = b"X-Gateway-Inference-Fairness-ID") -> bytes:
    return post(prompt(), extra=b"%b: %b\r\nX-Request-Id: %b\r\n" % (header, tenant, request_id))


async def test_the_engine_gets_the_tenant_and_the_client_its_own_id(make_engine, serve):
    engine = await make_engine()
    served = await serve(engine)
    answer = await served.ask(of(b"team-a"))
    sent = engine.requests[0].headers[b"x-request-id"]
    assert sent == b"mine.t" + hash_tenant(b"team-a").encode()
    assert answer.headers[b"x-request-id"] == b"mine"
    assert engine.requests[0].headers[HEADER] == b"team-a"


async def test_a_request_that_the_parser_reads_has_the_same_tenant(make_engine, serve):
    engine = await make_engine()
    served = await serve(engine)
    client = await served.connect()
    head, body = of(b"team-a").split(b"\r\n\r\n")
    client.send(head)
    client.send(b"\r\n\r\n" + body)
    assert (await client.answer()).headers[b"x-request-id"] == b"mine"
    assert tenant_of(engine.requests[0].headers[b"x-request-id"].decode()) == hash_tenant(b"team-a")


@pytest.mark.parametrize("off", [{"request": OFF}, {"request": {"policy": "fcfs"}}])
@pytest.mark.parametrize(("request_id", "sent"), [(b"mine", b"mine"), (b"a.t1a2b3c4dp-5", b"a.t1a2b3c4dp-5.t00000000")])
async def test_without_tenants_an_id_stays_as_it_was_unless_it_names_one(make_engine, serve, off, request_id, sent):
    engine = await make_engine()
    served = await serve(engine, **off)
    await served.ask(of(b"team-a", request_id))
    assert engine.requests[0].headers[b"x-request-id"] == sent


async def test_where_no_header_names_tenants_a_clients_id_does_not_either(make_engine, serve):
    engine = await make_engine()
    served = await serve(engine, tenant_header="")
    answers = [await served.ask(of(b"team-a", request_id)) for request_id in (b"a.t1a2b3c4d", b"mine")]
    assert [request.headers[b"x-request-id"] for request in engine.requests] == [b"a.t1a2b3c4d.t00000000", b"mine"]
    assert [answer.headers[b"x-request-id"] for answer in answers] == [b"a.t1a2b3c4d", b"mine"]


async def test_another_header_may_name_the_tenant(make_engine, serve):
    engine = await make_engine()
    served = await serve(engine, tenant_header="x-team")
    await served.ask(of(b"a", header=b"X-Team"))
    await served.ask(of(b"a"))
    seen = [tenant_of(request.headers[b"x-request-id"].decode()) for request in engine.requests]
    assert seen == [hash_tenant(b"a"), ANONYMOUS_TENANT]


@pytest.mark.parametrize(
    ("tenant", "expected"),
    [
        (b"", ANONYMOUS_TENANT),
        (b" \t ", ANONYMOUS_TENANT),
        (b"  a  ", hash_tenant(b"a")),
        (b"\xff\xfe", hash_tenant(b"\xff\xfe")),
        (b"a, b", hash_tenant(b"a, b")),
        (b"x" * 5000, hash_tenant(b"x" * 5000)),
        (b"id.t00000000-0", hash_tenant(b"id.t00000000-0")),
    ],
)
async def test_whatever_stands_in_the_header_only_a_hash_of_it_goes_into_the_id(make_engine, serve, tenant, expected):
    engine = await make_engine()
    served = await serve(engine)
    assert (await served.ask(of(tenant))).status == 200
    sent = engine.requests[0].headers[b"x-request-id"]
    assert sent == (b"mine.t" + expected.encode() if expected else b"mine")


async def test_an_id_that_names_another_tenant_is_not_believed(make_engine, serve):
    engine = await make_engine()
    served = await serve(engine)
    victim = hash_tenant(b"victim").encode()
    answers = [await served.ask(of(name, b"x.t" + victim)) for name in (b"", b"team-a")]
    seen = [tenant_of(request.headers[b"x-request-id"].decode()) for request in engine.requests]
    assert seen == [ANONYMOUS_TENANT, hash_tenant(b"team-a")]
    assert [answer.headers[b"x-request-id"] for answer in answers] == [b"x.t" + victim] * 2


async def test_what_one_tenant_was_sent_counts_against_what_it_has_held(make_engine, serve):
    engine = await make_engine()
    served = await serve(engine, request={"ageing_rate": 1.0, "ageing_horizon_s": 0.0, "fairness_horizon_s": 60.0})
    for rows in ([(b"flood", 2000), (b"small", 20)], [(b"small", 20), (b"flood", 20), (b"small", 20)]):
        engine.agent.say(accepting=False)
        await served.takes()
        clients = []
        for name, size in rows:
            clients.append(await served.connect())
            clients[-1].send(post(prompt("x" * size), extra=b"%b: %b\r\n" % (HEADER, name)))
            await served.held(len(clients))
        engine.agent.say(accepting=True)
        for client in clients:
            await client.answer()
    assert [request.headers[HEADER] for request in engine.requests[2:]] == [b"small", b"small", b"flood"]


names = st.from_regex(r"[0-9a-z-]{1,20}", fullmatch=True)
values = st.binary(max_size=40).filter(lambda value: not set(value) & {10, 13})


@given(st.lists(st.tuples(names, values), max_size=5), names, values)
def test_only_the_header_of_that_name_is_read(rows, name, value):
    others = b"".join(b"%b: %b\r\n" % (other.encode(), text) for other, text in rows if other != name)
    line = b"%b:%b\r\n" % (name.upper().encode(), value)
    assert read_tenant(others + line, name.encode()) == hash_tenant(value.strip(b" \t"))
    assert read_tenant(line + others, name.encode()) == hash_tenant(value.strip(b" \t"))
    assert read_tenant(others, name.encode()) == ANONYMOUS_TENANT


@pytest.mark.parametrize(
    ("name", "said"),
    [
        *((name, "the name of a header") for name in ("X-Team", "x team", "x:team", "x" * 65, "x-team\n")),
        # The gateway writes it itself, so no client's value gets through.
        ("host", "host cannot name a tenant: the gateway takes none of accept-encoding, connection"),
        ("x-request-id", "x-request-id cannot name a tenant"),
    ],
)
def test_what_is_no_header_for_tenants_is_refused(name, said):
    listen = {"port": 1}
    body = {"listen": listen, "admin": listen, "token_file": "t", "tenant_header": name}
    with pytest.raises(InvalidInput, match=f"tenant_header: {said}"):
        parse_model(GatewayConfig, body)
