"""The live page in Chromium: events that stay out, refusals, engines that go, and a key that comes later."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from moe_contract.live_page import ExpertsSnapshot, LiveSnapshot, write_event
from moe_contract.page_keys import PageKeys, derive_page_key
from moe_gateway.live_page.publisher import TooManyWatchers
from moe_gateway.live_page.routes import ASSETS, LivePage
from moe_gateway.request.recent_requests import RecentRequests

from tests.gateway.browser import DRIVER, browser, text_of, wait_for
from tests.gateway.large_fleet import make_experts, make_fleet, snapshot_of
from tests.gateway.waiting import free_port

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(DRIVER is None, reason="needs chromium-driver: `make test-ui` installs it"),
    pytest.mark.skipif(not ASSETS.is_dir(), reason="the page is not built: `make ui`"),
]
WELL = "all engines take requests"
PERIOD_S = 0.2


class Scripted:
    """A publisher that does as `mode` says: `live`, `silent` (connections stay and nothing comes), `full` or `off`.

    Attributes:
        gone: engines that are no longer in the snapshots.
    """

    def __init__(self) -> None:
        self.mode = "live"
        self.snapshot: LiveSnapshot = replace(snapshot_of(make_fleet(2)), findings=())
        self.gone: set[str] = set()

    @property
    def names(self) -> list[str]:
        """Of the engines that are there."""
        return sorted({row.name for row in self.snapshot.engines} - self.gone)

    async def watch(self, engine: str = "") -> AsyncGenerator[bytes]:
        """As `LivePublisher` does."""
        if self.mode == "full":
            raise TooManyWatchers
        if self.mode == "off":
            raise web.HTTPNotFound
        while True:
            if self.mode != "silent":
                there = [row for row in self.snapshot.engines if row.name not in self.gone]
                rows = tuple(replace(row, signal_source="agent") for row in there)
                yield write_event(replace(self.snapshot, engines=rows))
                if engine in self.names:
                    experts: ExpertsSnapshot = make_experts(0)
                    yield write_event(replace(experts, engine=engine, problem=f"experts of {engine}"))
            else:
                yield b": silent\n\n"
            await asyncio.sleep(PERIOD_S)

    def end(self) -> None:
        """Nothing to end."""

    async def close(self) -> None:
        """Nothing to close."""


@pytest.fixture
async def scripted(tmp_path: Path) -> AsyncIterator[tuple[Any, str]]:
    """A page of a scripted publisher, and its address without the key."""
    (tmp_path / "token").write_text("t")
    application, port, publisher = web.Application(), free_port(), Scripted()
    page: Any = publisher
    LivePage(page, RecentRequests(), PageKeys(tmp_path / "token")).add_to(application)
    runner = web.AppRunner(application, shutdown_timeout=1.0)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    yield publisher, f"http://127.0.0.1:{port}/ui/"
    await runner.cleanup()


KEY = f"#key={derive_page_key(b't')}"


def shows(driver: Any, selector: str, words: str) -> Callable[[], bool]:
    return lambda: words in text_of(driver, selector)


@pytest.mark.parametrize(
    ("mode", "words"), [("silent", "nothing arrives"), ("full", "too many pages"), ("off", "switched off")]
)
async def test_a_page_without_news_says_why_and_recovers(scripted, mode, words):
    publisher, url = scripted

    def look() -> None:
        with browser() as driver:
            driver.get(url + KEY)
            wait_for(shows(driver, ".health", WELL), "the page")
            publisher.mode = "silent"
            wait_for(shows(driver, "header .state", "nothing arrives"), "the end of the live state")
            publisher.mode = mode
            wait_for(shows(driver, "header .state", words), f"the state of {mode}")
            assert WELL not in text_of(driver, ".health")
            publisher.mode = "live"
            wait_for(shows(driver, "header .state", "live"), "the live state")
            wait_for(shows(driver, ".health", WELL), "the page again")

    await asyncio.to_thread(look)


async def test_experts_of_an_engine_that_has_gone_are_not_shown(scripted):
    publisher, url = scripted
    first, second = publisher.names

    def look() -> None:
        with browser() as driver:
            driver.get(url + KEY)
            wait_for(lambda: "experts of" in text_of(driver), "the experts of one engine")
            gone, stays = (first, second) if f"experts of {first}" in text_of(driver) else (second, first)
            publisher.gone = {gone}
            wait_for(lambda: f"experts of {stays}" in text_of(driver), "the experts of the other engine")
            assert f"experts of {gone}" not in text_of(driver)

    await asyncio.to_thread(look)


async def test_a_key_that_comes_into_an_open_tab_opens_it(scripted):
    _, url = scripted

    def look() -> None:
        with browser() as driver:
            driver.get(url)
            wait_for(lambda: "The page key is needed" in text_of(driver), "the question for the key")
            driver.execute_script("location.hash = arguments[0]", KEY)
            wait_for(shows(driver, ".health", WELL), "the page behind the key")
            assert driver.current_url == url, "no key stays in the address bar"

    await asyncio.to_thread(look)
