"""The agent's HTTP server over real shared-memory records and a supervised fake engine."""

import asyncio
import json
import os
import socket
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from moe_agent.api import broadcaster
from moe_agent.api import server as server_module
from moe_agent.api.server import AgentServer
from moe_agent.experts.document import PublishedExperts
from moe_agent.shared_memory.control_record import ControlRecordReader, SettingsPublisher
from moe_agent.shared_memory.rank_record import RankRecords, RankRecordWriter, RankState
from moe_agent.supervisor.supervisor import EngineSupervisor, Phase, SupervisorRules
from moe_contract.agent_config import AgentConfig
from moe_contract.control_tokens import ControlTokens
from moe_scheduling.signals import EngineSignal, StepTime

FAKE = Path(__file__).with_name("fake_engine.py")
TOKEN = "secret-token"
BEARER = {"Authorization": f"Bearer {TOKEN}"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Rank:
    """A rank's scheduler, played by the test."""

    def __init__(self, run_dir: Path, number: int) -> None:
        self._state = RankState(pid=os.getpid(), written_s=time.monotonic(), config_version=1, signal=EngineSignal())
        self._writer = RankRecordWriter(run_dir, number, self._state)

    def publish(self, *, age_s: float = 0.0, config_version: int | None = None, **changed: Any) -> None:
        self._state = replace(
            self._state,
            written_s=time.monotonic() - age_s,
            config_version=config_version or self._state.config_version,
            signal=replace(self._state.signal, **changed),
        )
        self._writer.write(self._state)


class Agent:
    """The agent's parts, wired as `moe_agent.app` wires them."""

    def __init__(self, folder: Path, ranks: int, **ways: Any) -> None:
        self.config = AgentConfig.model_validate(
            {
                "name": "e0",
                "run_dir": folder,
                "listen": {"port": 1},
                "token_file": folder / "token",
                "engine": {"port": free_port(), "model": "m", "served_name": "fake", "data_parallel": ranks},
            }
        )
        command = [sys.executable, str(FAKE), str(self.config.engine.port), json.dumps(ways)]
        rules = SupervisorRules(health_every_s=0.02, settle_s=0.05, first_backoff_s=0.05)
        self.records = RankRecords(folder, range(ranks))
        self.changed = asyncio.Event()
        self.control = SettingsPublisher(
            folder, self.config.request, self.config.expert, self.records, self.changed.set
        )
        self.supervisor = EngineSupervisor(
            self.config.engine,
            command,
            dict(os.environ),
            folder / "engine.log",
            rules,
            on_restart=self.records.remove,
            on_change=self.changed.set,
        )
        (folder / "token").write_text(TOKEN)
        tokens = ControlTokens(folder / "token")
        self.experts = PublishedExperts(folder) if ranks > 1 else None
        self.server = AgentServer(
            self.config, tokens, self.supervisor, self.records, self.control, self.experts, self.changed
        )


@pytest.fixture
async def agent(tmp_path: Path) -> AsyncIterator[Agent]:
    made = Agent(tmp_path, ranks=2)
    task = asyncio.create_task(made.supervisor.run())
    while not made.supervisor.accepting:
        assert not task.done()
        await asyncio.sleep(0.01)
    yield made
    made.supervisor.request_kill()
    await asyncio.wait_for(task, 20)


@pytest.fixture
async def client(agent: Agent) -> AsyncIterator[TestClient[web.Request, web.Application]]:
    async with TestClient(TestServer(agent.server.build_app())) as made:
        yield made


@pytest.fixture
def without_polling(monkeypatch: pytest.MonkeyPatch) -> None:
    """A watch sees only what the agent itself reports as changed."""
    monkeypatch.setattr(broadcaster, "POLL_INTERVAL_S", 60.0)


@pytest.fixture
def ranks(agent: Agent) -> list[Rank]:
    return [Rank(agent.config.run_dir, number) for number in range(2)]


async def test_the_state_has_the_fields_of_the_contract(client, ranks):
    line = StepTime(base_s=0.004, prefill_s=0.0001, decode_s=0.0002)
    ranks[1].publish(step=17, running=2, decode_tokens=1, kv_usage=0.5, step_time=line, age_s=3.0)
    state = await (await client.get("/v1/state")).json()
    assert state.keys() == {"name", "phase", "accepting", "engine", "config", "ranks", "pod", "kv_transfer", "start"}
    engine = {"url", "model", "pid", "restarts", "last_exit", "max_model_len", "identity", "not_balanced"}
    assert state["engine"].keys() == engine
    assert (state["name"], state["phase"], state["accepting"], state["engine"]["model"]) == (
        "e0",
        "ready",
        True,
        "fake",
    )
    assert state["config"]["request"]["policy"] == "sjf"
    busy = state["ranks"][1]
    assert busy.keys() == {"rank", "age_s", "trouble", *EngineSignal.__slots__}
    assert (busy["step"], busy["kv_usage"], busy["step_time"]["prefill_s"]) == (17, 0.5, 0.0001)
    assert 3.0 <= busy["age_s"] < 30.0


async def test_an_idle_rank_is_read_as_current_while_its_engine_is_ready(client, ranks, agent):
    ranks[0].publish(age_s=100.0)
    assert (await (await client.get("/v1/state")).json())["ranks"][0]["age_s"] == 0.0
    agent.supervisor.request_drain()
    assert (await (await client.get("/v1/state")).json())["ranks"][0]["age_s"] >= 100.0


async def test_a_watch_has_the_state_now_then_each_change_and_one_a_second(client, ranks):
    async with client.get("/v1/state?watch=1") as answer:
        assert answer.content_type == "application/x-ndjson"

        async def line() -> dict[str, Any]:
            return json.loads(await asyncio.wait_for(answer.content.readline(), 10))

        assert (await line())["ranks"][0]["step"] == 0
        for step in (1, 2, 3):
            ranks[0].publish(step=step)
            assert (await line())["ranks"][0]["step"] == step
        assert (await line())["ranks"][0]["step"] == 3, "the one of the second without a change"


async def test_a_sparse_watch_has_changes_of_the_agent_and_neither_numbers_nor_heartbeats(client, ranks, agent):
    async with client.get("/v1/state?watch=1&interval=3600") as answer:
        assert json.loads(await answer.content.readline())["ranks"][0]["step"] == 0
        ranks[0].publish(step=1)
        async with client.get("/v1/state?watch=1") as dense:
            while json.loads(await dense.content.readline())["ranks"][0]["step"] == 0:
                pass
        assert (await client.post("/v1/drain", headers=BEARER)).status == 202
        state = json.loads(await asyncio.wait_for(answer.content.readline(), 10))
        assert (state["accepting"], state["ranks"][0]["step"]) == (False, 1)
    assert (await client.get("/v1/state?watch=1&interval=0")).status == 422


@pytest.mark.usefixtures("without_polling")
async def test_a_drain_reaches_a_watcher_before_the_engine_ends(client, ranks, agent):
    async with client.get("/v1/state?watch=1") as answer:
        assert json.loads(await answer.content.readline())["accepting"]
        drained = await client.post("/v1/drain", headers=BEARER)
        assert drained.status == 202
        state = json.loads(await asyncio.wait_for(answer.content.readline(), 10))
        assert (state["accepting"], state["phase"]) == (False, "draining")
        while state["phase"] != "stopped":
            state = json.loads(await asyncio.wait_for(answer.content.readline(), 10))
        assert state["engine"]["pid"] is None
        assert state["ranks"] == []
    assert (await client.get("/readyz")).status == 503
    assert (await client.get("/healthz")).status == 200


@pytest.mark.usefixtures("without_polling")
async def test_new_settings_reach_a_watcher_at_once(client, monkeypatch):
    monkeypatch.setattr(broadcaster, "HEARTBEAT_S", 60.0)
    async with client.get("/v1/state?watch=1") as answer:
        await answer.content.readline()
        assert (await put(client, {"request": {"policy": "fcfs"}}))[0] == 200
        state = json.loads(await asyncio.wait_for(answer.content.readline(), 10))
    assert state["config"]["request"]["policy"] == "fcfs"


@pytest.mark.usefixtures("without_polling")
async def test_watches_end_when_the_agent_ends(client, agent, monkeypatch):
    monkeypatch.setattr(broadcaster, "HEARTBEAT_S", 60.0)
    async with client.get("/v1/state?watch=1") as answer:
        await answer.content.readline()
        agent.server.end_streams()
        assert (await asyncio.wait_for(answer.content.read(), 10)).count(b"\n") == 1


@pytest.mark.parametrize(
    "header", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": TOKEN}, {"X-Token": TOKEN}]
)
@pytest.mark.parametrize(("method", "path"), [("PUT", "/v1/config"), ("POST", "/v1/drain")])
async def test_control_routes_take_the_token_and_nothing_else(client, agent, method, path, header):
    answer = await client.request(method, path, headers=header, json={"request": {"policy": "fcfs"}})
    assert answer.status == 401
    assert (await answer.json())["errors"][0]["path"] == "Authorization"
    assert agent.supervisor.phase is Phase.READY
    assert agent.control.control.version == 1


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


async def test_each_line_of_the_token_file_counts_as_it_is_now(client, agent):
    path = agent.config.token_file

    async def status(token: str) -> int:
        return (await client.put("/v1/config", headers=bearer(token), json={})).status

    path.write_text("newest\n\n  older \r\n")
    assert [await status(token) for token in ("newest", "older", TOKEN, "", "newest\tolder")] == [
        200,
        200,
        401,
        401,
        401,
    ]
    path.write_text("next\nnewest\n")
    assert [await status(token) for token in ("next", "newest", "older")] == [200, 200, 401]


@pytest.mark.parametrize(
    "broken", [Path.unlink, lambda path: path.write_bytes(b"\n \n"), lambda path: (path.unlink(), path.mkdir())]
)
async def test_a_token_file_that_cannot_be_read_lets_nobody_in_and_breaks_nothing(client, agent, broken):
    broken(agent.config.token_file)
    for token in (TOKEN, ""):
        assert (await client.post("/v1/drain", headers=bearer(token))).status == 401
    assert agent.supervisor.phase is Phase.READY
    assert (await client.get("/healthz")).status == 200


async def test_an_engine_without_a_name_has_the_machines(agent):
    unnamed = agent.config.model_copy(update={"name": None})
    tokens = ControlTokens(agent.config.token_file)
    server = AgentServer(unnamed, tokens, agent.supervisor, agent.records, agent.control, None, agent.changed)
    assert server.snapshot().name == socket.gethostname()


async def test_the_agent_is_healthy_and_not_ready_while_its_engine_loads(tmp_path):
    loading = Agent(tmp_path, ranks=1, start_delay_s=600.0)
    task = asyncio.create_task(loading.supervisor.run())
    async with TestClient(TestServer(loading.server.build_app())) as client:
        assert (await client.get("/healthz")).status == 200
        ready = await client.get("/readyz")
        assert (ready.status, await ready.json()) == (503, {"phase": "starting"})
        start = (await (await client.get("/v1/state")).json())["start"]
        assert (start["phase"], start["progress"]) == ("loading Python packages", "")
    loading.supervisor.request_kill()
    await asyncio.wait_for(task, 20)


async def test_a_sparse_watch_has_how_far_a_start_is_and_an_engine_that_is_ready_has_no_start(tmp_path):
    loading = Agent(tmp_path, ranks=1, start_delay_s=600.0)
    task = asyncio.create_task(loading.supervisor.run())
    async with TestClient(TestServer(loading.server.build_app())) as client:
        answer = await client.get("/v1/state", params={"watch": "1", "interval": "0.1"})
        while not loading.supervisor.pid:
            await asyncio.sleep(0.01)
        with (tmp_path / "engine.log").open("a") as log:
            log.write("Loading safetensors checkpoint shards: 33% Completed | 1/3\n")
        async with asyncio.timeout(60):
            while b"loading weights" not in (line := await answer.content.readline()):
                pass
        assert json.loads(line)["start"]["progress"] == "1 of 3 files"
    loading.supervisor.request_kill()
    await asyncio.wait_for(task, 20)
    assert loading.server.snapshot().start is None


async def put(client: Any, body: Any) -> tuple[int, Any]:
    answer = await client.put("/v1/config", headers=BEARER, data=body if isinstance(body, bytes) else json.dumps(body))
    return answer.status, await answer.json()


async def test_settings_reach_the_control_record_and_absent_fields_keep_their_value(client, ranks, agent):
    assert await put(client, {"request": {"policy": "fcfs"}}) == (
        200,
        {
            "version": 2,
            "request": {**asdict(agent.config.request), "policy": "fcfs"},
            "expert": asdict(agent.config.expert),
        },
    )
    status, body = await put(client, {"request": {"ageing_rate": 5}})
    assert (status, body["request"]["policy"], body["request"]["ageing_rate"]) == (200, "fcfs", 5.0)
    with ControlRecordReader(agent.config.run_dir) as record:
        assert record.read() == agent.control.control
    assert (await (await client.get("/v1/state")).json())["config"]["version"] == 3


async def until_restarted(agent: Agent) -> int:
    async with asyncio.timeout(30):
        while not agent.supervisor.restarts:
            await asyncio.sleep(0.01)
    return agent.supervisor.restarts


async def test_settings_of_experts_are_taken_beside_those_of_requests(client, ranks, agent):
    status, body = await put(client, {"expert": {"mode": "active", "interval_steps": 40}})
    assert (status, body["expert"]["mode"], body["expert"]["window_steps"]) == (200, "active", 1000)
    assert body["request"] == asdict(agent.config.request)
    with ControlRecordReader(agent.config.run_dir) as record:
        assert record.read().expert.interval_steps == 40
    state = await (await client.get("/v1/state")).json()
    assert state["config"]["expert"]["mode"] == "active"


async def test_the_same_settings_again_are_no_change(client, ranks):
    assert (await put(client, {"request": {"policy": "sjf"}}))[1]["version"] == 1


@pytest.mark.parametrize(
    ("body", "path", "message"),
    [
        (b"{", "", "not JSON"),
        (b"\xff\xfe", "", "not JSON"),
        ([], "", "a JSON object is needed, got list"),
        (
            {"request": {"polcy": "sjf"}},
            "request.polcy",
            "unknown field; nearest known: policy; known: ageing_horizon_s",
        ),
        ({"request": {"policy": "sjff"}}, "request.policy", "unknown 'sjff'; known: fcfs, priority, sjf"),
        ({"request": {"ageing_rate": -1}}, "request", "ageing_rate must be greater than 0"),
        ({"request": {"ageing_rate": "fast"}}, "request.ageing_rate", "input should be a valid number"),
        ({"request": 5}, "request", "a mapping of fields is needed"),
        ({"dispatch": {}}, "dispatch", "unknown field; known: expert, request"),
    ],
)
async def test_bad_settings_are_named_and_nothing_is_changed(client, ranks, agent, body, path, message):
    status, answer = await put(client, body)
    assert status == 422
    assert [error["path"] for error in answer["errors"]] == [path]
    assert answer["errors"][0]["message"].startswith(message)
    assert agent.control.control.version == 1


async def test_a_busy_rank_is_waited_for(client, ranks):
    ranks[1].publish(running=1)
    change = asyncio.create_task(put(client, {"request": {"policy": "fcfs"}}))
    await asyncio.sleep(0.1)
    assert not change.done()
    ranks[1].publish(config_version=2)
    assert (await change)[0] == 200


async def test_a_rank_that_takes_no_settings_in_time_is_named(client, ranks, monkeypatch):
    monkeypatch.setattr(server_module, "TAKE_TIMEOUT_S", 0.2)
    ranks[1].publish(running=1)
    status, answer = await put(client, {"request": {"policy": "fcfs"}})
    assert status == 504
    assert answer["errors"][0] == {
        "path": "request",
        "message": "not taken within 0.2 s by rank 1; it takes it at its next step",
    }


async def test_metrics_have_the_signal_by_rank(client, ranks):
    ranks[1].publish(
        running=3, preemptions=2, computed_tokens=99, step_time=StepTime(base_s=0.5, prefill_s=0.25, decode_s=0.125)
    )
    text = await (await client.get("/metrics")).text()
    for row in (
        'moeserving_engine_phase{engine="e0",phase="ready"} 1.0',
        'moeserving_engine_accepting{engine="e0"} 1.0',
        'moeserving_engine_restarts_total{engine="e0"} 0.0',
        'moeserving_engine_running_requests{engine="e0",rank="1"} 3.0',
        'moeserving_engine_preemptions_total{engine="e0",rank="1"} 2.0',
        'moeserving_engine_computed_tokens_total{engine="e0",rank="1"} 99.0',
        'moeserving_engine_step_base_seconds{engine="e0",rank="1"} 0.5',
    ):
        assert row in text.splitlines()
    assert 'moeserving_engine_step_base_seconds{engine="e0",rank="0"}' not in text
    assert 'policy="sjf"' in text


async def test_records_of_an_engine_that_ended_are_not_read_as_those_of_the_next(client, ranks, agent):
    ranks[0].publish(running=9)
    os.kill(agent.supervisor.pid, 9)
    assert await until_restarted(agent) == 1
    assert (await (await client.get("/v1/state")).json())["ranks"] == []


async def test_an_unknown_watch_value_is_named(client):
    answer = await client.get("/v1/state?watch=yes")
    assert answer.status == 422
    assert (await answer.json())["errors"] == [{"path": "watch", "message": "unknown 'yes'; known: 0, 1"}]
