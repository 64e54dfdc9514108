"""Prefill and decode apart: what the field `engine.roles` may say, and what is planned for it."""

import json
from io import StringIO
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_contract.agent_state import read_agent_state
from moe_contract.input_errors import InvalidInput
from moe_operator.api import MoEServing, parse_resource
from moe_operator.cli.plan import _example_ports
from moe_operator.cli.table import render_engines
from moe_operator.local import machine
from moe_operator.local.change import is_live
from moe_operator.local.report import Failed, build_status, judge_start
from moe_operator.plan import ClusterPlan, Defaults, LocalPlan, Observed, plan_cluster, plan_local, ports_needed
from moe_operator.plan.names import CONFIG, ROLE
from moe_operator.plan.one_node import find_one_node_claims
from moe_operator.plan.revision import build_revision
from moe_operator.plan.role_override import all_arguments
from moe_operator.plan.roles import share_replicas
from moe_scheduling.engine.disaggregation import EngineRole
from rich.console import Console
from test_local_decisions import NOW, agent, seen
from test_plan import site

PREFILL, DECODE = EngineRole.PREFILL, EngineRole.DECODE
FIXED = {"mode": "fixed", "prefill": 1, "decode": 2}
Document = dict[str, Any]


def resource(roles: Document | None = None, engine: Document | None = None, **spec: Any) -> MoEServing:
    said = {} if roles is None else {"roles": roles}
    spec = {"model": {"uri": "hf://org/a"}} | spec
    return parse_resource(
        {
            "apiVersion": "moeserving.dev/v1alpha1",
            "kind": "MoEServing",
            "metadata": {"name": "a"},
            "spec": {"engine": said | (engine or {}), **spec},
        }
    )


def plan(wanted: MoEServing, **observed: Any) -> ClusterPlan:
    return plan_cluster(wanted, "ns", Observed(uid="u", tokens=("t",), **observed), Defaults())


def of_kind(planned: ClusterPlan, kind: str) -> dict[str, Document]:
    return {entry["metadata"]["name"]: entry for entry in planned.objects if entry["kind"] == kind}


def config_of(workload: Document) -> Document:
    text = workload["spec"]["template"]["metadata"]["annotations"][CONFIG]
    return dict(json.loads(text))


# 1. What may be said.


@pytest.mark.parametrize(
    ("roles", "engine", "spec", "path", "words"),
    [
        ("auto", {}, {}, "spec.engine.roles", "a mapping of fields is needed, got 'auto'"),
        ({"mode": "split"}, {}, {}, "spec.engine.roles.mode", "known: auto, fixed, unified"),
        ({"mode": "fixed"}, {}, {}, "spec.engine.roles.mode", "needs prefill and decode"),
        ({"mode": "fixed", "prefill": 1}, {}, {}, "spec.engine.roles.mode", "needs prefill and decode"),
        ({"mode": "auto", "decode": 1}, {}, {}, "spec.engine.roles.mode", "no other mode has them"),
        ({"prefill": 1, "decode": 1}, {}, {}, "spec.engine.roles.mode", "no other mode has them"),
        ({**FIXED, "prefill": 0}, {}, {}, "spec.engine.roles.prefill", "1"),
        (FIXED, {"replicas": 2}, {}, "spec.engine.replicas", "leave replicas out"),
        (FIXED, {}, {"autoscaling": {"targets": {"kvUsage": 0.8}}}, "spec.autoscaling", "autoscaling.roles"),
        ({"mode": "auto"}, {"parallelism": {"data": 4, "nodes": 2}}, {}, "spec.engine.parallelism.nodes", "unified"),
        ({"mode": "auto"}, {"args": ["--kv-transfer-config={}"]}, {}, "spec.engine.args", "beside roles"),
        ({"mode": "auto"}, {"args": ["--kv_offloading-size=4"]}, {}, "spec.engine.args", "beside roles"),
        (FIXED, {"args": ["-x", "--kv_transfer_config.kv_role=kv_both"]}, {}, "spec.engine.args", "beside roles"),
    ],
)
def test_what_cannot_be_is_refused_by_its_path(roles, engine, spec, path, words):
    with pytest.raises(InvalidInput) as caught:
        resource(roles, engine, **spec)
    assert [(row.path, words in row.message) for row in caught.value.errors] == [(path, True)]


@pytest.mark.parametrize(
    ("roles", "engine", "count"),
    [
        (None, {"replicas": 3}, 3),
        ({"mode": "auto"}, {"replicas": 3}, 3),
        (FIXED, {}, 3),
        (FIXED, {"replicas": 1}, 3),
        (FIXED, {"replicas": 3}, 3),
        (None, {"args": ["--kv-transfer-config={}"]}, 1),
    ],
)
def test_the_engines_are_those_of_all_roles(roles, engine, count):
    wanted = resource(roles, engine)
    assert wanted.spec.engine.count == count
    assert plan(wanted).replicas == count


# 2. In a cluster.


def test_without_roles_nothing_is_planned_otherwise():
    assert plan(resource()).objects == plan(resource({"mode": "unified"})).objects
    assert build_revision(resource()) == build_revision(resource(FIXED))


def test_with_auto_all_engines_are_alike_and_the_gateway_moves_roles():
    planned = plan(resource({"mode": "auto"}, {"replicas": 3}))
    workloads = of_kind(planned, "Deployment")
    assert workloads["a-engine"]["spec"]["replicas"] == 3
    assert config_of(workloads["a-engine"])["engine"]["kv_transfer"] == {"port": 13400}
    assert config_of(workloads["a-gateway"])["disaggregation"] == {}
    assert ROLE not in workloads["a-engine"]["spec"]["template"]["metadata"]["labels"]


def test_fixed_roles_are_two_deployments_behind_one_service():
    planned = plan(resource(FIXED))
    workloads, services = of_kind(planned, "Deployment"), of_kind(planned, "Service")
    assert sorted(workloads) == ["a-engine-decode", "a-engine-prefill", "a-gateway"]
    assert sorted(services) == ["a", "a-engine"]
    assert [group.service for group in planned.groups] == ["a-engine"]
    for role, number in ((PREFILL, 1), (DECODE, 2)):
        workload = workloads[f"a-engine-{role}"]
        labels = workload["spec"]["template"]["metadata"]["labels"]
        assert workload["spec"]["replicas"] == number
        assert labels[ROLE] == role
        assert workload["spec"]["selector"]["matchLabels"] == labels
        assert services["a-engine"]["spec"]["selector"].items() <= labels.items()
        assert config_of(workload)["engine"]["kv_transfer"] == {"port": 13400, "role": role}
    assert config_of(workloads["a-gateway"])["disaggregation"] == {"moves_roles": False}


@pytest.mark.parametrize("first_replicas", [None, 1])
def test_one_budget_selects_the_engines_of_both_roles_and_those_that_they_replace(first_replicas):
    planned = plan(resource(FIXED), first_replicas=first_replicas)
    budgets = of_kind(planned, "PodDisruptionBudget")
    labels = [
        workload["spec"]["template"]["metadata"]["labels"] for workload in of_kind(planned, "Deployment").values()
    ]
    unified = of_kind(plan(resource()), "Deployment")["a-engine"]["spec"]["template"]["metadata"]["labels"]
    engines = [row for row in [*labels, unified] if row["app.kubernetes.io/component"] == "engine"]
    assert len(engines) == 3
    for pod in engines:
        selectors = {name: row["spec"]["selector"]["matchLabels"] for name, row in budgets.items()}
        assert [name for name, selector in selectors.items() if selector.items() <= pod.items()] == ["a-engine"]
    assert budgets["a-engine"]["spec"]["maxUnavailable"] == 1


@pytest.mark.parametrize(("roles", "expected"), [(None, False), ({"mode": "auto"}, True), (FIXED, True)])
def test_engines_of_one_deployment_reach_each_other_where_blocks_travel(roles, expected):
    policy = of_kind(plan(resource(roles)), "NetworkPolicy")["a-engine"]
    peers = {"podSelector": {"matchLabels": policy["spec"]["podSelector"]["matchLabels"]}}
    assert ({"from": [peers]} in policy["spec"]["ingress"]) is expected
    assert policy["spec"]["podSelector"]["matchLabels"]["app.kubernetes.io/instance"] == "a"


def test_a_canary_of_fixed_roles_has_engines_of_both_behind_a_service_of_its_own():
    stable = build_revision(resource(FIXED))
    changed = resource(FIXED, {"args": ["--seed=2"], "canary": {"weight": 20, "replicas": 2}})
    planned = plan(changed, stable=stable)
    workloads, services = of_kind(planned, "Deployment"), of_kind(planned, "Service")
    assert [(group.service, group.weight) for group in planned.groups] == [("a-engine", 80), ("a-engine-canary", 20)]
    for role, number in ((PREFILL, 1), (DECODE, 2)):
        old, new = workloads[f"a-engine-{role}"], workloads[f"a-engine-canary-{role}"]
        assert (old["spec"]["replicas"], new["spec"]["replicas"]) == (number, 2)
        assert config_of(old)["engine"].get("args", []) == []
        assert config_of(new)["engine"]["args"] == ["--seed=2"]
        assert config_of(new)["engine"]["kv_transfer"]["role"] == role
        labels = new["spec"]["template"]["metadata"]["labels"]
        assert new["spec"]["selector"]["matchLabels"] == labels
        assert services["a-engine-canary"]["spec"]["selector"].items() <= labels.items()
        assert not services["a-engine"]["spec"]["selector"].items() <= labels.items()
        budgets = of_kind(planned, "PodDisruptionBudget")
        selectors = {name: row["spec"]["selector"]["matchLabels"] for name, row in budgets.items()}
        assert [name for name, found in selectors.items() if found.items() <= labels.items()] == ["a-engine-canary"]
    assert planned.replicas == 3, "those of a canary come on top"
    promoted = of_kind(plan(resource(FIXED, {"args": ["--seed=2"]}), stable=stable), "Deployment")
    assert sorted(promoted) == ["a-engine-decode", "a-engine-prefill", "a-gateway"]
    assert config_of(promoted["a-engine-decode"])["engine"]["args"] == ["--seed=2"]


def test_without_a_change_of_the_engines_a_canary_of_fixed_roles_has_none():
    planned = plan(resource(FIXED, {"canary": {"weight": 20}}), stable=build_revision(resource(FIXED)))
    assert sorted(of_kind(planned, "Deployment")) == ["a-engine-decode", "a-engine-prefill", "a-gateway"]


def test_another_number_of_a_role_is_no_new_template():
    before, after = (of_kind(plan(resource({**FIXED, "decode": number})), "Deployment") for number in (2, 5))
    assert before["a-engine-decode"]["spec"]["template"] == after["a-engine-decode"]["spec"]["template"]
    assert after["a-engine-decode"]["spec"]["replicas"] == 5
    assert before["a-engine-prefill"] == after["a-engine-prefill"]


def test_a_name_of_any_length_has_room_for_the_roles():
    document = resource(FIXED).model_dump(mode="json", by_alias=True, exclude_unset=True)
    document["metadata"]["name"] = "n" * 63
    names = [*of_kind(plan(parse_resource(document)), "Deployment")]
    assert len(set(names)) == 3
    assert max(map(len, names)) <= 46


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 90))
def test_engines_come_to_both_roles_in_turn(prefill, decode, total):
    planned = {PREFILL: prefill, DECODE: decode}
    now, next_one = share_replicas(planned, total), share_replicas(planned, total + 1)
    assert sum(now.values()) == min(total, prefill + decode)
    assert all(now[role] <= next_one[role] <= planned[role] for role in planned)
    if total >= 2:
        assert min(now.values()) >= min(1, total // max(prefill, decode))


def test_while_other_engines_serve_the_roles_grow_step_by_step():
    planned = plan(resource({**FIXED, "prefill": 2}), first_replicas=2)
    workloads = of_kind(planned, "Deployment")
    assert [workloads[f"a-engine-{role}"]["spec"]["replicas"] for role in (PREFILL, DECODE)] == [1, 1]
    assert planned.replicas == 4


# 3. On one machine.


def local(roles: Document | None, **engine: Any) -> LocalPlan:
    return plan_local(resource(roles, {"runtime": "vllm-cpu", **engine}), site(gpus=()))


def test_one_machine_has_an_agent_for_each_engine_of_each_role():
    planned = local(FIXED)
    transfers = [agent.engine.kv_transfer for agent in planned.agents]
    assert [transfer.role for transfer in transfers if transfer] == [PREFILL, DECODE, DECODE]
    ports = [transfer.port for transfer in transfers if transfer]
    others = {agent.listen.port for agent in planned.agents} | {agent.engine.port for agent in planned.agents}
    assert len({*ports} - others) == 3
    assert planned.gateway.disaggregation is not None
    assert not planned.gateway.disaggregation.moves_roles
    assert len(planned.gateway.engines) == 3


def test_one_machine_without_roles_is_as_before():
    planned = local(None, replicas=2)
    assert [agent.engine.kv_transfer for agent in planned.agents] == [None, None]
    assert planned.gateway.disaggregation is None
    assert ports_needed(resource(None, {"replicas": 2})) == 6


def test_an_engine_that_is_never_started_ends_the_wait_for_a_start():
    transfer = {"role": "prefill"}
    state = {"phase": "backoff", "engine": {"last_exit": "no connector"}, "kv_transfer": transfer}
    stuck = read_agent_state(json.dumps(state).encode())
    found = judge_start(seen(agent(), stuck), NOW)
    assert isinstance(found, Failed)
    assert found.reason == "no connector"
    rows = build_status(seen(agent(), stuck), NOW).engines
    assert [(row.role, row.transfers) for row in rows] == [(None, None), (PREFILL, 0)]
    table = Console(file=StringIO(), width=200)
    table.print(render_engines(rows))
    assert "prefill" in table.file.getvalue()  # type: ignore[attr-defined]


def test_roles_cannot_change_while_a_deployment_runs():
    before = resource(None, {"runtime": "vllm-cpu", "replicas": 3})
    machine_before = site(gpus=(), ports=tuple(range(20000, 20000 + ports_needed(before))))
    record: Any = SimpleNamespace(site=SimpleNamespace(ports=machine_before.ports))
    after = resource(FIXED, {"runtime": "vllm-cpu"})
    assert not is_live(plan_local(before, machine_before), after, None, record)  # type: ignore[arg-type]


def test_the_ports_of_the_ranks_of_engines_are_apart():
    found = machine.find_free_ranges(3, 4, without=(1,))
    ports = [port for first in found for port in range(first, first + 4)]
    assert len(set(ports)) == 12


@pytest.mark.parametrize("engine", [{"args": ["--kv-offloading-size=4"]}, {"parallelism": {"data": 2, "nodes": 2}}])
def test_a_canary_beside_engines_that_cannot_take_part_is_refused_as_the_canary(engine):
    stable = build_revision(resource(None, engine))
    with pytest.raises(InvalidInput) as caught:
        plan(resource({"mode": "auto"}, {"canary": {"weight": 10}}), stable=stable)
    (row,) = caught.value.errors
    assert row.path == "spec.engine.canary"
    assert "set weight to 100 or remove the canary" in row.message
    assert plan(resource({"mode": "auto"}), stable=stable).replicas == 1


@pytest.mark.parametrize("roles", [None, {"mode": "auto"}])
def test_the_example_ports_of_a_local_plan_are_apart(roles):
    wanted = resource(roles, {"replicas": 3, "parallelism": {"data": 4}})
    ports = _example_ports(wanted)
    assert len(ports) == ports_needed(wanted)
    taken = [*ports[:8], *(port + rank for port in ports[8:] for rank in range(4))]
    assert len(set(taken)) == len(taken)


# 5. What engines of one role have for themselves.

OVERRIDES: Document = {
    "prefill": {
        "resources": {"memory": "96Gi", "kvCacheMemory": "2Gi"},
        "args": ["--max-num-batched-tokens=16384"],
        "env": {"A": "prefill"},
        "podTemplate": {"spec": {"nodeSelector": {"gpu": "h100"}}},
    },
    "decode": {"podTemplate": {"spec": {"nodeSelector": {"gpu": "h200"}, "priorityClassName": None}}},
}
OF_ALL: Document = {
    "resources": {"memory": "64Gi", "gpuResource": "test/gpu"},
    "args": ["--max-num-batched-tokens=8192"],
    "env": {"A": "all", "B": "all"},
    "podTemplate": {"spec": {"nodeSelector": {"zone": "a"}, "priorityClassName": "high"}},
}


def with_overrides(overrides: Document, **engine: Any) -> MoEServing:
    return resource({**FIXED, "overrides": overrides}, engine)


def test_each_role_has_what_is_its_own_laid_over_what_all_have():
    workloads = of_kind(plan(with_overrides(OVERRIDES, **OF_ALL)), "Deployment")
    prefill, decode = (workloads[f"a-engine-{role}"]["spec"]["template"]["spec"] for role in (PREFILL, DECODE))
    assert prefill["nodeSelector"] == {"zone": "a", "gpu": "h100"}
    assert decode["nodeSelector"] == {"zone": "a", "gpu": "h200"}
    assert (prefill["priorityClassName"], "priorityClassName" in decode) == ("high", False)
    limits = [row["containers"][0]["resources"]["limits"] for row in (prefill, decode)]
    assert limits == [{"test/gpu": "1", "memory": "96Gi"}, {"test/gpu": "1", "memory": "64Gi"}]
    configs = [config_of(workloads[f"a-engine-{role}"])["engine"] for role in (PREFILL, DECODE)]
    own = ["--kv-cache-memory-bytes=2147483648", "--max-num-batched-tokens=8192", "--max-num-batched-tokens=16384"]
    assert configs[0]["args"] == own
    assert configs[1]["args"] == ["--max-num-batched-tokens=8192"]
    assert [row["env"] for row in configs] == [{"A": "prefill", "B": "all"}, {"A": "all", "B": "all"}]


def test_a_change_of_one_role_leaves_the_other_as_it_is():
    before, after = (
        of_kind(plan(with_overrides({"prefill": {"args": [f"--max-num-seqs={number}"]}})), "Deployment")
        for number in (8, 9)
    )
    assert before["a-engine-decode"] == after["a-engine-decode"]
    assert before["a-engine-prefill"]["spec"]["template"] != after["a-engine-prefill"]["spec"]["template"]
    assert build_revision(with_overrides(OVERRIDES)) == build_revision(resource(FIXED))


@pytest.mark.parametrize("overrides", [None, {}, {"prefill": {}}, {"prefill": None, "decode": {"resources": {}}}])
def test_without_anything_of_their_own_roles_are_planned_as_ever(overrides):
    assert plan(resource({**FIXED, "overrides": overrides})).objects == plan(resource(FIXED)).objects


@pytest.mark.parametrize(
    ("roles", "engine", "path", "words"),
    [
        ({"mode": "auto", "overrides": {}}, {}, "spec.engine.roles.overrides", "the mode fixed"),
        ({**FIXED, "overrides": {"prefil": {}}}, {}, "spec.engine.roles.overrides.prefil", "prefill"),
        (
            {**FIXED, "overrides": {"prefill": {"resources": {"memory": "lots"}}}},
            {},
            "spec.engine.roles.overrides.prefill.resources.memory",
            "64Gi",
        ),
        (
            {**FIXED, "overrides": {"decode": {"args": ["--port=1"]}}},
            {},
            "spec.engine.roles.overrides.decode.args[0]",
            "is set by the deployment",
        ),
        (
            {**FIXED, "overrides": {"decode": {"args": ["--kv-transfer-config={}"]}}},
            {},
            "spec.engine.roles.overrides.decode.args",
            "own KV connector",
        ),
        ({**FIXED, "overrides": {"decode": {"env": {"1": "x"}}}}, {}, "spec.engine.roles.overrides.decode.env", "name"),
        (
            {**FIXED, "overrides": {"decode": {"podTemplate": {"spec": {"nodeSelektor": {}}}}}},
            {},
            "spec.engine.roles.overrides.decode.podTemplate.spec.nodeSelektor",
            "nodeSelector",
        ),
        (
            {**FIXED, "overrides": {"decode": {"resources": {"cpu": "2"}}}},
            {},
            "spec.engine.roles.overrides",
            "vllm-cpu",
        ),
    ],
)
def test_an_override_that_cannot_be_is_refused_by_its_path(roles, engine, path, words):
    with pytest.raises(InvalidInput) as caught:
        resource(roles, engine)
    assert [(row.path, words in row.message) for row in caught.value.errors] == [(path, True)]


def test_an_override_that_takes_a_needed_part_away_is_refused_by_its_path():
    gone = {"spec": {"volumes": [{"name": "config", "$patch": "delete"}]}}
    with pytest.raises(InvalidInput) as caught:
        plan(with_overrides({"decode": {"podTemplate": gone}}))
    assert all(row.path.startswith("spec.engine.roles.overrides.decode.podTemplate") for row in caught.value.errors)


def test_on_one_machine_each_role_has_its_own_too():
    wanted = with_overrides(
        {"decode": {"resources": {"kvCacheMemory": "1Gi", "cpu": "2"}, "args": ["--max-num-seqs=9"]}},
        runtime="vllm-cpu",
        resources={"kvCacheMemory": "512Mi", "cpu": "1"},
    )
    ports = tuple(range(20000, 20000 + ports_needed(wanted)))
    planned = plan_local(wanted, site(ports=ports, cpus=5, memory_bytes=8 * 2**30))
    arguments = [row.engine.args for row in planned.agents]
    assert ["--max-num-seqs=9" in row for row in arguments] == [False, True, True]
    sizes = [2**29, 2**30, 2**30]
    assert [row[0] for row in arguments] == [f"--kv-cache-memory-bytes={size}" for size in sizes]
    assert [row.engine.env["OMP_NUM_THREADS"] for row in planned.agents] == ["1", "2", "2"]
    with pytest.raises(InvalidInput, match=r"needs 1 x 1 \+ 2 x 2 CPUs, the machine has 4"):
        plan_local(wanted, site(ports=ports, cpus=4, memory_bytes=8 * 2**30))


def test_claims_and_arguments_of_a_role_count_for_all():
    volumes = [{"name": "v", "persistentVolumeClaim": {"claimName": "mine"}}]
    wanted = with_overrides(
        {"decode": {"podTemplate": {"spec": {"volumes": volumes}}, "args": ["--reasoning-config={}"]}}
    )
    assert find_one_node_claims(wanted, frozenset({"mine", "other"})) == {"mine"}
    assert all_arguments(wanted) == ("--reasoning-config={}",)
