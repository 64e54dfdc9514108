"""`GET /v1/requests/{id}`: why a request went to its engine, for the newest requests."""

import asyncio
from types import SimpleNamespace

import aiohttp
import pytest
from moe_contract.clients import GatewayClient
from moe_contract.request_record import RequestRecord, write_request_record
from moe_gateway.request import recent_requests
from moe_gateway.request.recent_requests import RecentRequests
from moe_scheduling.engine.choice import EngineSettings, Job, Send, SendReason
from moe_scheduling.engine.target_state import TargetState
from moe_scheduling.request.order import LARGEST_EXACT
from moe_scheduling.signals import Target

from tests.gateway.clients import Served
from tests.gateway.compiled import interpreted
from tests.gateway.messages import SSE_END, SSE_HEAD, event, post, prompt
from tests.gateway.peers import always, reset


async def fetch(served: Served, request_id: str) -> RequestRecord | None:
    async with aiohttp.ClientSession() as session:
        return await GatewayClient(session, served.admin_url).request(request_id)


async def ask(served: Served, request_id: str, **fields: object) -> int:
    client = await served.connect()
    client.send(post(prompt("why", **fields), extra=b"x-request-id: %b\r\n" % request_id.encode()))
    return (await client.answer()).status


async def test_a_request_is_explained_by_the_terms_of_every_engine(serve, make_engine):
    served = await serve(await make_engine(), await make_engine())
    assert await ask(served, "request-1", priority=3) == 200
    record = await fetch(served, "request-1")
    assert (record.route, record.model, record.priority, record.status) == ("completions", "tiny", 3, 200)
    assert record.prompt_tokens >= 1
    (attempt,) = record.attempts
    assert attempt.reason == "least_predicted"
    assert {row.name for row in attempt.targets} == {"engine-0", "engine-1"}
    assert attempt.targets[0].name == attempt.name
    assert attempt.targets[0].requests == 0
    assert attempt.predicted_s == pytest.approx(attempt.targets[0].predicted_s)
    assert record.duration_s > 0
    assert record.ttft_s is None


async def test_a_stream_has_its_time_to_first_token(serve, make_engine):
    served = await serve(await make_engine(always(SSE_HEAD + event("a") + SSE_END)))
    assert await ask(served, "request-1", stream=True) == 200
    record = await fetch(served, "request-1")
    assert 0 < record.ttft_s <= record.duration_s


async def test_a_stream_that_runs_has_its_time_to_first_token_and_no_end(serve, make_engine):
    going = asyncio.Event()

    async def slow(_request, writer):
        writer.write(SSE_HEAD + event("a"))
        await going.wait()
        writer.write(SSE_END)

    served = await serve(await make_engine(slow))
    client = await served.connect()
    client.send(post(prompt("why", stream=True), extra=b"x-request-id: request-1\r\n"))
    async with asyncio.timeout(60):
        while (record := await fetch(served, "request-1")) is None or record.ttft_s is None:
            await asyncio.sleep(0.01)
    assert (record.status, record.duration_s) == (None, None)
    going.set()
    await client.answer()
    ended = await fetch(served, "request-1")
    assert (ended.ttft_s, ended.status) == (record.ttft_s, 200)


async def test_each_engine_that_failed_a_request_is_an_attempt(serve, make_engine):
    async def broken(_request, writer):
        reset(writer)

    served = await serve(await make_engine(broken), await make_engine(broken))
    assert await ask(served, "request-1") == 502
    record = await fetch(served, "request-1")
    assert {attempt.name for attempt in record.attempts} == {"engine-0", "engine-1"}
    assert [attempt.after_s for attempt in record.attempts] == sorted(attempt.after_s for attempt in record.attempts)
    assert record.status == 502
    assert record.problem


async def test_a_request_with_a_huge_priority_is_explained(serve, make_engine):
    served = await serve(await make_engine())
    client = await served.connect()
    client.send(post(prompt("why"), extra=b"x-request-id: huge\r\nX-Vllm-Priority: %b\r\n" % (b"9" * 30)))
    assert (await client.answer()).status == 200
    assert (await fetch(served, "huge")).priority == LARGEST_EXACT


@pytest.mark.parametrize("asked", ["9" * 30, "9" * 4000])
async def test_a_body_with_a_huge_priority_is_explained(serve, make_engine, asked):
    served = await serve(await make_engine())
    client = await served.connect()
    client.send(post(prompt("why", priority=asked), extra=b"x-request-id: huge\r\n"))
    assert (await client.answer()).status == 200
    assert (await fetch(served, "huge")).priority == LARGEST_EXACT


async def test_an_unknown_request_is_404(serve, make_engine):
    served = await serve(await make_engine())
    assert await fetch(served, "nobody/asked this?") is None


def exchange(number: int, arrived_s: float = 0.0) -> SimpleNamespace:
    return SimpleNamespace(
        request=SimpleNamespace(request_id=b"request-%d" % number, arrived_s=arrived_s),
        route=SimpleNamespace(label="chat"),
        continued="",
        job=Job(10, model="tiny"),
        ttft_s=None,
    )


def fleet(count: int) -> SimpleNamespace:
    states = [TargetState(Target(f"engine-{number}")) for number in range(count)]
    by_target = {state.target: state for state in states}
    return SimpleNamespace(target_states=by_target, partial_models={}, settings=EngineSettings())


SENDING = Send(Target("engine-1"), 0.5, SendReason.TURN)


@interpreted
def test_the_oldest_request_is_forgotten_first(monkeypatch):
    monkeypatch.setattr(recent_requests, "REMEMBERED_REQUESTS", 3)
    recent = RecentRequests()
    for number in range(5):
        recent.attempt(exchange(number), SENDING, fleet(2), now_s=float(number))
        recent.end(exchange(number), 200, "", now_s=float(number))
    assert [recent.record(f"request-{number}") is not None for number in range(5)] == [False, False, True, True, True]


@interpreted
def test_terms_are_recorded_at_most_once_in_a_period():
    recent = RecentRequests()
    for number, now_s in enumerate((1.0, 1.005, 1.009, 1.011)):
        recent.attempt(exchange(number), SENDING, fleet(2), now_s=now_s)
    shown = [len(recent.record(f"request-{number}").attempts[0].targets) for number in range(4)]
    assert shown == [2, 0, 0, 2]


@interpreted
def test_of_a_large_fleet_the_chosen_and_some_others_are_shown():
    recent = RecentRequests()
    recent.attempt(exchange(0), SENDING, fleet(100), now_s=1.0)
    (attempt,) = recent.record("request-0").attempts
    assert attempt.targets[0].name == "engine-1"
    assert (len({row.name for row in attempt.targets}), attempt.more_targets) == (32, 68)


@interpreted
def test_an_id_that_a_client_uses_again_names_the_newest_request():
    recent = RecentRequests()
    recent.attempt(exchange(0, arrived_s=1.0), SENDING, fleet(2), now_s=1.5)
    recent.end(exchange(0, arrived_s=1.0), 200, "", now_s=2.0)
    recent.attempt(exchange(0, arrived_s=3.0), SENDING, fleet(2), now_s=3.25)
    record = recent.record("request-0")
    assert (record.status, [attempt.after_s for attempt in record.attempts]) == (None, [0.25])


def test_a_name_of_a_model_that_is_no_unicode_text_is_written():
    # Python's `json` reads a lone surrogate, so engines do.
    recent, asked = RecentRequests(), exchange(1)
    asked.job = Job(10, model="\ud800tiny")
    recent.end(asked, 200, "", 1.0)
    record = recent.record("request-1")
    assert record.model == "?tiny"
    assert b"?tiny" in write_request_record(record)
