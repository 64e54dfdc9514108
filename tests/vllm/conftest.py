"""Fixtures: agents with real vLLM engines on the CPU, serving a tiny model with random weights."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from moe_tools.tiny import TinySettings, ensure_tiny_model

START_TIMEOUT_S = 900.0
TOKEN = "token-of-the-tests"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A start takes a minute or more, and the first test pays for it."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.vllm)
            item.add_marker(pytest.mark.timeout(START_TIMEOUT_S * 2))


class Process:
    """A process of ours, and what it left behind when it ended."""

    def __init__(self, module: str, config: Path, log: Path, environment: dict[str, str] | None = None) -> None:
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, "--config", str(config)],
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {})},
            )
        self.log = log

    def check(self) -> None:
        assert self._process.poll() is None, self.log.read_text()

    def stop(self, timeout_s: float = 120.0) -> int:
        """SIGTERM; answers the exit status once the process and all below it are gone."""
        if self._process.poll() is None:
            below = psutil.Process(self._process.pid).children(recursive=True)
            self._process.send_signal(signal.SIGTERM)
            self._process.wait(timeout_s)
            _, left = psutil.wait_procs(below, timeout=10)
            assert not left
        return self._process.wait()


class Agent:
    """One agent with its engine."""

    def __init__(
        self,
        folder: Path,
        name: str,
        model: Path,
        *arguments: str,
        shape: dict[str, Any] | None = None,
        environment: dict[str, str] | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.name, self.folder = name, folder
        self.port, self.engine_port = free_ports(2)
        (folder / "token").write_text(TOKEN)
        self.config = {
            "name": name,
            "run_dir": str(folder / "run"),
            "listen": {"port": self.port},
            "token_file": str(folder / "token"),
            "engine": {
                "port": self.engine_port,
                "model": str(model),
                "served_name": "tiny",
                "args": ["--max-model-len=2048", "--dtype=float32", "--enforce-eager", *arguments],
                "env": {"OMP_NUM_THREADS": "1"},
                "drain_timeout_s": 60,
                **(shape or {}),
            },
        }
        (folder / "agent.json").write_text(json.dumps(self.config))
        self.process = Process("moe_agent", folder / "agent.json", folder / "agent.log", environment)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.engine_port}"

    def state(self) -> Any:
        return request("GET", f"http://127.0.0.1:{self.port}/v1/state")[1]

    def engine(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any]:
        return request(method, self.url + path, body, headers)

    def complete(self, prompt: Any, tokens: int, **more: Any) -> Any:
        """A completion straight from the engine."""
        body = {"model": "tiny", "prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "temperature": 0} | more
        status, answer = self.engine("POST", "/v1/completions", body)
        assert status == 200, answer
        return answer

    def control(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        return request(method, f"http://127.0.0.1:{self.port}{path}", body, {"Authorization": f"Bearer {TOKEN}"})

    def wait_for(self, what: str, condition: Callable[[Any], bool], timeout_s: float = START_TIMEOUT_S) -> Any:
        """The first state in which the condition holds."""
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            self.process.check()
            try:
                if condition(state := self.state()):
                    return state
            except (urllib.error.URLError, ConnectionError):
                pass
            time.sleep(0.05)
        raise AssertionError(f"{self.name} never: {what}; engine's log ends with {self.log_tail()}")

    def wait_ready(self) -> Any:
        return self.wait_for("ready", lambda state: state["phase"] == "ready")

    def log_tail(self) -> str:
        path = self.folder / "run" / "engine.log"
        return path.read_text(errors="replace")[-2000:] if path.exists() else "nothing"


def request(method: str, url: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, Any]:
    """Status and JSON body."""
    data = None if body is None else json.dumps(body).encode()
    made = urllib.request.Request(url, data, {"Content-Type": "application/json"} | (headers or {}), method=method)
    try:
        with urllib.request.urlopen(made, timeout=300) as answer:
            return answer.status, json.loads(answer.read() or b"null")
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read() or b"null")


def free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
    finally:
        for probe in probes:
            probe.close()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "model"
    return ensure_tiny_model(folder, settings=TinySettings(steps=0), show_progress=False)


@pytest.fixture(scope="module")
def start_agents(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Callable[..., list[Agent]]]:
    """Starts agents at once, waits until all are ready, and ends them with the module."""
    agents: list[Agent] = []

    def start(count: int, *arguments: str, **shape: Any) -> list[Agent]:
        for index in range(count):
            folder = tmp_path_factory.mktemp("agent")
            agents.append(Agent(folder, f"tiny-engine-{index}", tiny_model, *arguments, shape=shape))
        for agent in agents:
            agent.wait_ready()
        return agents

    yield start
    for agent in agents:
        assert agent.process.stop() == 0


@pytest.fixture(scope="module")
def start_agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Agent]]:
    """Starts one agent, waits until it is ready, and ends it with the module where the test has not."""
    agents: list[Agent] = []

    def start(name: str, model: Path, *arguments: str, **shape: Any) -> Agent:
        agents.append(Agent(tmp_path_factory.mktemp(name), name, model, *arguments, shape=shape))
        agents[-1].wait_ready()
        return agents[-1]

    yield start
    for agent in agents:
        assert agent.process.stop() == 0


@pytest.fixture
def start_nodes(tmp_path: Path, tiny_model: Path) -> Iterator[Callable[..., list[Agent]]]:
    """Starts the agents of one replica that spans several nodes, all on this machine."""
    agents: list[Agent] = []

    def start(nodes: int, **shape: Any) -> list[Agent]:
        for index in range(nodes):
            place = {"LWS_LEADER_ADDRESS": "127.0.0.1", "LWS_WORKER_INDEX": str(index)}
            folder = tmp_path / f"node-{index}"
            agents.append(
                Agent(folder, f"node-{index}", tiny_model, shape={"nodes": nodes, **shape}, environment=place)
            )
        for agent in agents:
            agent.wait_ready()
        return agents

    yield start
    for agent in agents:
        assert agent.process.stop() == 0


class Gateway:
    """The real gateway in front of agents."""

    def __init__(
        self, folder: Path, agents: list[Agent], ranks: int, limits: dict[str, Any], sections: dict[str, Any]
    ) -> None:
        self.port, self._admin_port = free_ports(2)
        (folder / "token").write_text(TOKEN)
        config = {
            "listen": {"port": self.port},
            "admin": {"port": self._admin_port},
            "token_file": str(folder / "token"),
            "engines": [
                {"name": agent.name, "url": agent.url, "agent_url": f"http://127.0.0.1:{agent.port}", "ranks": ranks}
                for agent in agents
            ],
            "limits": limits,
            **sections,
        }
        (folder / "gateway.json").write_text(json.dumps(config))
        self.process = Process("moe_gateway", folder / "gateway.json", folder / "gateway.log")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def admin_url(self) -> str:
        return f"http://127.0.0.1:{self._admin_port}"

    def state(self) -> Any:
        return request("GET", f"{self.admin_url}/v1/state")[1]

    def attempts(self, request_id: str) -> Any:
        """The engines that a request was sent to."""
        return request("GET", f"{self.admin_url}/v1/requests/{request_id}")[1]["attempts"]

    def wait_for(self, what: str, condition: Callable[[Any], bool], timeout_s: float = 60.0) -> Any:
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            self.process.check()
            try:
                if condition(state := self.state()):
                    return state
            except (urllib.error.URLError, ConnectionError):
                pass
            time.sleep(0.05)
        raise AssertionError(f"the gateway never: {what}; its log is {self.process.log.read_text()[-2000:]}")


JAVASCRIPT = Path(__file__).parents[2] / ".cache/javascript-clients"


def run_javascript(url: str, *names: str, script: str = "checks.mjs") -> dict[str, Any]:
    """What the official JavaScript clients get from a server, by check; `make` installs them."""
    checks = Path(__file__).parent / "javascript" / script
    (JAVASCRIPT / checks.name).write_bytes(checks.read_bytes())
    command = ["node", str(JAVASCRIPT / checks.name), url, *names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"{done.stderr}\n`make .cache/javascript-clients/.ready` installs the clients"
    return dict(json.loads(done.stdout))


@pytest.fixture
def start_gateway(tmp_path: Path) -> Iterator[Callable[..., Gateway]]:
    gateways: list[Gateway] = []

    def start(agents: list[Agent], ranks: int = 1, sections: dict[str, Any] | None = None, **limits: Any) -> Gateway:
        gateways.append(Gateway(tmp_path, agents, ranks, limits, sections or {}))
        return gateways[-1]

    yield start
    for gateway in gateways:
        assert gateway.process.stop() == 0
