"""Two real engines behind the real gateway: one is killed amid the traffic, and nothing that had not begun is lost."""

import asyncio
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
