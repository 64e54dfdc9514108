"""Streams of Anthropic's and OpenAI's clients go on at another real engine when theirs is killed.

What a client's own parser makes of the stream is compared with an answer that nothing has disturbed.
"""

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from typing import Any

import anthropic
import openai
import pytest

from tests.vllm.conftest import request
from tests.vllm.official_clients import ASKED

TOKENS = 400
# Events of each stream before an engine is killed.
BEGUN = 6


@pytest.fixture(scope="module")
def agents(start_agents: Any) -> Any:
    environment = {"OMP_NUM_THREADS": "1", "VLLM_ENABLE_RESPONSES_API_STORE": "1"}
    return start_agents(2, "--max-num-seqs=8", env=environment)


class Seen:
    """What a client has got of one stream."""

    def __init__(self) -> None:
        self.events: list[Any] = []
        self.answer: Any = None
        self.header: str | None = None
        self.request_id = ""


async def follow_message(url: str, seen: Seen, **fields: Any) -> None:
    made = {"model": "tiny", "messages": ASKED, "max_tokens": TOKENS, "extra_body": {"temperature": 0}} | fields
    client = anthropic.AsyncAnthropic(base_url=url, api_key="any", max_retries=0, timeout=600)
    async with client, client.messages.stream(**made) as stream:
        seen.header = stream.response.headers.get("x-moeserving-continuation")
        seen.request_id = stream.response.headers.get("x-request-id", "")
        async for event in stream:
            seen.events.append(event)
        seen.answer = await stream.get_final_message()


async def follow_response(url: str, seen: Seen, **fields: Any) -> None:
    made = {"model": "tiny", "input": "hello", "max_output_tokens": TOKENS, "temperature": 0} | fields
    client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=600)
    async with client, client.responses.stream(**made) as stream:
        seen.header = stream._response.headers.get("x-moeserving-continuation")
        seen.request_id = stream._response.headers.get("x-request-id", "")
        async for event in stream:
            seen.events.append(event)
        seen.answer = await stream.get_final_response()


STREAMS: dict[str, tuple[Callable[..., Awaitable[None]], dict[str, Any]]] = {
    "seeded response": (follow_response, {"temperature": 1, "extra_body": {"seed": 5, "ignore_eos": True}}),
    "message": (follow_message, {}),
    "response": (follow_response, {"extra_body": {"ignore_eos": True}}),
}


async def follow(url: str, name: str, seen: Seen) -> Seen:
    run, fields = STREAMS[name]
    await run(url, seen, **fields)
    return seen


def without_draws(answer: Any) -> Any:
    """An answer without ids and times, and without what an engine has cached of its prompt."""
    row = answer.model_dump(mode="json", warnings=False)
    for part in (row, *row.get("content", ()), *row.get("output", ())):
        for name in ("id", "call_id", "created_at"):
            part.pop(name, None)
    for usage in (row["usage"], row["usage"].get("input_tokens_details") or {}):
        for name in ("cached_tokens", "cached_tokens_per_turn"):
            usage.pop(name, None)
    return row


def is_one_stream(name: str, seen: Seen) -> bool:
    """Whether the numbers and ids of the events are those of one stream."""
    if name.startswith("message"):
        return [event.type for event in seen.events].count("message_stop") == 1
    numbers = [event.sequence_number for event in seen.events]
    items = {event.item.id for event in seen.events if event.type == "response.output_item.added"}
    named = {event.item_id for event in seen.events if hasattr(event, "item_id")}
    ended = {item.id for item in seen.answer.output}
    created = next(event.response.id for event in seen.events if event.type == "response.created")
    return numbers == list(range(len(numbers))) and items == named == ended and created == seen.answer.id


async def test_a_killed_engine_breaks_no_stream_of_the_official_clients(agents, start_gateway):
    gateway = start_gateway(agents, sections={"continuation": {}, "dispatch": {"policy": "roundRobin"}})
    gateway.wait_for("two engines", lambda state: sum(row["accepting"] for row in state["engines"]) == 2)
    wanted = {name: await follow(agents[1].url, name, Seen()) for name in STREAMS}
    names = [name for name in STREAMS for _ in range(2)]
    streams = [Seen() for _ in names]
    tasks = []
    # One after the other, so that each engine has one stream of each kind.
    for name, seen in zip(names, streams, strict=True):
        tasks.append(asyncio.create_task(follow(gateway.url, name, seen)))
        while len(seen.events) < BEGUN and not tasks[-1].done():
            await asyncio.sleep(0.002)
    victim = await asyncio.to_thread(agents[0].state)
    os.kill(victim["engine"]["pid"], signal.SIGKILL)
    failures = [
        failure
        for failure in await asyncio.gather(*tasks, return_exceptions=True)
        if isinstance(failure, BaseException)
    ]
    assert {seen.header for seen in streams} == {"replay"}
    different = [
        name
        for name, seen in zip(names, streams, strict=True)
        if seen.answer is None
        or without_draws(seen.answer) != without_draws(wanted[name].answer)
        or not is_one_stream(name, seen)
    ]
    # Sums of a step differ in their last bits with the size of its batch.
    assert len(different) <= 1, (different, failures)
    ways = [(await asyncio.to_thread(gateway.attempts, seen.request_id))[1:] for seen in streams]
    moved = {name for name, way in zip(names, ways, strict=True) if way and way[0]["continued"] == "replay"}
    assert "response" in moved
    # The response is kept where it ended, under the id that its client has.
    for name, seen in zip(names, streams, strict=True):
        if name == "response" and seen.answer is not None:
            status, kept = await asyncio.to_thread(request, "GET", f"{gateway.url}/v1/responses/{seen.answer.id}")
            assert (status, kept["output"][0]["content"][0]["text"]) == (200, seen.answer.output_text)
    restarts = victim["engine"]["restarts"] + 1
    await asyncio.to_thread(agents[0].wait_for, "restarted", lambda state: state["engine"]["restarts"] == restarts, 60)
    await asyncio.to_thread(agents[0].wait_ready)
