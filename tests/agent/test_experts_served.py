"""An expert group's first rank and its agent, over real records and files: settings and directives in, document out.

The other ranks are played: they count what `HOT` says, and move what each content says.
"""

import asyncio
import base64
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from moe_agent.api.server import AgentServer
from moe_agent.experts.bookkeeping import DecisionOutcome
from moe_agent.experts.coordinator import Coordinator, checksum
from moe_agent.experts.directive import GroupShape, directive_path
from moe_agent.experts.document import PublishedExperts, as_of, experts_path
from moe_agent.experts.load import AFFINITY_PASSES, RankLoadReport
from moe_agent.experts.planning import MeasuredCosts, PlanRequest, PlanResult
from moe_agent.experts.sync_round import RoundAction
from moe_agent.shared_memory.control_record import Control, ControlRecordReader, ControlRecordWriter, SettingsPublisher
from moe_agent.shared_memory.rank_record import RankRecords
from moe_agent.supervisor.supervisor import EngineSupervisor
from moe_contract.agent_config import AgentConfig
from moe_contract.control_tokens import ControlTokens
from moe_contract.experts_state import read_experts
from moe_scheduling.expert.decision import ExpertMode, ExpertSettings
from moe_scheduling.request.order import RequestSettings

TOKEN = "secret-token"
BEARER = {"Authorization": f"Bearer {TOKEN}"}
SHAPE = GroupShape(ranks=2, nodes=1, layers=3, experts=4, slots_per_rank=3)
START = np.tile(np.array([0, 1, 2, 3, 0, 1]), (SHAPE.layers, 1))
BETTER = np.tile(np.array([0, 3, 2, 1, 0, 2]), (SHAPE.layers, 1))
MOVES = 2 * SHAPE.layers
COSTS = MeasuredCosts(token_s=1e-6, remote_token_s=0.0, internode_token_s=0.0, move_s=0.001)
HOT = np.array([9, 0, 0, 1])


def decide(request: PlanRequest) -> PlanResult:
    return PlanResult(
        pays=True,
        stay_reason="",
        reason="pays",
        placement=BETTER,
        gain_s=0.001,
        cost_s=0.01,
        balance_before=1.8,
        balance_after=1.1,
        seconds=0.002,
    )


class Engine:
    """The first rank as a worker runs it, and the others as it sees them; a step is a call."""

    def __init__(self, run_dir: Path, decide: Callable[[PlanRequest], PlanResult] = decide) -> None:
        self.first = Coordinator(run_dir, SHAPE, START, COSTS, decide)
        self.published = PublishedExperts(run_dir)
        self.held = START.copy()
        self.step, self.next_round, self.counted = 0, 1, 0
        self.recording = False
        self.reports: list[RankLoadReport] | None = None

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.step += 1
            self.counted += self.recording
            if self.first.wants_routing:
                self.first.add_routing(lambda: np.tile(np.array([[0, 3]]), (SHAPE.layers, 5, 1)))
            if self.step == self.next_round:
                self._sync()

    def _sync(self) -> None:
        if self.reports is not None:
            self.first.controller.gathered(self.reports)
            self.reports = None
        content = self.first.sync_round(self.step)
        self.recording, self.next_round = content.recording, self.step + content.next_in
        controller = self.first.controller
        if content.action is RoundAction.GATHER:
            tokens = np.tile(HOT * self.counted, (SHAPE.layers, 1))
            report = RankLoadReport(tokens=tokens, passes=self.counted, checksum=checksum(self.held))
            self.counted, self.reports = 0, [report] * SHAPE.ranks
        elif content.action is RoundAction.MOVE:
            layers, rows = controller.move_rows()
            self.held[list(layers)] = rows
            controller.moved(0.001, True)

    def run_until(self, condition: Callable[[Any], bool]) -> Any:
        """Steps until the published document fulfils the condition."""
        end_s = time.monotonic() + 30
        while time.monotonic() < end_s:
            self.run(10)
            document = self.published.read(time.monotonic())
            if document is not None and condition(document):
                return document
            time.sleep(0.002)
        raise AssertionError(f"never so: {document}")


class Agent:
    """The agent's parts around an engine that is played."""

    def __init__(self, folder: Path, *, group: bool = True) -> None:
        engine = {"port": 1, "model": "m", "served_name": "fake", "data_parallel": 2, "expert_parallel": group}
        settings = {"mode": "dryRun", "interval_steps": 64, "window_steps": 32}
        self.config = AgentConfig.model_validate(
            {
                "name": "e0",
                "run_dir": folder,
                "listen": {"port": 1},
                "token_file": folder / "token",
                "engine": engine,
                "expert": settings,
            }
        )
        (folder / "token").write_text(TOKEN)
        records = RankRecords(folder, range(2))
        self.control = SettingsPublisher(folder, self.config.request, self.config.expert, records)
        supervisor = EngineSupervisor(self.config.engine, [sys.executable], dict(os.environ), folder / "engine.log")
        self.experts = PublishedExperts(folder) if group else None
        tokens = ControlTokens(folder / "token")
        self.server = AgentServer(self.config, tokens, supervisor, records, self.control, self.experts, asyncio.Event())


@pytest.fixture
def agent(tmp_path: Path) -> Agent:
    return Agent(tmp_path)


@pytest.fixture
def engine(agent: Agent) -> Engine:
    return Engine(agent.config.run_dir)


@pytest.fixture
async def client(agent: Agent) -> AsyncIterator[TestClient[web.Request, web.Application]]:
    async with TestClient(TestServer(agent.server.build_app())) as made:
        yield made


async def post(client: Any, body: Any) -> tuple[int, Any]:
    answer = await client.post(
        "/v1/experts", headers=BEARER, data=body if isinstance(body, bytes) else json.dumps(body)
    )
    return answer.status, await answer.json()


async def test_the_document_has_the_fields_of_the_contract(client, engine):
    engine.run_until(lambda document: document["decisions"])
    document = await (await client.get("/v1/experts")).json()
    assert document.keys() == {
        *("mode", "ranks", "nodes", "layers", "experts", "slots_per_rank", "step", "placement", "load", "balance"),
        *("remote_fraction", "costs", "decisions", "totals", "affinity", "problems"),
    }
    assert document["placement"].keys() == {"version", "directive", "physical_to_logical"}
    assert document["load"].keys() == {"steps", "tokens", "hottest", "sizes"}
    assert document["balance"].keys() == {"mean", "worst", "by_layer", "by_rank"}
    assert document["decisions"][0].keys() == {
        *("number", "step", "age_s", "outcome", "reason", "moves", "predicted_gain_s", "measured_gain_s", "cost_s"),
        *("balance_before", "balance_after", "seconds", "physical_to_logical"),
    }
    assert document["totals"].keys() == {"moves", "decisions", "stayed", "lost_s", "won_s"}
    assert np.array(document["load"]["tokens"]).shape == (2, 3, 4)
    assert document["load"]["tokens"][1][2] == pytest.approx(HOT.tolist())
    assert document["load"]["hottest"][0] == {"layer": 0, "expert": 0, "tokens": pytest.approx(18.0)}
    assert document["placement"]["physical_to_logical"] == START.tolist()


async def test_the_brief_form_has_nothing_that_grows_with_the_model(client, engine):
    engine.run_until(lambda document: document["decisions"])
    document = await (await client.get("/v1/experts?brief=1")).json()
    assert "physical_to_logical" not in json.dumps(document)
    assert "tokens" not in document["load"]
    assert document["load"]["hottest"]
    assert document["decisions"][0]["moves"] == MOVES
    assert (await client.get("/v1/experts?brief=yes")).status == 422


async def test_the_form_for_the_live_page_has_the_load_as_bytes(client, engine):
    engine.run_until(lambda document: document["decisions"])
    document = await (await client.get("/v1/experts?heat=1")).json()
    state = read_experts(json.dumps(document).encode())
    assert state.heat is not None
    assert "tokens" not in document["load"]
    by_expert = np.frombuffer(base64.b64decode(state.heat.by_expert), np.uint8)
    assert by_expert.reshape(3, 4)[0].argmax() == 0
    assert len(base64.b64decode(state.heat.by_rank)) == 3 * 2
    assert (await client.get("/v1/experts?heat=yes")).status == 422


def test_ages_go_on_after_the_writing():
    published = {"decisions": [{"age_s": 2.0}], "step": 1}
    assert as_of(published, 3.5) == {"decisions": [{"age_s": 5.5}], "step": 1}


async def test_affinity_is_recorded_on_request_alone(client, engine):
    document = engine.run_until(lambda document: document["decisions"])
    assert document["affinity"] is None
    assert not engine.first.wants_routing
    assert await post(client, {"action": "affinity"}) == (202, {"version": 1})
    document = engine.run_until(lambda document: (document["affinity"] or {}).get("passes") == AFFINITY_PASSES)
    affinity = document["affinity"]
    assert (affinity["directive"], affinity["wanted_passes"]) == (1, AFFINITY_PASSES)
    assert affinity["tokens"] == 5 * AFFINITY_PASSES
    # Every token takes the experts 0 and 3 in each layer: four pairs, as frequent as by chance.
    first = {(row["expert"], row["next"]): row for row in affinity["strongest"] if row["layer"] == 0}
    assert first.keys() == {(0, 0), (0, 3), (3, 0), (3, 3)}
    assert {row["over_chance"] for row in first.values()} == {1.0}
    assert {row["tokens"] for row in first.values()} == {5 * AFFINITY_PASSES}
    assert not engine.first.wants_routing
    assert document["placement"]["directive"] == 1


async def test_without_an_expert_group_there_is_nothing_to_show_or_to_ask(tmp_path):
    agent = Agent(tmp_path, group=False)
    async with TestClient(TestServer(agent.server.build_app())) as client:
        for answer in (await client.get("/v1/experts"), await client.post("/v1/experts", headers=BEARER, data="{}")):
            assert answer.status == 404
            assert "no expert group" in (await answer.json())["errors"][0]["message"]
        assert "moeserving_expert_" not in await (await client.get("/metrics")).text()


async def test_a_group_that_has_published_nothing_yet_says_so(client):
    answer = await client.get("/v1/experts")
    assert answer.status == 503
    assert (await post(client, {"action": "plan"}))[0] == 503


async def test_a_directive_needs_the_token(client, engine):
    assert (await client.post("/v1/experts", json={"action": "plan"})).status == 401


async def test_a_person_applies_a_placement_and_takes_it_back(client, engine):
    assert await post(client, {"action": "apply", "physical_to_logical": BETTER.tolist()}) == (202, {"version": 1})
    document = engine.run_until(lambda document: document["placement"]["version"] == 2)
    assert document["placement"] == {"version": 2, "directive": 1, "physical_to_logical": BETTER.tolist()}
    assert (engine.held == BETTER).all()
    assert document["totals"]["moves"] == MOVES
    assert await post(client, {"action": "rollback"}) == (202, {"version": 2})
    document = engine.run_until(lambda document: document["placement"]["version"] == 3)
    assert document["placement"]["physical_to_logical"] == START.tolist()


async def test_a_person_has_a_decision_made_now(client, engine, agent):
    await client.put("/v1/config", headers=BEARER, json={"expert": {"interval_steps": 10**6}})
    engine.run(20)
    assert (await post(client, {"action": "plan"}))[0] == 202
    document = engine.run_until(lambda document: document["decisions"])
    assert document["decisions"][0]["outcome"] == "dryRun"


@pytest.mark.parametrize(
    ("body", "path", "message"),
    [
        (b"{", "", "not JSON"),
        ({"action": "move"}, "action", "unknown 'move'; known: affinity, apply, plan, rollback"),
        ({}, "action", "required, but absent"),
        ({"action": "plan", "when": "now"}, "when", "unknown field"),
        ({"action": "apply"}, "physical_to_logical", "required for apply"),
        ({"action": "plan", "physical_to_logical": START.tolist()}, "physical_to_logical", "only apply takes it"),
        ({"action": "apply", "physical_to_logical": [[0]]}, "physical_to_logical", "3 layers are needed, got 1"),
        (
            {"action": "apply", "physical_to_logical": [[0, 1, 2, 3]] * 3},
            "physical_to_logical[0]",
            "6 slots are needed, got 4",
        ),
        (
            {"action": "apply", "physical_to_logical": [[0, 1, 2, 3, 4, 0]] * 3},
            "physical_to_logical[0]",
            "no expert 4; known: 0 to 3",
        ),
        (
            {"action": "apply", "physical_to_logical": [[0, 1, 2, 0, 1, 2]] * 3},
            "physical_to_logical[0]",
            "expert 3 has no slot",
        ),
        (
            {"action": "apply", "physical_to_logical": [[0, 1, 2, "3", 1, 2]] * 3},
            "physical_to_logical[0][3]",
            "input should be a valid integer",
        ),
    ],
)
async def test_a_bad_directive_is_named_and_changes_nothing(client, engine, agent, body, path, message):
    engine.run_until(lambda _: True)
    status, answer = await post(client, body)
    assert status == 422
    assert answer["errors"][0]["path"] == path
    assert answer["errors"][0]["message"].startswith(message)
    assert agent.control.control.directive == 0
    assert not directive_path(agent.config.run_dir).exists()


async def test_in_the_mode_off_there_is_nothing_to_ask(client, engine):
    engine.run_until(lambda _: True)
    await client.put("/v1/config", headers=BEARER, json={"expert": {"mode": "off"}})
    assert (await post(client, {"action": "plan"}))[0] == 409
    document = engine.run_until(lambda document: document["mode"] == "off")
    assert document["load"]["steps"] == 0.0


async def test_modes_are_switched_while_it_runs(client, engine):
    for mode in ("off", "observe", "active", "dryRun", "off"):
        await client.put("/v1/config", headers=BEARER, json={"expert": {"mode": mode}})
        document = engine.run_until(lambda document, mode=mode: document["mode"] == mode)
        assert engine.recording is (mode != "off")
    assert document["totals"]["decisions"].get("moved", 0) <= 1


async def test_the_metrics_have_balance_hottest_experts_moves_and_outcomes(client, engine):
    await post(client, {"action": "apply", "physical_to_logical": BETTER.tolist()})
    engine.run_until(lambda document: document["placement"]["version"] == 2 and document["load"]["steps"] > 0)
    await client.put("/v1/config", headers=BEARER, json={"expert": {"mode": "observe"}})
    engine.run_until(lambda document: document["mode"] == "observe")
    lines = (await (await client.get("/metrics")).text()).splitlines()
    names = {line.split("{")[0] for line in lines if line.startswith("moeserving_expert_")}
    for row in (
        'moeserving_expert_mode{engine="e0",mode="observe"} 1.0',
        'moeserving_expert_mode{engine="e0",mode="active"} 0.0',
        'moeserving_expert_placement_version{engine="e0"} 2.0',
        f'moeserving_expert_moves_total{{engine="e0"}} {float(MOVES)}',
        'moeserving_expert_decisions_total{engine="e0",outcome="applied"} 1.0',
        'moeserving_expert_hottest_expert{engine="e0",place="1"} 0.0',
        'moeserving_expert_problem{engine="e0",kind="version_skew"} 0.0',
        'moeserving_expert_stayed_total{engine="e0",reason="balanced"} 0.0',
    ):
        assert row in lines
    assert names >= {
        "moeserving_expert_balance_ratio",
        "moeserving_expert_pressure_ratio",
        "moeserving_expert_remote_ratio",
        "moeserving_expert_lost_seconds_total",
        "moeserving_expert_won_seconds_total",
    }
    assert sum(line.startswith("moeserving_expert_") for line in lines) < 100


def test_an_old_directive_is_not_followed_by_an_engine_that_starts_anew(tmp_path):
    directive_path(tmp_path).write_text(json.dumps({"version": 3, "action": "rollback"}))
    control = Control(version=5, request=RequestSettings(), expert=ExpertSettings(), directive=3)
    with ControlRecordWriter(tmp_path, control), ControlRecordReader(tmp_path):
        engine = Engine(tmp_path)
        engine.run(100)
    assert not engine.first.controller.bookkeeping.rows
    assert engine.first.controller.pending.settled == 3


@pytest.mark.parametrize("content", [None, "", "[]", '{"action": "apply"}', '{"version": 4, "action": "apply"}'])
def test_a_directive_file_that_is_none_ends_with_the_reason(tmp_path, content):
    settings = ExpertSettings(mode=ExpertMode.OBSERVE)
    with ControlRecordWriter(tmp_path, Control(version=1, request=RequestSettings(), expert=settings)) as record:
        engine = Engine(tmp_path)
        if content is not None:
            directive_path(tmp_path).write_text(content)
        record.write(Control(version=2, request=RequestSettings(), expert=settings, directive=4))
        engine.run(100)
    (row,) = engine.first.controller.bookkeeping.rows
    assert row.outcome is DecisionOutcome.FAILED
    assert row.reason.startswith("directive 4 cannot be followed: ")
    assert engine.first.controller.pending.settled == 4


def test_a_decision_that_fails_is_shown_with_its_reason(tmp_path):
    def fail(request: PlanRequest) -> PlanResult:
        raise ValueError("no such load")

    settings = ExpertSettings(mode=ExpertMode.DRY_RUN, interval_steps=50)
    with ControlRecordWriter(tmp_path, Control(version=1, request=RequestSettings(), expert=settings)):
        document = Engine(tmp_path, fail).run_until(lambda document: document["decisions"])
    assert document["decisions"][0]["outcome"] == "failed"
    assert "no such load" in document["decisions"][0]["reason"]


def test_what_an_engine_published_is_gone_with_it(tmp_path):
    with ControlRecordWriter(tmp_path, Control(version=1, request=RequestSettings())):
        engine = Engine(tmp_path)
        engine.run_until(lambda _: True)
    engine.published.forget()
    assert engine.published.read(0.0) is None
    assert not experts_path(tmp_path).exists()
