"""The signals of an engine: one watcher task for each, which reports to the dispatcher alone.

Of an engine with an agent the stream of snapshots is read. A plain vLLM server is asked for its metrics and its health
several times a second. A watcher never ends by itself.

A lost source of signals is not a lost engine: it keeps its work, judged by the requests that this gateway has in flight
there and by how they end.
"""

import asyncio
import contextlib
import itertools
import logging
import math
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from typing import Any

import aiohttp
from moe_contract.agent_state import EngineState, read_engine_state
from moe_contract.routes import STATE
from moe_scheduling.signals import EngineSignal, Target
from prometheus_client.parser import text_string_to_metric_families

from moe_gateway.engines.dispatcher import Dispatcher
from moe_gateway.engines.fleet import Engine
from moe_gateway.engines.served_models import model_row

SCRAPE_PERIOD_S = 0.25
# One scrape in this many asks for the names of the models, which change when adapters are loaded.
SCRAPES_FOR_MODELS = 20
# Seconds between two of these questions to an engine with an agent.
MODELS_PERIOD_S = SCRAPE_PERIOD_S * SCRAPES_FOR_MODELS
# A state waits for the first list of names no longer than this.
FIRST_LIST_TIMEOUT_S = 0.5
FIRST_RETRY_S = 0.05
LONGEST_RETRY_S = 1.0
# An agent sends a snapshot at least once a second.
SILENCE_S = 5.0
LONGEST_LINE_BYTES = 4 * 1024 * 1024

RUNNING = "vllm:num_requests_running"
WAITING = "vllm:num_requests_waiting"
KV_USAGE = ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc")
# The count of a histogram that has one value for each step.
STEPS = "vllm:iteration_tokens_total_count"
PREEMPTIONS = "vllm:num_preemptions_total"

log = logging.getLogger("moeserving.gateway")


async def watch_engine(engine: Engine, dispatcher: Dispatcher, session: aiohttp.ClientSession) -> None:
    """Follows one engine until cancelled."""
    if engine.address.agent_url is None:
        await _follow(_scrape, engine, dispatcher, session)
    else:
        await asyncio.gather(
            _follow(_watch_agent, engine, dispatcher, session), _watch_models(engine, dispatcher, session)
        )


Watch = Callable[[Engine, Dispatcher, aiohttp.ClientSession], Awaitable[None]]


async def _follow(follow: Watch, engine: Engine, dispatcher: Dispatcher, session: aiohttp.ClientSession) -> None:
    wait_s = FIRST_RETRY_S
    while True:
        started_s = time.monotonic()
        try:
            await follow(engine, dispatcher, session)
        except Exception as error:
            # Whatever an engine says or fails to say, its watcher goes on.
            if dispatcher.set_reachable(engine.address.name, False):
                extra = {"engine": engine.address.name, "reason": repr(error)}
                log.warning("lost the signals of an engine", extra=extra)
        else:
            dispatcher.set_reachable(engine.address.name, False)
        wait_s = FIRST_RETRY_S if time.monotonic() - started_s > LONGEST_RETRY_S else min(LONGEST_RETRY_S, 2 * wait_s)
        await asyncio.sleep(wait_s)


# An engine with an agent.


async def _watch_agent(engine: Engine, dispatcher: Dispatcher, session: aiohttp.ClientSession) -> None:
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=2.0, sock_read=SILENCE_S)
    url = f"{engine.address.agent_url}{STATE}"
    async with session.get(url, params={"watch": "1"}, timeout=timeout) as answer:
        answer.raise_for_status()
        rest, has_asked = b"", False
        async for piece in answer.content.iter_any():
            *lines, rest = (rest + piece).split(b"\n")
            if len(rest) > LONGEST_LINE_BYTES:
                raise ValueError("a line of the agent's state has no end")
            if lines := [line for line in lines if line]:
                # Of states that came together only the newest matters.
                state, came_s = read_engine_state(lines[-1]), time.monotonic()
                if state.ready and not (engine.has_listed or has_asked):
                    # Before its first request, so that no name which it serves is refused.
                    has_asked = True
                    await _list_models(engine, dispatcher, session, FIRST_LIST_TIMEOUT_S)
                take_state(engine, state, dispatcher, came_s)


def take_state(engine: Engine, state: EngineState, dispatcher: Dispatcher, now_s: float) -> None:
    """Reports an agent's state to the dispatcher."""
    name = engine.address.name
    dispatcher.set_reachable(name, True, state)
    if state.engine.model is not None and state.engine.model not in engine.models:
        # What else it serves is asked of the engine itself.
        dispatcher.set_models(name, {state.engine.model: model_row(state.engine.model)}, listed=False)
    exchanges_blocks = state.kv_transfer is not None
    dispatcher.set_process(name, state.engine.pid, state.engine.identity, exchanges_blocks=exchanges_blocks)
    if dispatcher.placements is not None:
        dispatcher.placements.set_transfer(name, state.kv_transfer)
    stuck = bool(state.troubled_ranks)
    if stuck and not engine.is_stuck:
        for rank in state.troubled_ranks:
            extra = {"engine": name, "rank": rank.rank, "reason": rank.trouble_words}
            log.warning("a rank of an engine is stuck", extra=extra)
    accepting = state.accepting and state.ready
    dispatcher.set_ready(name, accepting, now_s, draining=state.phase == "draining", stuck=stuck)
    for rank in state.ranks:
        dispatcher.observe(Target(name, rank.rank), rank, now_s - max(0.0, rank.age_s), now_s)


async def _watch_models(engine: Engine, dispatcher: Dispatcher, session: aiohttp.ClientSession) -> None:
    """Asks an engine with an agent, while it is ready, for all names that it serves: aliases and LoRA adapters too."""
    wait_s = FIRST_RETRY_S
    while True:
        await asyncio.sleep(wait_s)
        wait_s = FIRST_RETRY_S
        if engine.is_ready and await _list_models(engine, dispatcher, session):
            wait_s = MODELS_PERIOD_S


async def list_all_models(dispatcher: Dispatcher, session: aiohttp.ClientSession) -> None:
    """Asks all engines that are ready for their names at once, for `FIRST_LIST_TIMEOUT_S`."""
    ready = [engine for engine in dispatcher.engines.values() if engine.is_ready]
    await asyncio.gather(*(_list_models(engine, dispatcher, session, FIRST_LIST_TIMEOUT_S) for engine in ready))


async def _list_models(
    engine: Engine, dispatcher: Dispatcher, session: aiohttp.ClientSession, timeout_s: float = SILENCE_S
) -> bool:
    """Asks an engine for its names and reports them; returns whether it answered."""
    with contextlib.suppress(aiohttp.ClientError, OSError, ValueError, KeyError, TypeError):
        async with asyncio.timeout(timeout_s):
            if rows := await _fetch_models(engine.address.url, session):
                dispatcher.set_models(engine.address.name, rows)
            return True
    return False


# A plain vLLM server.

_SCRAPE_TIMEOUT = aiohttp.ClientTimeout(total=5.0)


async def _scrape(engine: Engine, dispatcher: Dispatcher, session: aiohttp.ClientSession) -> None:
    name, url = engine.address.name, engine.address.url
    for turn in itertools.count():
        started_s = time.monotonic()
        # vLLM's metrics have no prefill work: that of the requests which this gateway sent stands in.
        prefill_tokens = dispatcher.unanswered_prefill_tokens(name)
        try:
            async with session.get(f"{url}/health", timeout=_SCRAPE_TIMEOUT) as answer:
                healthy = answer.status == 200
        except aiohttp.ClientConnectorError:
            # The port is the engine's own: a server that does not listen there takes no request either.
            dispatcher.set_ready(name, False, time.monotonic())
            raise
        if turn % SCRAPES_FOR_MODELS == 0:
            dispatcher.set_models(name, await _fetch_models(url, session))
        # Its health alone decides; its signals only help.
        dispatcher.set_ready(name, healthy, time.monotonic())
        async with session.get(f"{url}/metrics", timeout=_SCRAPE_TIMEOUT) as answer:
            answer.raise_for_status()
            text = await answer.text()
        dispatcher.set_reachable(name, True)
        now_s = time.monotonic()
        for rank, counted in read_metrics(text):
            signal = replace(counted, waiting_prefill_tokens=prefill_tokens.get(rank, 0))
            dispatcher.observe(Target(name, rank), signal, started_s, now_s)
        await asyncio.sleep(SCRAPE_PERIOD_S)


async def _fetch_models(url: str, session: aiohttp.ClientSession) -> dict[str, Any]:
    """What a server lists by name: its model under one or several names, and its LoRA adapters."""
    async with session.get(f"{url}/v1/models", timeout=_SCRAPE_TIMEOUT) as answer:
        if answer.status != 200:
            return {}
        return {str(row["id"]): row for row in (await answer.json())["data"]}


def read_metrics(text: str) -> Iterator[tuple[int, EngineSignal]]:
    """The signals by rank in vLLM's Prometheus metrics, with old and new names of the KV use."""
    ranks: dict[int, dict[str, float]] = {}
    # A server's page has hundreds of series; the parser sees the few lines that count.
    wanted = "\n".join(line for line in text.splitlines() if line.startswith(tuple(_METRICS)))
    for family in text_string_to_metric_families(wanted):
        for sample in family.samples:
            if sample.name in _METRICS and -math.inf < sample.value < math.inf:
                rank = sample.labels.get("engine", "0")
                if rank.isdecimal():
                    ranks.setdefault(int(rank), {})[_METRICS[sample.name]] = sample.value
    for number, values in sorted(ranks.items()):
        yield (
            number,
            EngineSignal(
                step=int(values.get("step", 0)),
                running=int(values.get("running", 0)),
                waiting=int(values.get("waiting", 0)),
                decode_tokens=int(values.get("running", 0)),
                kv_usage=values.get("kv_usage", 0.0),
                preemptions=int(values.get("preemptions", 0)),
            ),
        )


_METRICS = {
    RUNNING: "running",
    WAITING: "waiting",
    PREEMPTIONS: "preemptions",
    STEPS: "step",
    **dict.fromkeys(KV_USAGE, "kv_usage"),
}
