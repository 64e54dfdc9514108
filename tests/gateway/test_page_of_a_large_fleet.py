"""The page with 64 engines and 58 layers of 256 experts, once a second renewed; it prints the time of its frames."""

import asyncio
import itertools
import time
from collections.abc import AsyncGenerator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from moe_contract.live_page import History, TimePoint, write_event
from moe_contract.page_keys import PageKeys, derive_page_key
from moe_gateway.live_page.routes import ASSETS, LivePage
from moe_gateway.request.recent_requests import RecentRequests

from tests.gateway.browser import DRIVER, browser, text_of, wait_for
from tests.gateway.large_fleet import EXPERTS, LAYERS, make_experts, make_fleet, snapshot_of
from tests.gateway.waiting import free_port

pytestmark = [
    pytest.mark.browser,
    pytest.mark.long,
    pytest.mark.skipif(DRIVER is None, reason="needs chromium-driver: `make test-ui` installs it"),
    pytest.mark.skipif(not ASSETS.is_dir(), reason="the page is not built: `make ui`"),
]
WATCHED_S = 12.0
FRAMES = """
const done = arguments[1], gaps = [], tasks = [];
const noted = list => list.getEntries().forEach(entry => tasks.push(entry.duration));
new PerformanceObserver(noted).observe({entryTypes: ["longtask"]});
let last = performance.now(), end = last + 1e3 * arguments[0];
const frame = now => {
  gaps.push(now - last);
  last = now;
  now < end ? requestAnimationFrame(frame) : done([gaps, tasks]);
};
requestAnimationFrame(frame);
"""


class Large:
    """Gives each second another snapshot, and each three seconds other experts."""

    async def watch(self, _engine: str = "") -> AsyncGenerator[bytes]:
        """As `LivePublisher` does."""
        fleet, began_s = make_fleet(64), time.time()
        yield write_event(History(points=tuple(TimePoint(at_s=began_s - 600 + i, ttft_s=0.1) for i in range(600))))
        snapshot = snapshot_of(fleet)
        for turn in itertools.count():
            point = TimePoint(at_s=time.time(), ttft_s=0.1 + turn % 5 / 50, step_s=0.02, in_flight=turn % 7)
            rows = tuple(
                replace(row, running=(turn + number) % 60, signal_source="agent")
                for number, row in enumerate(snapshot.engines)
            )
            yield write_event(replace(snapshot, at_s=point.at_s, point=point, engines=rows))
            if turn % 3 == 0:
                yield write_event(make_experts(turn))
            await asyncio.sleep(1.0)

    def end(self) -> None:
        """Nothing to end."""

    async def close(self) -> None:
        """Nothing to close."""


async def test_a_large_fleet_is_drawn_in_few_elements(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "token").write_text("t")
    application, port = web.Application(), free_port()
    publisher: Any = Large()
    LivePage(publisher, RecentRequests(), PageKeys(tmp_path / "token")).add_to(application)
    runner = web.AppRunner(application, shutdown_timeout=1.0)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    try:
        url = f"http://127.0.0.1:{port}/ui/#key={derive_page_key(b't')}"
        gaps, tasks, elements, states = await asyncio.to_thread(measure, url)
    finally:
        await runner.cleanup()
    gaps.sort()
    p50, p99 = gaps[len(gaps) // 2], gaps[len(gaps) * 99 // 100]
    with capsys.disabled():
        print(
            f"\n{len(gaps)} frames in {WATCHED_S:g} s: p50 {p50:.1f} ms, p99 {p99:.1f} ms, longest {gaps[-1]:.1f} ms;"
        )
        print(f"{len(tasks)} tasks above 50 ms, the longest {max(tasks, default=0):.0f} ms")
    # A page that stutters renders 58 x 256 cells as elements.
    assert elements < LAYERS * EXPERTS / 2
    assert states[0] != states[1], "the page shows what came while it was measured"


def measure(url: str) -> tuple[list[float], list[float], int, tuple[str, str]]:
    """Gaps between frames and long tasks in ms, the elements of the page, and its state before and after."""
    with browser() as driver:
        driver.get(url)
        wait_for(lambda: "is the hottest" in text_of(driver), "the experts")
        driver.find_elements("css selector", "input[name=view]")[1].click()
        driver.set_script_timeout(120)
        before = text_of(driver, "header .state")
        gaps, tasks = driver.execute_async_script(FRAMES, WATCHED_S)
        elements = int(driver.execute_script("return document.querySelectorAll('*').length"))
        wait_for(lambda: text_of(driver, "header .state") != before, "another second")
        return list(gaps), list(tasks), elements, (before, text_of(driver, "header .state"))
