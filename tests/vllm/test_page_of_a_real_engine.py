"""The live page of a real deployment: `moeserving up` with an engine of the sample, opened in Chromium."""

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
from moe_gateway.live_page.routes import ASSETS
from moe_tools.tiny import ensure_tiny_model

from tests.gateway.browser import DRIVER, browser, take_picture, text_of, wait_for

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(DRIVER is None, reason="needs chromium-driver: `make test-ui` installs it"),
    pytest.mark.skipif(not ASSETS.is_dir(), reason="the page is not built: `make ui`"),
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
    manifest = yaml.safe_load((ROOT / "manifests" / "local-cpu.yaml").read_text())
    manifest["spec"]["model"]["uri"] = f"file://{model}"
    manifest["spec"]["engine"]["replicas"] = 1
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
