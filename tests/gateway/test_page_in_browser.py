"""The live page in Debian's Chromium, at a gateway with mock engines that do as a real fleet might.

A new user's three questions are asked of the page's text: why did the last request wait, is anything wrong, which layer
is hot. With MOESERVING_PICTURES=DIR the pictures of docs/ui.md are written there.
"""

import asyncio
import base64
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from moe_contract.page_keys import derive_page_key
from moe_gateway.live_page.routes import ASSETS
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from tests.gateway.browser import DRIVER, PHONE_WIDTH, browser, take_picture, text_of, wait_for
from tests.gateway.clients import TOKEN
from tests.gateway.messages import SSE_END, SSE_HEAD, event, post, prompt
from tests.gateway.waiting import until

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(DRIVER is None, reason="needs chromium-driver: `make test-ui` installs it"),
    pytest.mark.skipif(not ASSETS.is_dir(), reason="the page is not built: `make ui`"),
]

LAYERS, EXPERTS, RANKS = 58, 256, 8
UNIT = 1 / 32
# CSS pixels that WCAG 2.2 asks for at level AA (2.5.8).
SMALLEST_TARGET = 24
PICTURES = os.environ.get("MOESERVING_PICTURES", "")
# The id of the last request: an attempt at a script, but for the pictures.
EVIL = "chat-4" if PICTURES else "<img/src=x/onerror=document.title='owned'>"


def heat(hot_layer: int = 17) -> dict[str, Any]:
    """Experts as an agent gives them: one layer is hot on one rank."""

    def value(layer: int, column: int, columns: int) -> int:
        is_hot = layer == hot_layer and column == columns // 4
        return 90 if is_hot else 24 + (7 * layer + 13 * column + layer * column) % 17

    rows = {"by_expert": EXPERTS, "by_rank": RANKS}
    packed = {
        name: base64.b64encode(bytes(value(i, j, columns) for i in range(LAYERS) for j in range(columns))).decode()
        for name, columns in rows.items()
    }
    decision = {"number": 2, "age_s": 41.0, "outcome": "moved", "reason": "pays back in 900 steps", "moves": 12}
    gains = {"predicted_gain_s": 0.0021, "measured_gain_s": 0.0018, "cost_s": 0.4}
    stayed = {"number": 1, "age_s": 90.0, "outcome": "stayed", "reason": "gain: too small for its cost", "moves": 0}
    return {
        "mode": "active",
        "ranks": RANKS,
        "layers": LAYERS,
        "experts": EXPERTS,
        "slots_per_rank": 36,
        "step": 1000,
        "placement": {"version": 3},
        "load": {"steps": 500},
        "balance": {"mean": 1.18, "worst": 2.8, "by_layer": [1.1] * LAYERS, "by_rank": [1.0] * RANKS},
        "decisions": [decision | gains | {"balance_before": 1.42, "balance_after": 1.18}, stayed],
        "totals": {"moves": 12, "won_s": 3.9, "lost_s": 0.4},
        "heat": {"unit": UNIT, **packed},
    }


@pytest.fixture
async def shown(make_engine: Any, serve: Any) -> Any:
    """A gateway with a fast engine, a busy one, and a plain vLLM server that is gone; its page's address."""

    async def slow(_request: Any, writer: Any) -> None:
        await asyncio.sleep(0.3)
        writer.write(SSE_HEAD + event("a"))
        await asyncio.sleep(0.2)
        writer.write(SSE_END)

    fast, busy = await make_engine(slow, name="moe-engine-0"), await make_engine(slow, name="moe-engine-1")
    for engine, kv in ((fast, 0.31), (busy, 0.97)):
        engine.agent.experts = heat()
        engine.agent.say_rank(kv_usage=kv, running=4, expert_balance=1.42 if engine is busy else 1.05)
    busy.agent.say_rank(waiting=6, waiting_prefill_tokens=21_000)
    served = await serve(fast, busy, dispatch={"targets": {"ttft_s": 0.5, "inter_token_s": 0.02}})
    moving = asyncio.ensure_future(_move(fast, busy))
    for number in range(4):
        extra = f"x-request-id: chat-{number}\r\n".encode()
        await served.ask(post(prompt("Tell me about mixtures of experts. " * 20, stream=True), extra=extra))
    evil = post(prompt(stream=True, model="tiny"), extra=f"x-request-id: {EVIL}\r\n".encode())
    await served.ask(evil)
    yield served, fast, busy
    moving.cancel()
    await asyncio.gather(moving, return_exceptions=True)


async def _move(*engines: Any) -> None:
    step = 0
    while True:
        step += 1
        for engine in engines:
            row = engine.agent.state["ranks"][0]
            row.update(step=row["step"] + 14 + step % 3, computed_tokens=row["computed_tokens"] + 900 + 40 * (step % 5))
            engine.agent.say()
        await asyncio.sleep(0.25)


def address(served: Any) -> str:
    return f"{served.admin_url}/ui/#key={derive_page_key(TOKEN.encode())}"


async def test_a_new_user_finds_the_three_answers(shown, tmp_path):
    served, _, _ = shown
    await asyncio.to_thread(look, address(served), served.admin_url, dark=False)


def look(url: str, origin: str, *, dark: bool) -> None:
    with browser(dark=dark) as driver:
        driver.get(url)
        wait_for(lambda: "Layer 17 is the hottest" in text_of(driver), "the hottest layer")
        wait_for(lambda: "nearly all in use" in text_of(driver, ".health"), "the finding about KV blocks")
        # The key is out of the address bar, and stays for this tab alone.
        assert driver.current_url == f"{origin}/ui/"
        assert driver.find_element(By.CSS_SELECTOR, "header .state").text.startswith("live")
        why = text_of(driver, "#explanation")
        assert "Its first token came after" in why
        assert "Most of that time" in why
        assert "moe-engine-1" in why
        # An id of a client is text.
        assert EVIL in why
        assert driver.title == "MoEServing live"
        assert "0.00 times" not in text_of(driver, "#heat-cell")
        by_keyboard(driver)
        if PICTURES:
            wait_for(lambda: len(driver.find_elements(By.CSS_SELECTOR, ".u-wrap")) == 3, "the charts")
            choose(driver, "chat-3")
            take_picture(driver, str(Path(PICTURES) / f"ui-{'dark' if dark else 'light'}.png"))
        check_log(driver, origin)


def choose(driver: Any, request_id: str) -> None:
    buttons = driver.find_elements(By.CSS_SELECTOR, "button.link")
    next(button for button in buttons if button.text == request_id).click()
    wait_for(lambda: request_id in text_of(driver, "#explanation"), "the chosen request")


def by_keyboard(driver: Any) -> None:
    """The map and the tables can be used without a mouse."""
    canvas = driver.find_element(By.CSS_SELECTOR, ".heat canvas")
    assert canvas.get_attribute("aria-label")
    canvas.send_keys(Keys.ARROW_DOWN, Keys.ARROW_DOWN, Keys.ARROW_RIGHT)
    wait_for(lambda: "Layer 1, rank 1:" in text_of(driver, "#heat-cell"), "the cell of the arrow keys")
    driver.find_elements(By.CSS_SELECTOR, "input[name=view]")[1].send_keys(Keys.SPACE)
    wait_for(lambda: f"expert {EXPERTS // 4}" in text_of(driver, ".hot"), "the view by expert")
    driver.find_elements(By.CSS_SELECTOR, "input[name=view]")[0].send_keys(Keys.SPACE)
    unnamed = driver.execute_script(
        "return [...document.querySelectorAll('section')].filter(s => !document.getElementById("
        "s.getAttribute('aria-labelledby'))).length"
    )
    assert unnamed == 0


def check_log(driver: Any, origin: str) -> None:
    """No error and no breach of the content security policy; no request but to the gateway."""
    assert [row["message"] for row in driver.get_log("browser") if row["level"] == "SEVERE"] == []
    rows = [json.loads(row["message"])["message"] for row in driver.get_log("performance")]
    urls = [row["params"]["request"]["url"] for row in rows if row["method"] == "Network.requestWillBeSent"]
    assert urls
    assert [url for url in urls if not url.startswith((origin, "data:"))] == []


OVERFLOW = """
const inner = element => element.closest('.scroll, .heat');
return [...document.querySelectorAll('body *')]
  .filter(e => e.getBoundingClientRect().right > document.documentElement.clientWidth + 1 && !inner(e))
  .map(e => e.outerHTML.slice(0, 120));
"""


@pytest.mark.parametrize("dark", [False, True])
async def test_the_page_fits_into_a_phone(shown, dark):
    served, _, _ = shown

    def look_at_phone() -> None:
        with browser(dark=dark, phone=True) as driver:
            driver.get(address(served))
            wait_for(lambda: "Layer 17 is the hottest" in text_of(driver), "the hottest layer")
            wait_for(lambda: len(driver.find_elements(By.CSS_SELECTOR, ".u-wrap")) == 3, "the charts")
            assert driver.execute_script(OVERFLOW) == [], "what is wider scrolls within itself"
            assert driver.execute_script("return document.documentElement.scrollWidth") == PHONE_WIDTH
            smallest = driver.execute_script(
                "return Math.min(...[...document.querySelectorAll('button, select, summary, label')]"
                ".map(e => e.getBoundingClientRect().height))"
            )
            assert smallest >= SMALLEST_TARGET, "each control can be hit by a finger"
            if PICTURES:
                take_picture(driver, str(Path(PICTURES) / f"ui-phone{'-dark' if dark else ''}.png"), phone=True)

    await asyncio.to_thread(look_at_phone)


async def test_what_waits_starts_and_failed_is_seen(make_engine, serve):
    """Nothing takes requests: one engine starts, one has failed; a request is held, one was sent and waits."""

    async def silent(_request: Any, _writer: Any) -> None:
        await asyncio.Event().wait()

    engines = [await make_engine(silent, name=f"moe-engine-{number}") for number in range(3)]
    served = await serve(*engines)
    served.gateway.gateways = ("moe-gateway-a", "moe-gateway-b")
    sent, held = await served.connect(), await served.connect()
    sent.send(post(prompt(stream=True), extra=b"x-request-id: sent\r\n"))
    await until(lambda: served.gateway.dispatcher.in_flight == 1, "the request at an engine")
    start = {"phase": "loading weights", "progress": "3 of 8 files", "age_s": 42.0}
    failed = engines[1].agent.state["engine"] | {"restarts": 2, "last_exit": "exit status 1: ValueError: no memory"}
    engines[0].agent.say(phase="starting", accepting=False, start=start)
    engines[1].agent.say(phase="backoff", accepting=False, engine=failed)
    engines[2].agent.say(phase="draining", accepting=False)
    await until(lambda: not served.accepting, "the states of the agents")
    held.send(post(prompt(stream=True), extra=b"x-request-id: held\r\n"))
    await served.held(1)

    def look_at_waits() -> None:
        with browser() as driver:
            driver.get(address(served))
            said = ["moe-engine-0 starts: loading weights 3 of 8 files, for 42 s", "ValueError: no memory", "No engine"]
            wait_for(lambda: all(words in text_of(driver, ".health") for words in said), "the findings")
            assert "failed, is started again" in text_of(driver, "[aria-label=Engines]")
            assert "so far" in text_of(driver, "[aria-label='The newest requests']")
            # What waits for longest is explained by itself, though nothing has ended.
            wait_for(lambda: "Why does a request wait now?" in text_of(driver, "#why"), "the title")
            wait_for(lambda: re.search(r"for \d+\.\d+ s so far", text_of(driver, "#explanation")), "the wait so far")
            choose(driver, "held")
            assert "so far: no engine takes requests now" in text_of(driver, "#explanation")
            assert "those of this gateway alone" in text_of(driver, ".others")
            if PICTURES:
                take_picture(driver, str(Path(PICTURES) / "ui-waits.png"))

    await asyncio.to_thread(look_at_waits)


async def test_the_page_without_its_key_asks_for_it_and_shows_nothing(shown):
    served, _, _ = shown

    def open_locked() -> None:
        with browser() as driver:
            driver.get(f"{served.admin_url}/ui/")
            wait_for(lambda: "The page key is needed" in text_of(driver), "the question for the key")
            assert "chat-3" not in text_of(driver)
            driver.find_element(By.CSS_SELECTOR, "input[type=password]").send_keys(
                derive_page_key(TOKEN.encode()), Keys.ENTER
            )
            wait_for(lambda: "chat-3" in text_of(driver), "the page behind the key")

    await asyncio.to_thread(open_locked)


async def test_the_page_in_the_dark(shown):
    served, _, _ = shown
    await asyncio.to_thread(look, address(served), served.admin_url, dark=True)
