"""`python -m moe_lab.gateway.page_cost`: what open live pages cost the gateway, in requests per CPU second.

Pairs of a measurement without and with ten open pages, one directly after the other, in an order that turns, at the
same number of requests per second: a page costs CPU time by the second, not by the request. The pages show the experts
of an engine too, where it has any; mock engines have none.
"""

import asyncio
import contextlib
import math
import statistics
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import aiohttp
import typer
import uvloop
from moe_contract.control_tokens import authorization
from moe_contract.page_keys import derive_page_key
from moe_contract.routes import UI
from moe_tools.progress_printer import ProgressPrinter
from moe_tools.statistics import estimate, percentile_of

from moe_lab.gateway.load import ask_repeatedly
from moe_lab.gateway.processes import TOKEN, GatewayProcess, running_alone

WATCHERS = 10
CONNECTIONS = 32
RATE = 1000.0
GOAL = 0.98

app = typer.Typer(add_completion=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class PageCost:
    """One measurement: requests per CPU second of the gateway, and the median latency in seconds."""

    requests_per_cpu_s: float
    p50_s: float


@app.command()
def main(
    pairs: Annotated[int, typer.Option(min=2, help="Alternating pairs.")] = 12,
    seconds: Annotated[float, typer.Option(min=1.0, help="Length of one measurement.")] = 5.0,
) -> None:
    """Compare the gateway with ten open live pages with itself without any."""
    progress = ProgressPrinter()
    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    with tempfile.TemporaryDirectory(prefix="page-cost-") as folder, running_alone(Path(folder)) as (gateway, admin):
        asyncio.run(_measure(gateway, admin, 1.0, watchers=0))
        rows = []
        for number in range(pairs):
            counts = (0, WATCHERS) if number % 2 == 0 else (WATCHERS, 0)
            found = {count: asyncio.run(_measure(gateway, admin, seconds, watchers=count)) for count in counts}
            rows.append((found[0], found[WATCHERS]))
            shown = " and ".join(f"{found[count].requests_per_cpu_s:,.0f}" for count in (0, WATCHERS))
            progress(f"pair {number + 1} of {pairs}: {shown} requests per CPU second")
    progress(describe(rows))


def describe(rows: list[tuple[PageCost, PageCost]]) -> str:
    """The median ratio with its 95 % bootstrap interval, and that of the median latencies."""
    found = []
    for name in ("requests_per_cpu_s", "p50_s"):
        ratio = estimate([math.log(getattr(on, name) / getattr(off, name)) for off, on in rows], percentile_of(50))
        found.append(f"{math.exp(ratio.value):.3f} [{math.exp(ratio.low):.3f}, {math.exp(ratio.high):.3f}]")
    return (
        f"with {WATCHERS} open pages at {RATE:g} requests/s: {found[0]} times the requests per CPU second "
        f"(goal {GOAL:g}), {found[1]} times the median latency; {len(rows)} pairs"
    )


async def _measure(gateway: GatewayProcess, admin_port: int, seconds: float, *, watchers: int) -> PageCost:
    async with _watching(admin_port, watchers) as snapshots:
        before_s = gateway.cpu_s()
        answers = await ask_repeatedly(gateway.port, connections=CONNECTIONS, seconds=seconds, rate=RATE)
        load = PageCost(
            requests_per_cpu_s=answers.count / (gateway.cpu_s() - before_s), p50_s=statistics.median(answers.took_s)
        )
        if watchers and min(snapshots) < seconds / 2:
            raise RuntimeError(f"a page got {min(snapshots)} snapshots in {seconds:g} s")
    return load


@contextlib.asynccontextmanager
async def _watching(admin_port: int, watchers: int) -> AsyncIterator[list[int]]:
    """Open pages; yields the number of snapshots that each has had."""
    snapshots = [0] * watchers
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), read_bufsize=2**22) as session:
        tasks = [asyncio.ensure_future(_read(session, admin_port, snapshots, number)) for number in range(watchers)]
        # Each gets its first snapshot at once.
        await asyncio.sleep(0.5)
        try:
            yield snapshots
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def _read(session: aiohttp.ClientSession, admin_port: int, snapshots: list[int], number: int) -> None:
    url = f"http://127.0.0.1:{admin_port}{UI}/events?experts=mock-0"
    timeout = aiohttp.ClientTimeout(total=None)
    headers = authorization(derive_page_key(TOKEN.encode()))
    async with session.get(url, headers=headers, timeout=timeout) as answer:
        async for chunk in answer.content.iter_any():
            snapshots[number] += chunk.count(b"event: snapshot\n")


if __name__ == "__main__":
    app()
