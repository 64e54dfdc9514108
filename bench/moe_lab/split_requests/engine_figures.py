"""What vLLM's own metrics say of an engine: blocks in use, transfers, leases that ended."""

import asyncio
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass

import aiohttp

from moe_lab.soak.answers import MODEL
from moe_lab.split_requests.testbed import ASK_TIMEOUT, SplitEngine

USAGE = "vllm:kv_cache_usage_perc"
RUNNING, WAITING = "vllm:num_requests_running", "vllm:num_requests_waiting"
COUNTERS = (
    "vllm:nixl_xfer_time_seconds_count",
    "vllm:nixl_num_failed_transfers_total",
    "vllm:nixl_num_kv_expired_reqs_total",
    "vllm:nixl_num_notifications_after_expiry_total",
)
_POLL_S = 2.0
_SAMPLE = re.compile(r"^([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{[^}]*\})? (\S+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFigures:
    """One engine at the end, since its last start.

    Attributes:
        name: of the engine.
        kv_usage: used part of its blocks, 0 to 1.
        requests: running and waiting.
        counters: of vLLM's connector, by metric.
    """

    name: str
    kv_usage: float
    requests: float
    counters: Mapping[str, float]


def read_samples(text: str) -> dict[str, float]:
    """The sum of each metric over its labels, of a page in Prometheus's text format."""
    sums: dict[str, float] = {}
    for name, value in _SAMPLE.findall(text):
        sums[name] = sums.get(name, 0.0) + float(value)
    return sums


async def fetch_figures(session: aiohttp.ClientSession, engine: SplitEngine) -> EngineFigures:
    """The figures after one more step of the engine: an idle one does not renew them."""
    body = {"model": MODEL, "prompt": "a", "max_tokens": 1, "temperature": 0}
    async with session.post(f"{engine.url}/v1/completions", json=body, timeout=ASK_TIMEOUT) as answer:
        await answer.read()
    async with session.get(f"{engine.url}/metrics", timeout=ASK_TIMEOUT) as answer:
        samples = read_samples(await answer.text())
    return EngineFigures(
        name=engine.name,
        kv_usage=samples.get(USAGE, 1.0),
        requests=samples.get(RUNNING, 0.0) + samples.get(WAITING, 0.0),
        counters={name: samples.get(name, 0.0) for name in COUNTERS},
    )


async def wait_until_free(session: aiohttp.ClientSession, engine: SplitEngine, limit_s: float) -> EngineFigures:
    """The figures of an engine once it holds no block and has no request, at the latest after `limit_s`."""
    until_s = time.monotonic() + limit_s
    while True:
        figures = await fetch_figures(session, engine)
        if not (figures.kv_usage or figures.requests) or time.monotonic() > until_s:
            return figures
        await asyncio.sleep(_POLL_S)
