"""What the operator plans is what agents and gateways load, as files and as control bodies."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from moe_contract.agent_config import load_agent_config, parse_agent_settings
from moe_contract.engine_process import (
    ENGINE_NOTICE_S,
    engine_environment,
    engine_grace_s,
    gateway_grace_s,
    share_environment,
)
from moe_contract.gateway_config import initial_settings, load_gateway_config, parse_gateway_settings
from moe_contract.input_errors import InputError, InvalidInput, error_document, read_error_document
from moe_operator.api import parse_resource
from moe_operator.local.change import _agent_settings
from moe_operator.plan import LocalSite, Observed, plan_local
from moe_operator.plan.cluster import plan_cluster
from moe_operator.plan.names import CONFIG
from moe_operator.plan.pods import Defaults
from moe_operator.plan.written_settings import differs_from

SAMPLES = sorted((Path(__file__).parents[2] / "manifests").glob("*.yaml"))
CHANGED = {
    "request": {"policy": "fcfs", "ageingHorizon": "3s"},
    "engine": {"policy": "leastRequests", "staleAfter": "700ms"},
    "expert": {"mode": "observe", "window": 17},
}


def sample(path: Path) -> Any:
    (document,) = yaml.safe_load_all(path.read_text().replace("file://..", "file:///m"))
    spec = document["spec"]
    scheduling = {name: spec.get("scheduling", {}).get(name, {}) | changed for name, changed in CHANGED.items()}
    return parse_resource(document | {"spec": spec | {"scheduling": scheduling}})


def annotations(objects: Any) -> list[str]:
    """The configuration files in the pod templates of a plan."""
    found = []
    for part in objects.values() if isinstance(objects, dict) else objects if isinstance(objects, list | tuple) else ():
        found += annotations(part)
    return found + ([objects[CONFIG]] if isinstance(objects, dict) and CONFIG in objects else [])


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.stem)
def test_the_files_of_a_cluster_and_the_settings_over_them_are_loaded(tmp_path: Path, path: Path) -> None:
    resource = sample(path)
    plan = plan_cluster(resource, "ns", Observed(tokens=("t",)), Defaults())
    (settings,) = [row for row in plan.objects if row["kind"] == "ConfigMap"]
    texts = [json.loads(text) for text in annotations(plan.objects)]
    assert texts
    for text in texts:
        laid = tmp_path / "settings.json"
        is_agent = "engine" in text
        laid.write_text(settings["data"]["request.json" if is_agent else "gateway.json"])
        (file := tmp_path / "config.json").write_text(json.dumps(text | {"settings_file": str(laid)}))
        config: Any = load_agent_config(file) if is_agent else load_gateway_config(file)
        assert (config.request.policy, config.request.ageing_horizon_s) == ("fcfs", 3.0)
        if not is_agent:
            assert (config.dispatch.policy, config.dispatch.stale_after_s) == ("leastRequests", 0.7)
        elif resource.spec.engine.parallelism.expert:
            assert (config.expert.mode, config.expert.window_steps) == ("observe", 17)


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.stem)
def test_the_control_bodies_of_a_cluster_are_what_peers_take(path: Path) -> None:
    plan = plan_cluster(sample(path), "ns", Observed(tokens=("t",)), Defaults())
    texts = [json.loads(text) for text in annotations(plan.objects)]
    agent = next(text for text in texts if "engine" in text)
    gateway = next(text for text in texts if "engine" not in text)
    from moe_contract.agent_config import AgentConfig
    from moe_contract.gateway_config import GatewayConfig

    taken = parse_agent_settings(plan.agent, AgentConfig.model_validate(agent).settings)
    assert taken.request.policy == "fcfs"
    body = {
        "request": dict(plan.request),
        "dispatch": dict(plan.dispatch),
        "groups": [group.model_dump(mode="json") for group in plan.groups],
    }
    settings = parse_gateway_settings(body, initial_settings(GatewayConfig.model_validate(gateway)))
    assert settings.groups == plan.groups
    assert set(settings.document()) == set(body)
    assert not differs_from(body, settings.document())


def test_the_files_and_control_bodies_of_one_machine_are_loaded(tmp_path: Path) -> None:
    resource = sample(next(path for path in SAMPLES if path.stem == "local-cpu"))
    site = LocalSite(
        state_dir=tmp_path, token_file=tmp_path / "token", ports=tuple(range(9000, 9050)), cpus=64, memory_bytes=2**40
    )
    plan = plan_local(resource, site)
    (file := tmp_path / "gateway.json").write_text(plan.gateway.model_dump_json())
    assert load_gateway_config(file) == plan.gateway
    for agent in plan.agents:
        (file := tmp_path / "agent.json").write_text(agent.model_dump_json())
        loaded = load_agent_config(file)
        assert loaded == agent
        assert parse_agent_settings(json.loads(json.dumps(_agent_settings(agent))), loaded.settings) == agent.settings


def test_no_variable_is_computed_by_plan_and_agent_and_the_plans_wins(tmp_path: Path) -> None:
    resource = sample(next(path for path in SAMPLES if path.stem == "local-cpu"))
    site = LocalSite(
        state_dir=tmp_path, token_file=tmp_path / "token", ports=tuple(range(9000, 9050)), cpus=64, memory_bytes=2**40
    )
    agent = plan_local(resource, site).agents[0]
    bare = agent.model_copy(update={"engine": agent.engine.model_copy(update={"env": {}})})
    by_agent = engine_environment(bare, {}, cpu_build=True, cpus=64)
    assert set(agent.engine.env) & set(by_agent) == {"OMP_NUM_THREADS"}
    assert (
        engine_environment(agent, {}, cpu_build=True, cpus=64)["OMP_NUM_THREADS"] == agent.engine.env["OMP_NUM_THREADS"]
    )
    assert share_environment(threads=None, gpus=(), hub_cache=None) == {}


def test_a_pod_has_time_for_its_notice_its_streams_and_its_engines_end() -> None:
    assert engine_grace_s(119.5) == ENGINE_NOTICE_S + 120 + 11 + 10
    assert gateway_grace_s(119.5) == 5 + 120 + 10


def test_the_errors_of_a_refusal_are_read_as_they_were_written() -> None:
    rows = (InputError("request.policy", "unknown 'x'"), InputError("", "not JSON"))
    assert read_error_document(json.loads(json.dumps(error_document(rows)))) == rows
    for broken in (None, [], {}, {"errors": 3}, {"errors": [{}]}, {"errors": [1]}):
        with pytest.raises(ValueError, match="no error document"):
            read_error_document(broken)


def test_a_settings_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    config = {"run_dir": "/r", "listen": {"port": 1}, "token_file": "/t", "settings_file": str(tmp_path)}
    engine = {"port": 2, "model": "m", "served_name": "m"}
    (file := tmp_path / "agent.json").write_text(json.dumps(config | {"engine": engine}))
    with pytest.raises(InvalidInput, match=r"settings_file: cannot read .*: Is a directory"):
        load_agent_config(file)
