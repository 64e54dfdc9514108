"""The live page of a real deployment: `moeserving up` with two ranks of one expert group, opened in Chromium."""

import json
import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from moe_tools.tiny import ensure_tiny_model

from tests.gateway.browser import DRIVER, browser, take_picture, text_of, wait_for

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(DRIVER is None, reason="needs chromium-driver: `make test-ui` installs it"),
]
ROOT = Path(__file__).resolve().parents[2]
NAME = "page"


def moeserving(*words: str) -> str:
    command = [sys.executable, "-m", "moe_operator.cli", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def page(tmp_path: Path) -> Iterator[tuple[str, str]]:
    """The addresses of a running deployment and of its page."""
    model = ROOT / ".cache" / "models" / "tiny"
    ensure_tiny_model(model)
    manifest = yaml.safe_load((ROOT / "manifests" / "local-cpu-experts.yaml").read_text())
    manifest["spec"]["model"]["uri"] = f"file://{model}"
    file, state = tmp_path / "page.yaml", ("--state-dir", str(tmp_path / "state"))
    file.write_text(yaml.safe_dump(manifest))
    try:
        started = moeserving("up", "-f", str(file), "--name", NAME, "--detach", *state)
        found = re.search(r"ready at (\S+)", started)
        assert found is not None, started
        yield found[1], moeserving("ui", NAME, "--no-open", *state).strip()
    finally:
        moeserving("down", NAME, *state)


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


def test_the_page_shows_requests_and_experts_of_a_real_engine(page):
    endpoint, url = page
    for number in range(12):
        last = ask(endpoint, 3 + 5 * (number % 4))
    with browser() as driver:
        driver.get(url)
        wait_for(lambda: last in text_of(driver, "#explanation"), "the last request")
        assert "Its first token came after" in text_of(driver, "#explanation")
        ask(endpoint, 20)

        def hottest() -> bool:
            ask(endpoint, 5)
            return "is the hottest" in text_of(driver)

        wait_for(hottest, "the heat of the experts")
        assert driver.find_elements("css selector", ".heat canvas")
        wait_for(lambda: "ready" in text_of(driver, "[aria-label=Engines]"), "the engines")
        if pictures := os.environ.get("MOESERVING_PICTURES"):
            take_picture(driver, str(Path(pictures) / "ui-real.png"))
        assert [row["message"] for row in driver.get_log("browser") if row["level"] == "SEVERE"] == []
