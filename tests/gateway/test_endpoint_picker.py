"""The endpoint picker behind a real Envoy: where requests go, and that nothing of them stays in flight."""

import asyncio
import gzip
import json
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from moe_contract.tenancy import priority_of

from tests.gateway.envoy import BUFFERED, DUPLEX, NONE
from tests.gateway.fronted import PATIENCE_S, Front, two, until
from tests.gateway.messages import SSE_END, SSE_HEAD, Received, event, json_answer, prompt
from tests.gateway.peers import Script, always

MODES = [(DUPLEX, DUPLEX), (BUFFERED, "STREAMED"), (BUFFERED, BUFFERED), (NONE, "STREAMED"), (DUPLEX, NONE)]


@pytest.mark.parametrize(("body", "answers"), MODES)
async def test_requests_go_where_the_decision_says_however_bodies_are_sent(
    front: Front, make_engine: Any, body: str, answers: str
) -> None:
    busy, idle = await two(make_engine)
    busy.agent.say_rank(waiting=9, waiting_prefill_tokens=90_000, step=2)
    fronted = await front(busy, idle, envoy={"body": body, "answers": answers})
    state = fronted.served.target_state(busy.name)
    await until(lambda: state.signal is not None and state.signal.waiting_prefill_tokens == 90_000, "the signal")
    for number in range(4):
        question = prompt(f"question {number}")
        assert (await fronted.ask(question))[0] == 200
        assert json.loads(idle.requests[-1].body) == question
        assert idle.requests[-1].headers[b"x-gateway-destination-endpoint"] == f"127.0.0.1:{idle.port}".encode()
    assert fronted.got() == [0, 4]
    await fronted.settled()
    assert fronted.gateway.stats.requests == {("completions", 200): 4}
    assert fronted.gateway.dispatcher.ejections == {}


def one_then_two(goes_on: asyncio.Event) -> Script:
    """An engine whose stream has its second token once `goes_on` is set."""

    async def answer(_request: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(SSE_HEAD + event("one"))
        await goes_on.wait()
        writer.write(event("two") + SSE_END)

    return answer


async def test_a_session_stays_at_its_engine_and_the_pick_can_be_explained(front: Front, make_engine: Any) -> None:
    fronted = await front(*await two(make_engine))
    for _ in range(6):
        headers = {"x-session-id": "talk", "x-request-id": "the-id"}
        assert (await fronted.ask(prompt("again"), headers=headers))[0] == 200
    assert sorted(fronted.got()) == [0, 6]
    await fronted.settled()
    record = fronted.gateway.recent.record("the-id")
    assert record is not None
    assert (record.status, record.attempts[0].reason) == (200, "session")


async def test_a_stream_passes_as_it_comes_and_its_first_token_is_measured(front: Front, make_engine: Any) -> None:
    goes_on = asyncio.Event()
    fronted = await front(await make_engine(one_then_two(goes_on)))
    async with fronted.session.post(fronted.envoy.url + "/v1/completions", json=prompt(stream=True)) as answer:
        first = await answer.content.readuntil(b"\n\n")
        assert b"one" in first
        assert fronted.gateway.dispatcher.in_flight == 1
        assert fronted.gateway.stats.ttft.buckets()[-1] == ("+Inf", 1)
        goes_on.set()
        assert b"two" in await answer.content.read()
    await fronted.settled()
    assert fronted.gateway.dispatcher.targets.predictions.error.buckets()[-1] == ("+Inf", 1)


async def test_without_room_a_request_is_refused_and_says_when_to_come_again(front: Front, make_engine: Any) -> None:
    engine = await make_engine()
    engine.agent.say_rank(waiting=50, waiting_prefill_tokens=900_000, step=2)
    fronted = await front(engine, dispatch={"saturation_s": 1.0}, limits={"hold_requests": 0})
    state = fronted.served.target_state(engine.name)
    await until(lambda: state.signal is not None and state.signal.waiting_prefill_tokens == 900_000, "the signal")
    async with fronted.session.post(fronted.envoy.url + "/v1/completions", json=prompt()) as answer:
        assert (answer.status, (await answer.json())["error"]["code"]) == (429, "busy")
        assert int(answer.headers["retry-after"]) >= 1
    engine.agent.say(accepting=False)
    await until(lambda: not fronted.gateway.dispatcher.accepting, "an engine that takes nothing")
    status, refusal = await fronted.ask(prompt())
    assert (status, refusal["error"]["code"]) == (503, "no_engine")
    assert fronted.got() == [0]
    await fronted.settled()


async def test_a_held_request_goes_on_when_an_engine_takes_requests(front: Front, make_engine: Any) -> None:
    engine = await make_engine()
    fronted = await front(engine)
    engine.agent.say(accepting=False)
    await until(lambda: not fronted.gateway.dispatcher.accepting, "an engine that takes nothing")
    asking = asyncio.ensure_future(fronted.ask(prompt()))
    await until(lambda: fronted.gateway.dispatcher.held == 1, "a held request")
    # Longer than Envoy waits for an answer to a message in other modes.
    await asyncio.sleep(0.5)
    engine.agent.say(accepting=True)
    assert (await asking)[0] == 200
    await fronted.settled()


@pytest.mark.parametrize("held", [True, False])
async def test_a_client_that_leaves_frees_its_place(front: Front, make_engine: Any, held: bool) -> None:
    async def first_token(_request: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(SSE_HEAD + event("one"))
        await asyncio.Event().wait()

    engine = await make_engine(first_token)
    fronted = await front(engine)
    dispatcher = fronted.gateway.dispatcher
    if held:
        engine.agent.say(accepting=False)
        await until(lambda: not dispatcher.accepting, "an engine that takes nothing")
    asking = asyncio.ensure_future(fronted.ask(prompt(stream=True)))
    await until(lambda: (dispatcher.held if held else fronted.gateway.stats.ttft.buckets()[-1][1]) == 1, "the request")
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    await fronted.settled()
    await until(lambda: fronted.gateway.stats.refusals == {"client_gone": 1}, "its end")
    if not held:
        await until(engine.requests[0].gone.is_set, "the end of the engine's work")


@pytest.mark.parametrize(
    ("body", "path", "status", "code"),
    [
        (b'{"model": ', "/v1/completions", 400, "bad_request"),
        (b"[]", "/v1/completions", 400, "bad_request"),
        (prompt(priority="high"), "/v1/completions", 400, "bad_request"),
        (prompt() | {"model": "unknown"}, "/v1/completions", 404, "model_not_found"),
        (prompt(), "/v1/load_lora_adapter", 404, "not_found"),
        (prompt(), "/v1/models", 405, "method_not_allowed"),
        (prompt("x" * 3000), "/v1/completions", 413, "body_too_large"),
    ],
)
@pytest.mark.parametrize("mode", [DUPLEX, BUFFERED])
async def test_what_the_gateway_refuses_is_refused_with_the_same_error(
    front: Front, make_engine: Any, body: Any, path: str, status: int, code: str, mode: str
) -> None:
    engine = await make_engine()
    fronted = await front(engine, limits={"max_body_bytes": 2000}, envoy={"body": mode})
    await until(lambda: fronted.gateway.dispatcher.models == {"tiny"}, "the models")
    answer = await fronted.ask(body, path)
    assert (answer[0], answer[1]["error"]["code"]) == (status, code)
    assert fronted.got() == [0]
    await fronted.settled()


@pytest.mark.parametrize("mode", [DUPLEX, BUFFERED])
async def test_bodies_arrive_whole_decoded_and_large(front: Front, make_engine: Any, mode: str) -> None:
    fronted = await front(await make_engine(), envoy={"body": mode})
    packed = gzip.compress(json.dumps(prompt("a text")).encode())
    assert (await fronted.ask(packed, headers={"content-encoding": "gzip"}))[0] == 200
    assert json.loads(fronted.engines[0].requests[-1].body) == prompt("a text")
    assert b"content-encoding" not in fronted.engines[0].requests[-1].headers
    # Envoy buffers at most 1 MiB; more is refused by itself where the body is buffered.
    question = prompt("word " * (600_000 if mode == DUPLEX else 150_000))
    assert (await fronted.ask(question))[0] == 200
    assert json.loads(fronted.engines[0].requests[-1].body) == question
    await fronted.settled()


async def test_only_endpoints_that_the_proxy_names_are_picked(front: Front, make_engine: Any) -> None:
    first, second = await two(make_engine)
    fronted = await front(first, second, envoy={"subset": [f"127.0.0.1:{second.port}", "10.0.0.1:1"]})
    for number in range(4):
        assert (await fronted.ask(prompt(f"question {number}")))[0] == 200
    assert fronted.got() == [0, 4]
    await fronted.settled()


@pytest.mark.parametrize("subset", [[], ["10.0.0.1:1"]])
async def test_of_no_endpoint_that_the_proxy_names_none_is_picked(
    front: Front, make_engine: Any, subset: list[str]
) -> None:
    fronted = await front(await make_engine(), envoy={"subset": subset})
    status, refusal = await fronted.ask(prompt())
    assert (status, refusal["error"]["code"]) == (503, "no_engine")


@pytest.mark.parametrize("mode", [DUPLEX, BUFFERED])
async def test_keys_are_checked_and_go_no_further_while_the_engine_sees_its_own_gateway(
    front: Front, make_engine: Any, tmp_path: Path, mode: str
) -> None:
    keys = tmp_path / "keys"
    keys.mkdir()
    (keys / "alice").write_text("sk-0123456789abcdef0123")
    fronted = await front(await make_engine(), auth={"key_dirs": [str(keys)]}, envoy={"body": mode})
    assert (await fronted.ask(prompt()))[0] == 401
    assert (await fronted.ask(prompt(), headers={"authorization": "Bearer sk-0123456789abcdef9999"}))[0] == 401
    given = {
        "authorization": "Bearer sk-0123456789abcdef0123",
        "x-moeserving-peer": "forged",
        "x-data-parallel-rank": "7",
    }
    assert (await fronted.ask(prompt(), headers=given))[0] == 200
    (request,) = [row for row in fronted.engines[0].requests if row.body]
    assert b"authorization" not in request.headers
    assert b"x-data-parallel-rank" not in request.headers
    signed = request.headers[b"x-moeserving-peer"]
    assert fronted.gateway._peer_tokens.allow_request(signed, b"POST", b"/v1/completions")
    assert not fronted.gateway._peer_tokens.allow(signed)
    await fronted.settled()


@pytest.mark.parametrize("mode", [DUPLEX, BUFFERED])
@pytest.mark.parametrize(
    ("asked", "level"), [({}, 10), ({"x-vllm-priority": "-9"}, 10), ({"x-vllm-priority": "5"}, 15)]
)
async def test_no_header_raises_a_client_of_the_proxy_above_its_class(
    front: Front, make_engine: Any, tmp_path: Path, mode: str, asked: dict[str, str], level: int
) -> None:
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "alice").write_text('{"keys": ["sk-0123456789abcdef0123"], "priority": 10}')
    fronted = await front(await make_engine(), auth={"key_dirs": [str(tmp_path / "keys")]}, envoy={"body": mode})
    given = {"authorization": "Bearer sk-0123456789abcdef0123", **asked}
    body = {"model": "tiny", "max_tokens": 1, "messages": [{"role": "user", "content": "x"}]}
    for path, document in (("/v1/completions", prompt()), ("/v1/messages", body)):
        async with fronted.session.post(fronted.envoy.url + path, json=document, headers=given) as answer:
            assert answer.status == 200
    of_completion, of_message = [row for row in fronted.engines[0].requests if row.body]
    for request in (of_completion, of_message):
        assert priority_of(request.headers[b"x-request-id"].decode()) == level
        assert request.head.lower().count(b"x-vllm-priority") <= 1
    assert of_message.headers[b"x-vllm-priority"] == b"%d" % level
    assert of_completion.headers.get(b"x-vllm-priority", b"%d" % level) == b"%d" % level
    assert json.loads(of_completion.body)["priority"] == level
    await fronted.settled()


async def test_with_keys_a_body_that_the_picker_does_not_see_is_refused(
    front: Front, make_engine: Any, tmp_path: Path
) -> None:
    keys = tmp_path / "keys"
    keys.mkdir()
    (keys / "alice").write_text("sk-0123456789abcdef0123")
    fronted = await front(await make_engine(), auth={"key_dirs": [str(keys)]}, envoy={"body": NONE})
    given = {"authorization": "Bearer sk-0123456789abcdef0123"}
    status, refusal = await fronted.ask(prompt(), headers=given)
    assert (status, "does not send" in refusal["error"]["message"]) == (500, True)
    async with fronted.session.get(fronted.envoy.url + "/v1/models", headers=given) as answer:
        assert answer.status == 200
    await fronted.settled()


@pytest.mark.parametrize("answers", [DUPLEX, NONE])
async def test_with_a_quota_of_tokens_an_answer_that_the_picker_does_not_see_is_refused(
    front: Front, make_engine: Any, tmp_path: Path, answers: str
) -> None:
    keys = tmp_path / "keys"
    keys.mkdir()
    (keys / "alice").write_text("sk-0123456789abcdef0123")
    auth = {"key_dirs": [str(keys)], "quota": {"tokens_per_minute": 1000}}
    fronted = await front(await make_engine(), auth=auth, envoy={"answers": answers})
    given = {"authorization": "Bearer sk-0123456789abcdef0123"}
    status, answer = await fronted.ask(prompt(), headers=given)
    assert status == (200 if answers == DUPLEX else 500)
    assert answers == DUPLEX or "quotas of tokens" in answer["error"]["message"]
    async with fronted.session.get(fronted.envoy.url + "/v1/models", headers=given) as models:
        assert models.status == 200
    await fronted.settled()


@pytest.mark.parametrize(("path", "is_anthropic"), [("/v1/messages", True), ("/v1/completions", False)])
async def test_errors_before_the_pick_have_the_shape_of_the_api(
    front: Front, make_engine: Any, tmp_path: Path, path: str, is_anthropic: bool
) -> None:
    keys = tmp_path / "keys"
    keys.mkdir()
    (keys / "alice").write_text("sk-0123456789abcdef0123")
    fronted = await front(await make_engine(), auth={"key_dirs": [str(keys)]}, limits={"max_body_bytes": 2000})
    for text, status in (("x", 401), ("x" * 3000, 413)):
        data = json.dumps(prompt(text)).encode()
        async with fronted.session.post(fronted.envoy.url + path, data=data) as answer:
            assert answer.status == status
            assert ((await answer.json()).get("type") == "error") == is_anthropic
    async with fronted.session.get(fronted.envoy.url + path) as answer:
        assert answer.status == 405
        assert ((await answer.json()).get("type") == "error") == is_anthropic
    await fronted.settled()


async def test_a_data_parallel_rank_is_named_to_its_engine(front: Front, make_engine: Any) -> None:
    engine = await make_engine(ranks=2)
    fronted = await front(engine, ranks=2)
    for number in range(6):
        given = {"x-data-parallel-rank": "7"}
        assert (await fronted.ask(prompt(f"question {number}"), headers=given))[0] == 200
    assert {request.headers[b"x-data-parallel-rank"] for request in engine.requests if request.body} == {b"0", b"1"}
    await fronted.settled()


async def test_tls_with_a_certificate_of_its_own(front: Front, make_engine: Any) -> None:
    fronted = await front(await make_engine(), picker={"tls": True})
    assert (await fronted.ask(prompt()))[0] == 200
    await fronted.settled()


async def test_an_engine_that_answers_errors_is_avoided_while_another_works(front: Front, make_engine: Any) -> None:
    bad = await make_engine(always(json_answer({"error": {"message": "broken"}}, status="500 Oh")), agent=False)
    good = await make_engine(agent=False)
    fronted = await front(bad, good)
    for number in range(40):
        await fronted.ask(prompt(f"question {number}"))
    assert fronted.gateway.dispatcher.ejections[bad.name] >= 1
    assert fronted.got()[0] < 20
    await fronted.settled()


async def test_what_no_engine_is_asked_for_is_answered_by_the_picker(front: Front, make_engine: Any) -> None:
    first, second = await two(make_engine)
    second.models = ["tiny", "adapter"]
    fronted = await front(first, second)
    await until(lambda: fronted.gateway.dispatcher.models == {"tiny", "adapter"}, "the models")
    for path, status in (("/health", 200), ("/v1/models/adapter", 200), ("/v1/models/other", 404)):
        async with fronted.session.get(fronted.envoy.url + path) as answer:
            assert answer.status == status
    async with fronted.session.get(fronted.envoy.url + "/v1/models") as answer:
        assert {row["id"] for row in (await answer.json())["data"]} == {"tiny", "adapter"}
    preflight = {"origin": "https://chat.example.org", "access-control-request-method": "POST"}
    async with fronted.session.options(fronted.envoy.url + "/v1/completions", headers=preflight) as answer:
        assert (answer.status, answer.headers["access-control-allow-methods"] != "") == (200, True)
    assert fronted.got() == [0, 0]
    await fronted.settled()


async def test_health_is_that_of_the_protocol(front: Front, make_engine: Any) -> None:
    fronted = await front(await make_engine())

    async def check(service: str) -> Any:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{fronted.port}") as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            return (await stub.Check(health_pb2.HealthCheckRequest(service=service))).status

    serving = health_pb2.HealthCheckResponse.SERVING
    for service in ("", "liveness", "readiness", "envoy.service.ext_proc.v3.ExternalProcessor"):
        assert await check(service) == serving
    with pytest.raises(grpc.aio.AioRpcError, match="no such service"):
        await check("other")
    fronted.gateway._context.draining = True
    assert await check("readiness") == health_pb2.HealthCheckResponse.NOT_SERVING
    assert await check("liveness") == serving


async def test_a_draining_picker_lets_its_answers_end(front: Front, make_engine: Any) -> None:
    goes_on = asyncio.Event()
    fronted = await front(await make_engine(one_then_two(goes_on)))
    async with fronted.session.post(fronted.envoy.url + "/v1/completions", json=prompt(stream=True)) as answer:
        await answer.content.readuntil(b"\n\n")
        draining = asyncio.ensure_future(fronted.gateway.drain())
        await until(lambda: fronted.gateway.draining, "the drain")
        goes_on.set()
        assert b"two" in await answer.content.read()
    async with asyncio.timeout(PATIENCE_S):
        await draining
    assert fronted.gateway.dispatcher.in_flight == 0


async def test_a_forced_end_waits_for_no_answer(front: Front, make_engine: Any) -> None:
    async def first_token(_request: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(SSE_HEAD + event("one"))
        await asyncio.Event().wait()

    fronted = await front(await make_engine(first_token))
    async with fronted.session.post(fronted.envoy.url + "/v1/completions", json=prompt(stream=True)) as answer:
        await answer.content.readuntil(b"\n\n")
        draining = asyncio.ensure_future(fronted.gateway.drain())
        await until(lambda: fronted.gateway.draining, "the drain")
        draining.cancel()
        await asyncio.gather(draining, return_exceptions=True)
        async with asyncio.timeout(PATIENCE_S):
            await fronted.gateway.close()
    await fronted.settled()
