"""Offloaded KV blocks: what the field `engine.kvOffload` may say, and what is planned for it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_contract.input_errors import InvalidInput
from moe_operator.api.units import quantity_value
from moe_operator.plan import plan_local
from moe_operator.plan.kv_offload import rank_bytes
from moe_operator.plan.revision import build_revision
from test_plan import site
from test_roles import Document, config_of, of_kind, plan, resource

GI = 2**30
TIER = {"kvOffload": {"cpu": "64Gi"}}
FIXED = {"mode": "fixed", "prefill": 1, "decode": 2}


def pod_of(workload: Document) -> Document:
    return dict(workload["spec"]["template"]["spec"])


def shared_memory(pod: Document) -> str:
    return str(next(row for row in pod["volumes"] if row["name"] == "shm")["emptyDir"]["sizeLimit"])


# 1. What may be said.


@pytest.mark.parametrize(
    ("engine", "roles", "path", "words"),
    [
        ({"kvOffload": "64Gi"}, None, "spec.engine.kvOffload", "a mapping of fields is needed, got '64Gi'"),
        ({"kvOffload": {}}, None, "spec.engine.kvOffload.cpu", "required"),
        ({"kvOffload": {"cpu": "1Gi", "disk": "1Ti"}}, None, "spec.engine.kvOffload.disk", "known: cpu"),
        ({"kvOffload": {"cpu": "64GiB"}}, None, "spec.engine.kvOffload.cpu", "a quantity such as 64Gi"),
        ({"kvOffload": {"cpu": "1Mi"}}, None, "spec.engine.kvOffload.cpu", "from 64Mi to 100Ti"),
        (TIER | {"runtime": "vllm-cpu"}, None, "spec.engine.kvOffload", "GPUs alone; set runtime to vllm"),
        (TIER | {"resources": {"memory": "64Gi"}}, None, "spec.engine.kvOffload.cpu", "a part of resources.memory"),
        (TIER | {"resources": {"memory": 1024**3}}, None, "spec.engine.kvOffload.cpu", "a part of resources.memory"),
        (
            TIER | {"resources": {"memory": "128Gi"}},
            FIXED | {"overrides": {"decode": {"resources": {"memory": "32Gi"}}}},
            "spec.engine.kvOffload.cpu",
            "of each role's too",
        ),
        (TIER | {"args": ["--kv-transfer-config={}"]}, None, "spec.engine.args", "beside roles or kvOffload"),
        (TIER | {"args": ["--kv_offloading_size", "4"]}, None, "spec.engine.args", "beside roles or kvOffload"),
        (
            TIER | {"parallelism": {"tensor": 8, "nodes": 2}},
            None,
            "spec.engine.kvOffload",
            "the data-parallel ranks must divide by the nodes",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_its_path(engine, roles, path, words):
    with pytest.raises(InvalidInput) as caught:
        resource(roles, engine)
    assert any(row.path == path and words in row.message for row in caught.value.errors), caught.value.errors


@pytest.mark.parametrize(
    "engine",
    [
        TIER,
        TIER | {"resources": {"memory": "65Gi"}},
        TIER | {"parallelism": {"data": 16, "nodes": 2, "expert": True}},
        TIER | {"args": ["--max-model-len=4096"]},
    ],
)
@pytest.mark.parametrize("roles", [None, {"mode": "unified"}])
def test_what_can_be_is_taken(engine, roles):
    assert resource(roles, engine).spec.engine.kv_offload.cpu_bytes == 64 * GI


# 2. In a cluster.


def test_without_it_nothing_is_planned_otherwise():
    pod = pod_of(of_kind(plan(resource()), "Deployment")["a-engine"])
    assert shared_memory(pod) == "8Gi"
    assert "memory" not in pod["containers"][0]["resources"]["requests"]
    assert "kv_offload_bytes" not in config_of(of_kind(plan(resource()), "Deployment")["a-engine"])["engine"]


def test_a_pod_has_room_for_the_tier_in_shared_memory_and_asks_for_its_memory():
    workload = of_kind(plan(resource(None, TIER)), "Deployment")["a-engine"]
    assert shared_memory(pod_of(workload)) == "72Gi"
    resources = pod_of(workload)["containers"][0]["resources"]
    assert resources["requests"]["memory"] == "64Gi"
    assert "memory" not in resources["limits"], "the tier says nothing of what the rest of the engine needs"
    assert config_of(workload)["engine"]["kv_offload_bytes"] == 64 * GI


def test_the_tier_is_a_part_of_the_memory_that_is_said():
    said = TIER | {"resources": {"memory": "100Gi", "sharedMemory": "16Gi"}}
    pod = pod_of(of_kind(plan(resource(None, said)), "Deployment")["a-engine"])
    assert pod["containers"][0]["resources"]["requests"]["memory"] == "100Gi"
    assert pod["containers"][0]["resources"]["limits"]["memory"] == "100Gi"
    assert shared_memory(pod) == "80Gi"


@given(
    st.sampled_from([(1, 1), (4, 1), (8, 2), (16, 4), (6, 3)]),
    st.sampled_from([1, 2, 8]),
    st.integers(64 * 2**20, 2**42),
)
def test_the_ranks_of_a_pod_have_equal_parts_that_fit_into_it(shape, tensor, tier):
    data, nodes = shape
    wanted = resource(
        None, {"kvOffload": {"cpu": tier}, "parallelism": {"data": data, "nodes": nodes, "tensor": tensor}}
    )
    each = rank_bytes(wanted)
    assert each is not None
    ranks = data // nodes
    assert tier - ranks < each * ranks <= tier


@pytest.mark.parametrize("roles", [{"mode": "auto"}, FIXED])
def test_engines_that_exchange_blocks_offload_them_too(roles):
    workloads = of_kind(plan(resource(roles, TIER)), "Deployment")
    engines = [config_of(row)["engine"] for name, row in workloads.items() if name != "a-gateway"]
    assert len(engines) == (2 if roles is FIXED else 1)
    for engine in engines:
        assert engine["kv_offload_bytes"] == 64 * GI
        assert engine["kv_transfer"]["port"] == 13400


def test_only_a_start_can_change_it():
    assert build_revision(resource()) != build_revision(resource(None, TIER))


@pytest.mark.parametrize("size", ["64Gi", "1.5Gi", "100G", 68719476736])
def test_the_size_of_shared_memory_is_the_sum_whatever_the_units(size):
    wanted = resource(None, {"kvOffload": {"cpu": size}, "resources": {"sharedMemory": "16G"}})
    pod = pod_of(of_kind(plan(wanted), "Deployment")["a-engine"])
    assert quantity_value(shared_memory(pod)) == 16 * 10**9 + quantity_value(str(size))


# 3. On one machine.


def test_on_one_machine_each_engine_has_its_tier():
    wanted = resource(None, {"kvOffload": {"cpu": "2Gi"}, "replicas": 2, "parallelism": {"data": 2}})
    found = plan_local(wanted, site(memory_bytes=8 * GI))
    assert [agent.engine.kv_offload_bytes for agent in found.agents] == [GI, GI]


def test_tiers_that_the_machine_has_no_memory_for_are_refused():
    wanted = resource(None, {"kvOffload": {"cpu": "4Gi"}, "replicas": 2})
    with pytest.raises(InvalidInput) as caught:
        plan_local(wanted, site(memory_bytes=8 * GI))
    (error,) = caught.value.errors
    assert error.path == "spec.engine.kvOffload.cpu"
    assert error.message == "needs 2 x 4Gi and more, the machine has 8.0Gi"
