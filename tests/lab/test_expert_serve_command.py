"""The command of the bench of a real expert group, on stand-ins for group, agent and server."""

import asyncio
import json
import signal
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from moe_contract.experts_state import ExpertsState
from moe_contract.input_errors import InvalidInput
from moe_lab.experts import group as group_module
from moe_lab.experts import serve_command as command
from moe_lab.experts import serving
from moe_lab.experts.__main__ import app
from moe_lab.experts.group import NO_PREFIX_CACHE, SAMPLE, LocalGroup, edit_sample, plan_group, read_sample, standing
from moe_lab.experts.serving import measure_pairs
from moe_operator.api import load_resource
from moe_operator.local.failure import Failure
from moe_tools.deployment import find_checkout
from typer.testing import CliRunner

from tests.lab.expert_stand_ins import A, B, FakeGroup
from tests.operator.experts_documents import experts


@pytest.fixture(autouse=True)
def short(monkeypatch) -> None:
    monkeypatch.setattr(serving, "WARM_UP_S", 0.0)
    monkeypatch.setattr(serving, "LOOK_EVERY_S", 0.0)


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """With the samples and a folder that looks like a model."""
    (tmp_path / "manifests").mkdir()
    for name in ("local-cpu.yaml", SAMPLE.name):
        (tmp_path / "manifests" / name).write_text((find_checkout() / "manifests" / name).read_text())
    model = tmp_path / ".cache" / "models" / "tiny"
    model.mkdir(parents=True)
    (model / "config.json").write_text(json.dumps({"num_experts": 16}))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_resource_is_the_sample_that_only_observes_and_caches_no_prefix(checkout):
    plan = plan_group(None, interval_steps=200, window_steps=100)
    resource = load_resource(plan.manifest)
    assert plan.manifest.is_relative_to(checkout / ".cache")
    assert resource.spec.model.uri == f"file://{checkout / '.cache' / 'models' / 'tiny'}"
    expert = resource.spec.scheduling.expert
    assert resource.spec.scheduling.engine.policy == "roundRobin"
    assert (expert.mode, expert.interval, expert.window, expert.redundant_experts) == ("observe", 200, 100, 2)
    assert resource.spec.engine.args[-1] == NO_PREFIX_CACHE
    assert plan.deployment.name == "tiny-experts"


def test_the_sample_stays_as_it_is():
    sample = read_sample(find_checkout())
    before = yaml.safe_dump(sample)
    edit_sample(sample, Path("/m"), 1, 1)
    assert yaml.safe_dump(sample) == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["missing"], "no such folder"),
        (["manifests"], "holds no model"),
        (["--topic", "pros"], "unknown 'pros'"),
        (["--users", "500"], "128"),
        (["--start", "crowd"], "crowded"),
    ],
)
def test_what_cannot_be_measured_is_reported_before_anything_starts(checkout, monkeypatch, words, message):
    monkeypatch.setattr(group_module, "served", None)
    answer = CliRunner().invoke(app, ["serve", *words])
    assert answer.exit_code == 2
    assert message in answer.output
    assert "Traceback" not in answer.output


def stand(monkeypatch, group: FakeGroup) -> list[str]:
    """The command, on a stand-in; what was started and stopped."""
    events = []

    @contextmanager
    def fake_standing(plan, say):
        events.append("up")
        try:
            yield group
        finally:
            events.append("down")

    async def prepare(*_):
        return None

    monkeypatch.setattr(command, "standing", fake_standing)
    monkeypatch.setattr(command, "prepare_waves", prepare)
    monkeypatch.setattr(serving, "run_wave", group.serve)
    return events


def test_the_command_measures_prints_and_writes(checkout, monkeypatch):
    events = stand(monkeypatch, FakeGroup(plans=[("moved", B)]))
    answer = CliRunner().invoke(app, ["serve", "--pairs", "2", "--window-s", "1", "--active-s", "0.1", "--json", "o"])
    assert answer.exit_code == 0, answer.output
    assert events == ["up", "down"]
    assert "B's steps are shorter" in answer.output
    assert json.loads((checkout / "o").read_text())["environment"]["python"]


def test_a_failure_is_reported_in_a_line_and_all_is_stopped(checkout, monkeypatch):
    group = FakeGroup()
    events = stand(monkeypatch, group)

    async def gone():
        raise Failure("tiny-experts-engine-0: its agent cannot be reached")

    group.look = gone
    answer = CliRunner().invoke(app, ["serve"])
    assert answer.exit_code == 1
    assert "cannot be reached" in answer.output
    assert events == ["up", "down"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_stops_all(checkout, monkeypatch, number):
    group = FakeGroup()
    events = stand(monkeypatch, group)

    async def interrupted(*_):
        signal.raise_signal(number)
        await asyncio.sleep(60)

    monkeypatch.setattr(serving, "run_wave", interrupted)
    answer = CliRunner().invoke(app, ["serve"])
    assert answer.exit_code != 0
    assert events == ["up", "down"]


def test_the_group_gets_directives_through_its_agent(monkeypatch):
    document, asked = ExpertsState.model_validate(experts()), []
    agent = group_module.Agent(engine="tiny-engine-0", url="http://127.0.0.1:7")
    reached = group_module.Reached(name="tiny", agents=(agent,), tokens=("t",))

    async def fetch(_):
        return {"tiny-engine-0": document}

    async def send(*words):
        asked.append(words)

    async def call(endpoint, method, path, body=None):
        return {"ranks": [{"step": 3}, {"step": 7}]}

    monkeypatch.setattr(group_module, "fetch_experts", fetch)
    monkeypatch.setattr(group_module, "send_directive", send)
    monkeypatch.setattr(group_module, "call_json", call)
    local = LocalGroup(deployment=None, reached=reached)
    assert asyncio.run(local.look()) is document
    assert asyncio.run(local.read_steps()) == 7
    asyncio.run(local.apply(B))
    assert asked == [(agent, ("t",), {"action": "apply", "physical_to_logical": [list(row) for row in B]})]


def test_a_group_that_does_not_start_is_taken_down(checkout, monkeypatch):
    calls = []

    class Done:
        returncode = 1

    def run(words, check):
        calls.append(words[1])
        return Done()

    monkeypatch.setattr("subprocess.run", run)
    plan = plan_group(None, interval_steps=1, window_steps=1)
    with pytest.raises(InvalidInput, match="up failed"), standing(plan, lambda _: None):
        raise AssertionError("does not get here")
    assert calls == ["up", "down"]


def test_pairs_none_give_none():
    assert asyncio.run(measure_pairs(FakeGroup(), None, (A, B), 0, 1, print)) == ()
