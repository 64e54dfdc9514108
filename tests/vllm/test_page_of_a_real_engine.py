"""The live page of a real deployment: `moeserving up` with an engine of the sample, opened in Chromium."""

import json
import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from moe_gateway.live_page.routes import ASSETS
from moe_tools.tiny import ensure_tiny_model
from selenium.webdriver.common.by import By

from tests.gateway.browser import DRIVER, browser, take_picture, text_of, wait_for

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(DRIVER is None, reason="needs chromium-driver: `make test-ui` installs it"),
    pytest.mark.skipif(not ASSETS.is_dir(), reason="the page is not built: `make ui`"),
]
ROOT = Path(__file__).resolve().parents[2]
NAME = "page"
# Of the model and the sample.
LAYERS, RANKS = 4, 2


def moeserving(*words: str) -> str:
    command = [sys.executable, "-m", "moe_operator.cli", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def page(tmp_path: Path) -> Iterator[tuple[str, str]]:
    """The addresses of a running deployment with one engine, and of its page."""
    with serving("local-cpu", {"engine": {"replicas": 1}}, tmp_path) as found:
        yield found


@pytest.fixture
def experts_page(tmp_path: Path) -> Iterator[tuple[str, str]]:
    """The same with a group of two ranks that decides about its experts after some dozen steps."""
    expert = {"mode": "active", "interval": 60, "window": 30}
    with serving("local-cpu-experts", {"scheduling": {"expert": expert}}, tmp_path) as found:
        yield found


@contextmanager
def serving(sample: str, changes: dict[str, Any], tmp_path: Path) -> Iterator[tuple[str, str]]:
    """Runs a sample with some changed fields while the block runs."""
    model = ROOT / ".cache" / "models" / "tiny"
    ensure_tiny_model(model)
    manifest = yaml.safe_load((ROOT / "manifests" / f"{sample}.yaml").read_text())
    lay_over(manifest["spec"], changes | {"model": {"uri": f"file://{model}"}})
    file, state = tmp_path / "page.yaml", ("--state-dir", str(tmp_path / "state"))
    file.write_text(yaml.safe_dump(manifest))
    try:
        started = moeserving("up", "-f", str(file), "--name", NAME, "--detach", *state)
        found = re.search(r"ready at (\S+)", started)
        assert found is not None, started
        yield found[1], moeserving("ui", NAME, "--no-open", *state).strip()
    finally:
        moeserving("down", NAME, *state)


def lay_over(section: dict[str, Any], changes: dict[str, Any]) -> None:
    for name, value in changes.items():
        if isinstance(value, dict):
            lay_over(section.setdefault(name, {}), value)
        else:
            section[name] = value


def ask(endpoint: str, words: int) -> str:
    """One streamed chat; returns its id."""
    question = "What does this function do? " * words
    with urllib.request.urlopen(f"{endpoint}/v1/models") as answer:
        model = json.load(answer)["data"][0]["id"]
    body = {"model": model, "messages": [{"role": "user", "content": question}], "max_tokens": 40, "stream": True}
    request = urllib.request.Request(
        f"{endpoint}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        answer.read()
        return str(answer.headers["x-request-id"])


def test_the_page_shows_the_requests_of_a_real_engine(page):
    endpoint, url = page
    for number in range(12):
        last = ask(endpoint, 3 + 5 * (number % 4))
    with browser() as driver:
        driver.get(url)
        wait_for(lambda: last in text_of(driver, "#explanation"), "the last request")
        assert "Its first token came after" in text_of(driver, "#explanation")
        later = ask(endpoint, 20)
        wait_for(lambda: later in text_of(driver, "#explanation"), "the request that came while the page was open")
        assert "ready" in text_of(driver, "[aria-label=Engines]")
        wait_for(lambda: "does not spread its experts" in text_of(driver), "the reason for no heat")
        if pictures := os.environ.get("MOESERVING_PICTURES"):
            take_picture(driver, str(Path(pictures) / "ui-real.png"))
        assert [row["message"] for row in driver.get_log("browser") if row["level"] == "SEVERE"] == []


def test_the_page_shows_the_experts_of_a_real_group(experts_page):
    endpoint, url = experts_page
    with browser() as driver:
        driver.get(url)

        def ask_until(words: str) -> bool:
            ask(endpoint, 20)
            return words in text_of(driver)

        wait_for(lambda: ask_until("is the hottest"), "the load of the experts")
        said = text_of(driver)
        hottest = re.search(r"Layer (\d+) is the hottest: its rank (\d+) has (\d\.\d+) times the mean", said)
        assert hottest is not None, said
        assert int(hottest[1]) < LAYERS
        assert int(hottest[2]) < RANKS
        # Of two ranks one has at least the mean, and at most all.
        assert 1.0 <= float(hottest[3]) <= RANKS
        assert f"Over all {LAYERS} layers the busiest rank has" in said
        wait_for(lambda: ask_until("Moves and what they won"), "a decision about the experts")
        outcomes = {cell.text for cell in driver.find_elements(By.CSS_SELECTOR, "[aria-label=Moves] td:nth-child(2)")}
        assert outcomes <= {"moved", "stayed", "rolledBack", "failed"}
        assert outcomes, "each decision has its outcome"
        rows = text_of(driver, "[aria-label=Engines]")
        assert all(f"engine-0{rank}" in rows for rank in ("", " rank 1")), rows
        if pictures := os.environ.get("MOESERVING_PICTURES"):
            take_picture(driver, str(Path(pictures) / "ui-real-experts.png"))
        assert [row["message"] for row in driver.get_log("browser") if row["level"] == "SEVERE"] == []
