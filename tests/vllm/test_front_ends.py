"""Front ends that users put before the gateway, as the page about it says: LiteLLM's proxy and Open WebUI."""

import json
import os
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.vllm import official_clients as clients
from tests.vllm.conftest import Gateway, free_ports, request
from tests.vllm.load_tools import TOOLS

pytestmark = pytest.mark.front_ends
PAGE = Path(__file__).parents[2] / "docs/gateway.md"
START_TIMEOUT_S = 300.0
KEY = "sk-key-of-the-front-end-0123456789"


@pytest.fixture(scope="module")
def agent(start_agent: Any, tiny_model: Path) -> Any:
    return start_agent("engine", tiny_model, env={"OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="module")
def gateway(agent: Any, tmp_path_factory: Any) -> Any:
    gateway = Gateway(tmp_path_factory.mktemp("gateway"), [agent], 1, {}, {})
    gateway.wait_for("an engine", lambda state: state["engines"][0]["accepting"])
    yield gateway
    assert gateway.process.stop() == 0


def run_front_end(program: str, *arguments: str, folder: Path, health: str, **environment: str) -> Iterator[None]:
    """Runs a front end until the test has ended, once it answers."""
    command = [str(TOOLS / program / "bin" / program), *arguments]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, env={**os.environ, **environment})
    try:
        until_s = time.monotonic() + START_TIMEOUT_S
        while not answers(health):
            assert process.poll() is None, (folder / "log").read_text()[-3000:]
            assert time.monotonic() < until_s, (folder / "log").read_text()[-3000:]
            time.sleep(0.5)
        yield
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def answers(url: str) -> bool:
    try:
        return bool(urllib.request.urlopen(url, timeout=5).status == 200)
    except (urllib.error.URLError, OSError):
        return False


def recipe() -> Any:
    """LiteLLM's configuration as the page shows it."""
    text = PAGE.read_text()
    begin = text.index("    model_list:\n")
    return yaml.safe_load(text[begin : text.index("\n\n", begin)])


@pytest.fixture(scope="module")
def litellm(gateway: Any, tmp_path_factory: Any) -> Any:
    folder, (port,) = tmp_path_factory.mktemp("litellm"), free_ports(1)
    document = recipe()
    parameters = document["model_list"][0]["litellm_params"]
    parameters |= {"model": parameters["model"].replace("SERVED_NAME", "tiny"), "api_base": f"{gateway.url}/v1"}
    (folder / "config.yaml").write_text(yaml.safe_dump(document))
    url = f"http://127.0.0.1:{port}"
    environment = {"LITELLM_MASTER_KEY": KEY, "MOESERVING_KEY": "any", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    arguments = ("--config", "config.yaml", "--host", "127.0.0.1", "--port", str(port))
    health = f"{url}/health/liveliness"
    running = run_front_end("litellm", *arguments, folder=folder, health=health, **environment)
    next(running)
    yield url
    running.close()


def test_openais_client_gets_through_litellm_what_it_gets_from_the_gateway(gateway, litellm):
    through, direct = clients.open_openai(litellm), clients.open_openai(gateway.url)
    through.api_key = KEY
    asked = clients.CHAT | {"model": "moe"}
    answer, expected = through.chat.completions.create(**asked), direct.chat.completions.create(**clients.CHAT)
    assert answer.choices[0].message.content == expected.choices[0].message.content
    assert answer.usage.completion_tokens == expected.usage.completion_tokens
    parts = [chunk.choices[0].delta.content for chunk in through.chat.completions.create(**asked, stream=True)]
    assert "".join(part or "" for part in parts) == expected.choices[0].message.content
    assert [model.id for model in through.models.list()] == ["moe"]


def test_litellm_passes_errors_of_the_gateway_on(litellm):
    client = clients.open_openai(litellm)
    client.api_key = KEY
    create = client.chat.completions.create
    assert clients.refused(lambda: create(**clients.CHAT | {"model": "moe", "max_tokens": 100_000}))[1] == 400


def test_anthropics_client_gets_an_answer_through_litellm(gateway, litellm):
    client = clients.open_anthropic(litellm)
    client.api_key = KEY
    answer = client.messages.create(**clients.MESSAGE | {"model": "moe"})
    expected = clients.open_anthropic(gateway.url).messages.create(**clients.MESSAGE)
    assert answer.content[0].text == expected.content[0].text


@pytest.fixture(scope="module")
def open_webui(gateway: Any, tmp_path_factory: Any) -> Any:
    folder, (port,) = tmp_path_factory.mktemp("open-webui"), free_ports(1)
    url = f"http://127.0.0.1:{port}"
    environment = {
        "OPENAI_API_BASE_URL": f"{gateway.url}/v1",
        "OPENAI_API_KEY": "any",
        "ENABLE_OLLAMA_API": "False",
        # One user without a password, and nothing from the network: its own model for searches is not loaded.
        "WEBUI_AUTH": "False",
        "WEBUI_SECRET_KEY": KEY,
        "DATA_DIR": str(folder / "data"),
        "RAG_EMBEDDING_ENGINE": "openai",
        "OFFLINE_MODE": "True",
        "HF_HUB_OFFLINE": "1",
    }
    arguments = ("serve", "--host", "127.0.0.1", "--port", str(port))
    running = run_front_end("open-webui", *arguments, folder=folder, health=f"{url}/health", **environment)
    next(running)
    yield url
    running.close()


def test_open_webui_chats_with_the_model_through_the_gateway(gateway, open_webui):
    """By its own API, which its pages use too."""
    status, session = request("POST", f"{open_webui}/api/v1/auths/signin", {"email": "", "password": ""})
    assert status == 200, session
    authorised = {"Authorization": f"Bearer {session['token']}"}
    _, models = request("GET", f"{open_webui}/api/models", None, authorised)
    assert [model["id"] for model in models["data"]] == ["tiny"]
    expected = clients.open_openai(gateway.url).chat.completions.create(**clients.CHAT).choices[0].message.content
    status, answer = request("POST", f"{open_webui}/api/chat/completions", clients.CHAT, authorised)
    assert (status, answer["choices"][0]["message"]["content"]) == (200, expected)
    asked = urllib.request.Request(
        f"{open_webui}/api/chat/completions",
        json.dumps(clients.CHAT | {"stream": True}).encode(),
        {"content-type": "application/json", **authorised},
    )
    rows = urllib.request.urlopen(asked, timeout=120).read().decode().split("\n")
    chunks = [json.loads(row[6:]) for row in rows if row.startswith("data: {")]
    text = [chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks if chunk["choices"]]
    assert "".join(text) == expected
