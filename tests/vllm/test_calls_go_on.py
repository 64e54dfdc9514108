"""Streams with tool calls and log-probabilities go on at another real engine when theirs is killed.

They are computed anew there: what OpenAI's client has got in the end is compared with an answer that nothing has
disturbed. An engine of random weights calls a tool where the request makes it, by a grammar.
"""

import asyncio
import os
import signal
from typing import Any

import openai
import pytest

SCHEMA = {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}
TOOL = {"type": "function", "function": {"name": "write", "description": "Writes a text.", "parameters": SCHEMA}}
NAMED = {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "write"}}}
# Greedy, this model ends the named call at once, and goes on with more calls where some are required.
REQUIRED = {"tools": [TOOL], "tool_choice": "required"}
CHAT = {"messages": [{"role": "user", "content": "hello"}], "temperature": 0}
ON = {"extra_body": {"ignore_eos": True}}
TOKENS = 300
BEGUN = 4

STREAMS: dict[str, dict[str, Any]] = {
    "call": CHAT | REQUIRED,
    "seeded call": CHAT | NAMED | {"temperature": 1, "seed": 7},
    "call with log-probabilities": CHAT | REQUIRED | {"logprobs": True, "top_logprobs": 2},
    "log-probabilities": CHAT | ON | {"logprobs": True, "top_logprobs": 2},
    "completion with log-probabilities": ON | {"prompt": "hello", "temperature": 0, "logprobs": 2},
    "seeded completion with log-probabilities": ON | {"prompt": "hello", "temperature": 1, "seed": 7, "logprobs": 0},
}


@pytest.fixture(scope="module")
def agents(start_agents: Any) -> Any:
    flags = ("--enable-auto-tool-choice", "--tool-call-parser=hermes", "--max-num-seqs=16")
    return start_agents(2, *flags, env={"OMP_NUM_THREADS": "1"})


class Seen:
    """What a client has got of one stream."""

    def __init__(self) -> None:
        self.events = 0
        self.header: str | None = None
        self.ids: set[str] = set()
        self.text = ""
        self.calls: dict[int, dict[str, Any]] = {}
        self.scored: list[tuple[str, int]] = []
        self.logprobs: list[float] = []
        self.finish: list[str] = []
        self.usage: Any = None
        self.names = 0

    @property
    def answer(self) -> Any:
        """All but what is drawn at random, and the last bits of sums."""
        calls = {index: (call["name"], call["arguments"]) for index, call in self.calls.items()}
        usage = None if self.usage is None else (self.usage.prompt_tokens, self.usage.completion_tokens)
        return self.text, calls, self.scored, self.finish, usage

    def is_one_stream(self) -> bool:
        return len(self.ids) == 1 and self.names == len(self.calls) and all(call["id"] for call in self.calls.values())

    def take(self, chunk: Any) -> None:
        self.events += 1
        self.ids.add(chunk.id)
        self.usage = chunk.usage or self.usage
        for choice in chunk.choices:
            if choice.finish_reason:
                self.finish.append(choice.finish_reason)
            if hasattr(choice, "text"):
                self.text += choice.text
                self.take_lists(choice.logprobs)
                continue
            self.text += choice.delta.content or ""
            for row in choice.logprobs.content if choice.logprobs is not None and choice.logprobs.content else ():
                self.scored.append((row.token, len(row.top_logprobs)))
                self.logprobs.append(row.logprob)
            for call in choice.delta.tool_calls or ():
                known = self.calls.setdefault(call.index, {"id": "", "name": "", "arguments": ""})
                known["id"] += call.id or ""
                self.names += bool(call.id)
                known["name"] += call.function.name or ""
                known["arguments"] += call.function.arguments or ""

    def take_lists(self, logprobs: Any) -> None:
        if logprobs is not None and logprobs.tokens:
            assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs)
            self.scored += [
                (token, len(top)) for token, top in zip(logprobs.tokens, logprobs.top_logprobs, strict=True)
            ]
            self.logprobs += logprobs.token_logprobs


async def follow(url: str, name: str, seen: Seen, request_id: str = "") -> Seen:
    fields = {"model": "tiny", "max_tokens": TOKENS, "stream": True, "stream_options": {"include_usage": True}}
    fields |= STREAMS[name] | {"extra_headers": {"x-request-id": request_id} if request_id else {}}
    client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=600)
    async with client:
        route = client.completions if "prompt" in fields else client.chat.completions
        raw = await route.with_raw_response.create(**fields)
        seen.header = raw.headers.get("x-moeserving-continuation")
        async for chunk in raw.parse():
            seen.take(chunk)
    return seen


async def test_a_killed_engine_breaks_no_call_and_no_log_probabilities(agents, start_gateway):
    gateway = start_gateway(agents, sections={"continuation": {}, "dispatch": {"policy": "roundRobin"}})
    gateway.wait_for("two engines", lambda state: sum(row["accepting"] for row in state["engines"]) == 2)
    wanted = {name: await follow(agents[1].url, name, Seen()) for name in STREAMS}
    assert all(len(seen.finish) == 1 for seen in wanted.values())
    assert all(wanted[name].calls and wanted[name].events > 10 * BEGUN for name in STREAMS if "call" in name)
    assert all(len(wanted[name].scored) > BEGUN for name in STREAMS if "log-prob" in name)
    # At once, so that none has ended when the last one has begun; engines get them by turns.
    names = [name for name in STREAMS for _ in range(2)]
    streams = [Seen() for _ in names]
    tasks = [
        asyncio.create_task(follow(gateway.url, name, seen, f"call-{number}"))
        for number, (name, seen) in enumerate(zip(names, streams, strict=True))
    ]
    while any(seen.events < BEGUN and not task.done() for seen, task in zip(streams, tasks, strict=True)):
        await asyncio.sleep(0.002)
    victim = await asyncio.to_thread(agents[0].state)
    os.kill(victim["engine"]["pid"], signal.SIGKILL)
    ends = await asyncio.gather(*tasks, return_exceptions=True)
    failures = [end for end in ends if isinstance(end, BaseException)]
    assert {seen.header for seen in streams} == {"replay"}
    different = [
        name
        for name, seen in zip(names, streams, strict=True)
        if seen.answer != wanted[name].answer or not seen.is_one_stream()
    ]
    # Sums of a step differ in their last bits with the size of its batch.
    assert len(different) <= 1, (different, failures)
    for name, seen in zip(names, streams, strict=True):
        if name not in different:
            assert seen.logprobs == pytest.approx(wanted[name].logprobs, abs=1e-3)
    ways = [(await asyncio.to_thread(gateway.attempts, f"call-{number}"))[1:] for number in range(len(names))]
    moved = {name for name, way in zip(names, ways, strict=True) if way and way[0]["continued"] == "replay"}
    assert any("call" in name for name in moved), moved
    assert any("log-prob" in name for name in moved), moved
    restarts = victim["engine"]["restarts"] + 1
    await asyncio.to_thread(agents[0].wait_for, "restarted", lambda state: state["engine"]["restarts"] == restarts, 60)
    await asyncio.to_thread(agents[0].wait_ready)
