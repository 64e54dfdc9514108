"""The placement of experts in a cluster's plan: what rolls pods, what reaches those that run, what a canary keeps."""

import json
from typing import Any

import pytest
from moe_contract.agent_config import AgentConfig
from moe_operator.api import MoEServing, parse_resource
from moe_operator.plan import ClusterPlan, Defaults, Observed, plan_cluster
from moe_operator.plan.cluster import CANARY, STABLE
from moe_operator.plan.names import CONFIG
from moe_operator.plan.revision import Revision, at_revision, build_revision, parse_revision
from moe_scheduling.expert.decision import ExpertSettings

SPREAD = {"parallelism": {"data": 2, "expert": True}}


def resource(expert: dict[str, Any] | None = None, **engine: Any) -> MoEServing:
    spec: dict[str, Any] = {"model": {"uri": "hf://org/a"}, "engine": {**SPREAD, **engine}}
    if expert is not None:
        spec["scheduling"] = {"request": {"policy": "fcfs"}, "expert": expert}
    header = {"apiVersion": "moeserving.dev/v1alpha1", "kind": "MoEServing", "metadata": {"name": "a"}}
    return parse_resource({**header, "spec": spec})


def plan(wanted: MoEServing, stable: Revision | None = None) -> ClusterPlan:
    return plan_cluster(wanted, "default", Observed(tokens=("t",), stable=stable), Defaults())


def engine_template(planned: ClusterPlan, revision: str = STABLE) -> dict[str, Any]:
    name = planned.engines[revision]
    return next(
        entry["spec"]["template"]
        for entry in planned.objects
        if entry["kind"] == "Deployment" and entry["metadata"]["name"] == name
    )


def agent(planned: ClusterPlan, revision: str = STABLE) -> AgentConfig:
    return AgentConfig.model_validate_json(engine_template(planned, revision)["metadata"]["annotations"][CONFIG])


def settings_file(planned: ClusterPlan) -> dict[str, Any]:
    config_map = next(entry for entry in planned.objects if entry["kind"] == "ConfigMap")
    return json.loads(config_map["data"]["request.json"])


@pytest.mark.parametrize(
    "change", [{"mode": "active"}, {"mode": "off"}, {"interval": 7}, {"maxStall": "9ms"}, {"moveBudget": 3}]
)
def test_what_an_engine_takes_while_it_runs_rolls_no_pod(change: dict[str, Any]) -> None:
    before, after = plan(resource({})), plan(resource(change))
    assert engine_template(after) == engine_template(before)
    assert after.agent != before.agent
    assert settings_file(after) == after.agent, "a process that starts begins with the settings of the others"


def test_copies_of_experts_are_part_of_the_pod() -> None:
    before, after = plan(resource({})), plan(resource({"redundantExperts": 2}))
    assert agent(after).engine.redundant_experts == 2
    assert engine_template(after) != engine_template(before)
    assert after.agent == before.agent


def test_agents_get_settings_of_experts_only_where_these_are_spread() -> None:
    alone = resource({"mode": "active"}, parallelism={"data": 2})
    assert list(plan(alone).agent) == ["request"]
    assert ExpertSettings(**plan(resource({"mode": "active"})).agent["expert"]) == ExpertSettings(mode="active")  # type: ignore[arg-type]


def test_a_revision_without_copies_reads_as_it_did_before_there_were_any() -> None:
    assert build_revision(resource({"mode": "active"})).document.keys() == {"model", "engine"}
    assert build_revision(resource({"redundantExperts": 0})) == build_revision(resource())
    copied = build_revision(resource({"redundantExperts": 2}))
    assert copied.digest != build_revision(resource()).digest
    assert parse_revision(copied.text) == copied


def test_a_revision_has_its_own_copies_and_the_resources_settings() -> None:
    wanted = resource({"mode": "active", "redundantExperts": 4})
    old = at_revision(wanted, build_revision(resource())).spec.scheduling
    assert (old.expert.redundant_experts, old.expert.mode, old.request.policy) == (0, "active", "fcfs")
    back = at_revision(resource({"mode": "active"}), build_revision(wanted)).spec.scheduling
    assert back.expert.redundant_experts == 4
    assert at_revision(wanted, build_revision(wanted)) == wanted


def test_a_canary_may_try_other_copies_and_even_whether_experts_are_spread_at_all() -> None:
    canary = {"canary": {"weight": 10}}
    planned = plan(resource({"redundantExperts": 2}, **canary), stable=build_revision(resource()))
    assert agent(planned, STABLE).engine.redundant_experts == 0
    assert agent(planned, CANARY).engine.redundant_experts == 2
    alone = build_revision(resource(parallelism={"data": 2}))
    planned = plan(resource({"mode": "active", "redundantExperts": 2}, **canary), stable=alone)
    assert not agent(planned, STABLE).engine.expert_parallel
    assert agent(planned, CANARY).engine.expert_parallel


def test_what_was_written_down_and_is_no_revision_is_none() -> None:
    broken = {**build_revision(resource({"redundantExperts": 2})).document, "redundantExperts": "many"}
    assert parse_revision(json.dumps(broken)) is None
