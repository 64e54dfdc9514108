"""A real expert group behind the real gateway, under load: one of its engines is killed while experts move.

Nothing that had not begun to stream is lost, what had begun ends with an error that its client sees, and the group that
starts anew answers as before.
"""

import asyncio
import json
import os
import random
import signal
import time
from collections.abc import Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import psutil
import pytest
from moe_tools.tiny import TinySettings, ensure_tiny_model

LAYERS, EXPERTS, REDUNDANT = 4, 16, 2
CLIENTS = 8
PROMPTS = 16
OUTPUT_TOKENS = 32
CALM_ANSWERS = 40
WAIT_S = 120.0


@dataclass(slots=True)
class Outcome:
    """What a client saw of one request.

    Attributes:
        prompt: number of its prompt.
        streams: whether it asked for a stream.
        status: of the answer; 0 without one.
        ids: tokens that came.
        error: what the answer said instead of going on; empty when it was whole.
    """

    prompt: int
    streams: bool
    status: int = 0
    ids: list[int] = field(default_factory=list)
    error: str = ""
    whole: bool = False


@pytest.fixture(scope="module")
def trained_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "model"
    return ensure_tiny_model(folder, settings=TinySettings(steps=60), show_progress=False)


@pytest.fixture(scope="module")
def prompts():
    dice = random.Random(17)
    return [[dice.randrange(300, 4000) for _ in range(dice.randrange(20, 80))] for _ in range(PROMPTS)]


@pytest.fixture(scope="module")
def expected(trained_model, prompts):
    """The greedy answers by another implementation of the model, which has all experts in one place."""
    import torch
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(trained_model, dtype=torch.float32)
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        for _ in range(OUTPUT_TOKENS):
            with torch.no_grad():
                ids = torch.cat([ids, plain(ids).logits[:, -1:].argmax(-1)], dim=1)
        answers.append(ids[0, len(prompt) :].tolist())
    return answers


@pytest.fixture(scope="module")
def group(trained_model, start_agent):
    return start_agent("group", trained_model, data_parallel=2, expert_parallel=True, redundant_experts=REDUNDANT)


async def ask(session: aiohttp.ClientSession, prompt: Sequence[int], outcome: Outcome) -> None:
    body = {
        "model": "tiny",
        "prompt": prompt,
        "max_tokens": OUTPUT_TOKENS,
        "ignore_eos": True,
        "temperature": 0,
        "return_token_ids": True,
        "stream": outcome.streams,
    }
    try:
        async with session.post("/v1/completions", json=body) as answer:
            outcome.status = answer.status
            if outcome.streams and answer.status == 200:
                await read_stream(answer, outcome)
            else:
                take_document(await answer.json(), outcome)
                outcome.whole = not outcome.error
    except aiohttp.ClientError as error:
        outcome.error = repr(error)


async def read_stream(answer: aiohttp.ClientResponse, outcome: Outcome) -> None:
    async for line in answer.content:
        if line.startswith(b"data: {"):
            take_document(json.loads(line[6:]), outcome)
        outcome.whole |= line.startswith(b"data: [DONE]") and not outcome.error


def take_document(document: Any, outcome: Outcome) -> None:
    if "error" in document:
        outcome.error = document["error"]["message"]
    else:
        outcome.ids += [token for choice in document["choices"] for token in choice["token_ids"] or ()]


class Load:
    """Clients that ask one thing after the other, every other one for a stream, until they are stopped."""

    def __init__(self, session: aiohttp.ClientSession, prompts: Sequence[Sequence[int]]) -> None:
        self.outcomes: list[Outcome] = []
        self.stopped = False
        self._session, self._prompts = session, prompts

    async def run(self) -> None:
        await asyncio.gather(*(self._run_client(number) for number in range(CLIENTS)))

    async def _run_client(self, number: int) -> None:
        turn = number
        while not self.stopped:
            outcome = Outcome(prompt=turn % len(self._prompts), streams=number % 2 == 0)
            self.outcomes.append(outcome)
            await ask(self._session, self._prompts[outcome.prompt], outcome)
            turn += CLIENTS + 1

    async def wait_for_answers(self, count: int) -> None:
        """Returns when `count` further requests have ended well."""
        wanted = self.answered + count
        async with asyncio.timeout(WAIT_S * 3):
            while self.answered < wanted:
                await asyncio.sleep(0.02)

    @property
    def answered(self) -> int:
        return sum(outcome.whole for outcome in self.outcomes)


@asynccontextmanager
async def loaded(gateway, prompts):
    timeout = aiohttp.ClientTimeout(total=900)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(gateway.url, connector=connector, timeout=timeout) as session:
        load = Load(session, prompts)
        running = asyncio.create_task(load.run())
        try:
            yield load
        finally:
            load.stopped = True
            await running


def experts(agent: Any) -> Any:
    status, document = agent.control("GET", "/v1/experts")
    assert status == 200, document
    return document


def random_placement(dice: random.Random) -> list[list[int]]:
    rows = [[*range(EXPERTS), *(dice.randrange(EXPERTS) for _ in range(REDUNDANT))] for _ in range(LAYERS)]
    for row in rows:
        dice.shuffle(row)
    return rows


def kill_amid_a_move(agent: Any) -> list[psutil.Process]:
    """Kills the engine of the second rank while the first one waits for it in the midst of a move; answers both.

    A look at the group takes longer than one of its steps, so the engine is stopped first; where the move had ended by
    then, it goes on, and the next move is tried.
    """
    dice = random.Random(5)
    engines = engines_of(agent)
    victim = engines[1]
    end_s = time.monotonic() + WAIT_S
    while time.monotonic() < end_s:
        version = begin_move(agent, random_placement(dice))
        victim.suspend()
        # What was published before it stood still is there by then.
        time.sleep(0.5)
        if experts(agent)["placement"]["version"] == version:
            os.kill(victim.pid, signal.SIGKILL)
            return engines
        victim.resume()
    raise AssertionError("no move was met")


def begin_move(agent: Any, placement: list[list[int]]) -> int:
    """Has experts moved; the version of the placement, once the move has begun."""
    before = experts(agent)
    status, found = agent.control("POST", "/v1/experts", {"action": "apply", "physical_to_logical": placement})
    assert status == 202, found
    end_s = time.monotonic() + WAIT_S
    while experts(agent)["totals"]["decisions"] == before["totals"]["decisions"]:
        assert time.monotonic() < end_s
    return int(before["placement"]["version"])


def engines_of(agent: Any) -> list[psutil.Process]:
    """The processes of the ranks, in their order."""
    processes = psutil.Process(agent.state()["engine"]["pid"]).children(recursive=True)
    engines = {" ".join(process.cmdline()): process for process in processes if "EngineCore" in str(process.cmdline())}
    assert len(engines) == 2, [process.cmdline() for process in processes]
    return [engines[name] for name in sorted(engines)]


async def test_an_engine_killed_amid_a_move_loses_nothing_that_had_not_begun(group, start_gateway, prompts, expected):
    settings = {"mode": "observe", "max_stall_s": 1e-6, "interval_steps": 10**6}
    assert group.control("PUT", "/v1/config", {"expert": settings})[0] == 200
    gateway = start_gateway([group], ranks=2, hold_timeout_s=600)
    gateway.wait_for("two ranks", lambda state: sum(row["accepting"] for row in state["engines"]) == 2)
    async with loaded(gateway, prompts) as load:
        await load.wait_for_answers(CALM_ANSWERS)
        killed = await asyncio.to_thread(kill_amid_a_move, group)
        await asyncio.to_thread(group.wait_for, "restarted", lambda state: state["engine"]["restarts"] == 1, WAIT_S)
        assert not [engine for engine in killed if engine.is_running() and engine.status() != psutil.STATUS_ZOMBIE]
        await asyncio.to_thread(group.wait_ready)
        await load.wait_for_answers(CALM_ANSWERS)
    failed = [outcome for outcome in load.outcomes if not outcome.whole]
    print(f"{len(load.outcomes)} requests, {len(failed)} broken off, {gateway.state()['totals']}")
    assert all(outcome.streams and outcome.ids for outcome in failed), "had begun"
    assert all(outcome.error for outcome in failed), "the client sees it"
    assert len(failed) <= CLIENTS // 2
    answered = [outcome for outcome in load.outcomes if outcome.whole]
    assert [outcome.ids for outcome in answered] == [expected[outcome.prompt] for outcome in answered]
    assert experts(group)["placement"]["version"] == 1
    assert group.state()["engine"]["restarts"] == 1
