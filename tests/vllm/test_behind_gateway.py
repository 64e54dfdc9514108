"""Two real engines behind the real gateway: one is killed amid the traffic, and nothing that had not begun is lost."""

import asyncio
import json
import os
import signal
from dataclasses import dataclass
from typing import Any

import aiohttp
import pytest

REQUESTS = 50


@dataclass(slots=True)
class Outcome:
    status: int = 0
    begun: bool = False
    whole: bool = False


@pytest.fixture(scope="module")
def agents(start_agents: Any) -> Any:
    return start_agents(2, "--max-num-seqs=4")


async def stream(session: aiohttp.ClientSession, index: int, outcomes: dict[int, Outcome]) -> None:
    """One streamed completion: whether it began, and whether it came to its end."""
    outcome = outcomes[index] = Outcome()
    body = {
        "model": "tiny",
        "prompt": [index + 10, *range(100, 160)],
        "max_tokens": 40,
        "ignore_eos": True,
        "stream": True,
    }
    try:
        async with session.post("/v1/completions", json=body) as answer:
            outcome.status = answer.status
            async for line in answer.content:
                if line.startswith(b"data: {") and b'"choices"' in line:
                    outcome.begun = True
                outcome.whole |= line.startswith(b"data: [DONE]")
    except aiohttp.ClientError:
        return


async def test_a_killed_engine_loses_no_request_that_had_not_begun(agents, start_gateway):
    gateway = start_gateway(agents)
    gateway.wait_for("two engines", lambda state: sum(row["accepting"] for row in state["engines"]) == 2)
    outcomes: dict[int, Outcome] = {}
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(gateway.url, connector=connector, timeout=timeout) as session:
        tasks = [asyncio.create_task(stream(session, index, outcomes)) for index in range(REQUESTS)]
        while sum(outcome.whole for outcome in outcomes.values()) < 6:
            await asyncio.sleep(0.01)
        busy = await asyncio.to_thread(agents[0].state)
        assert busy["ranks"][0]["running"] > 0
        assert busy["ranks"][0]["waiting"] > 0
        os.kill(busy["engine"]["pid"], signal.SIGKILL)
        await asyncio.gather(*tasks)
    lost = [index for index, outcome in outcomes.items() if not outcome.whole]
    assert not [index for index in lost if not outcomes[index].begun]
    assert len(lost) <= 4, "no more than had a seat"
    assert sum(outcome.whole for outcome in outcomes.values()) >= REQUESTS - 4

    await asyncio.to_thread(agents[0].wait_for, "restarted", lambda state: state["engine"]["restarts"] == 1, 60)
    await asyncio.to_thread(agents[0].wait_ready)
    gateway.wait_for("both engines again", lambda state: sum(row["accepting"] for row in state["engines"]) == 2)
    assert gateway.state()["totals"]["requests"] >= REQUESTS


# Streams that go on at another engine.

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
STREAMS = {
    "completion": (COMPLETION, {"prompt": [7, *range(100, 130)], "temperature": 0, "stop": ["no such text", "nor"]}),
    "chat": (CHAT, {"messages": [{"role": "user", "content": "why"}], "temperature": 0}),
    "seed": (COMPLETION, {"prompt": "what", "temperature": 1, "seed": 11}),
    "penalty": (CHAT, {"messages": [{"role": "user", "content": "how"}], "temperature": 0, "frequency_penalty": 0.1}),
}
TOKENS = 600


@dataclass(slots=True)
class Stream:
    """One stream as its client sees it."""

    text: str = ""
    events: int = 0
    comments: int = 0
    usage: Any = None
    finish: str | None = None
    done: bool = False
    error: Any = None
    ids: frozenset[str] = frozenset()


async def follow(url: str, name: str, into: Stream, request_id: str = "") -> Stream:
    path, fields = STREAMS[name]
    more = {"stream": True, "max_tokens": TOKENS, "ignore_eos": True, "stream_options": {"include_usage": True}}
    headers = {"x-request-id": request_id} if request_id else {}
    async with (
        aiohttp.ClientSession(url, timeout=aiohttp.ClientTimeout(total=600)) as session,
        session.post(path, json={"model": "tiny", **fields, **more}, headers=headers) as answer,
    ):
        assert answer.status == 200, await answer.text()
        async for line in answer.content:
            _take(line, into)
    return into


def _take(line: bytes, into: Stream) -> None:
    into.comments += line.startswith(b": continued")
    into.done |= line.startswith(b"data: [DONE]")
    if not line.startswith(b"data: {"):
        return
    document = json.loads(line[6:])
    into.error = into.error or document.get("error")
    into.usage = document.get("usage") or into.usage
    into.ids |= {document.get("id", "")}
    for choice in document.get("choices", ()):
        assert not choice.get("token_ids")
        into.text += choice.get("text") or choice.get("delta", {}).get("content") or ""
        into.events += 1
        into.finish = choice["finish_reason"] or into.finish


def goes_on(agents: list[Any], start_gateway: Any) -> Any:
    sections = {"continuation": {"chats_by_prefix": True}, "dispatch": {"policy": "roundRobin"}}
    gateway = start_gateway(agents, sections=sections)
    gateway.wait_for("two engines", lambda state: sum(row["accepting"] for row in state["engines"]) == 2)
    return gateway


async def test_a_killed_engine_breaks_no_stream_that_is_not_random(agents, start_gateway):
    """The text, the usage and the end are those of a stream that nothing has interrupted."""
    gateway = goes_on(agents, start_gateway)
    wanted = {name: await follow(agents[1].url, name, Stream()) for name in STREAMS}
    assert all(stream.done and stream.finish for stream in wanted.values())
    # One after the other, so that each engine has one stream of each kind.
    names = [name for name in STREAMS for _ in range(2)]
    streams = [Stream() for _ in names]
    tasks = []
    for number, (name, stream) in enumerate(zip(names, streams, strict=True)):
        tasks.append(asyncio.create_task(follow(gateway.url, name, stream, f"stream-{number}")))
        while stream.events < 2:
            await asyncio.sleep(0.002)
    victim = await asyncio.to_thread(agents[0].state)
    os.kill(victim["engine"]["pid"], signal.SIGKILL)
    await asyncio.gather(*tasks)
    assert [stream.error for stream in streams] == [None] * len(names)
    for name, stream in zip(names, streams, strict=True):
        want = wanted[name]
        assert (stream.text, stream.finish, stream.usage) == (want.text, want.finish, want.usage), name
        assert (stream.done, len(stream.ids)) == (True, 1)
    ways = [gateway.attempts(f"stream-{number}")[1:] for number in range(len(names))]
    moved = {name: row[0]["continued"] for name, row in zip(names, ways, strict=True) if row}
    assert sum(stream.comments for stream in streams) == len(moved)
    assert (
        moved.items()
        <= {
            "completion": "prefix",
            "stop": "prefix",
            "chat": "prefix",
            "seed": "replay",
            "penalty": "replay",
        }.items()
    )
    assert len(moved) >= 3, moved
    restarts = victim["engine"]["restarts"] + 1
    await asyncio.to_thread(agents[0].wait_for, "restarted", lambda state: state["engine"]["restarts"] == restarts, 60)
    await asyncio.to_thread(agents[0].wait_ready)
