"""The plan for one machine: the samples against goldens, the shares of the machine, and what a machine cannot give.

`python tests/operator/test_plan.py` writes the goldens anew.
"""

from pathlib import Path
from typing import Any

import pytest
import yaml
from moe_contract.agent_config import AgentConfig
from moe_contract.engine_process import engine_environment
from moe_contract.gateway_config import ContinuedStreams, GatewayConfig, Limits
from moe_contract.input_errors import InvalidInput
from moe_operator.api import MoEServing, load_resource, parse_resource
from moe_operator.cli.plan import render_local
from moe_operator.local.model import find_uneven, read_experts
from moe_operator.plan import LocalPlan, LocalSite, plan_local, ports_needed
from moe_operator.plan.ignored import find_idle
from moe_scheduling.expert.decision import ExpertMode, ExpertSettings

ROOT = Path(__file__).parents[2]
SAMPLES = sorted((ROOT / "manifests").glob("*.yaml"))
GOLDENS = Path(__file__).parent / "goldens" / "local"
GIB = 1 << 30
NOT_ON_ONE_MACHINE = {
    "cluster-cpu": "spec.model.uri: pvc:// is only for a cluster; on one machine name the folder with file://",
    "deepseek-v3": "spec.engine.parallelism.nodes: more than one node is only for a cluster",
}
LOCAL_SAMPLES = [path for path in SAMPLES if path.stem not in NOT_ON_ONE_MACHINE]


def site(**changes: Any) -> LocalSite:
    values = {
        "state_dir": Path("/state"),
        "token_file": Path("/state/token"),
        "ports": tuple(range(20000, 20600)),
        "cpus": 8,
        "memory_bytes": 64 * GIB,
        "gpus": tuple(map(str, range(16))),
    }
    return LocalSite(**(values | changes))


def resource(**spec: Any) -> MoEServing:
    return parse_resource(
        {
            "apiVersion": "moeserving.dev/v1alpha1",
            "kind": "MoEServing",
            "metadata": {"name": "a"},
            "spec": {"model": {"uri": "hf://org/a"}, **spec},
        }
    )


def cpu_plan(machine: LocalSite | None = None, **engine: Any) -> LocalPlan:
    return plan_local(resource(engine={"runtime": "vllm-cpu", **engine}), machine or site(gpus=()))


def refusal(wanted: MoEServing, machine: LocalSite) -> str:
    with pytest.raises(InvalidInput) as caught:
        plan_local(wanted, machine)
    return str(caught.value)


def render_sample(path: Path) -> str:
    return render_local(plan_local(load_resource(path), site())).replace(str(ROOT), "/repository")


@pytest.mark.parametrize("path", LOCAL_SAMPLES, ids=lambda path: path.stem)
def test_the_plan_of_a_sample_is_its_golden(path: Path) -> None:
    assert render_sample(path) == (GOLDENS / path.name).read_text(encoding="utf-8")


def test_the_samples_and_their_goldens_are_the_same_set() -> None:
    assert [path.name for path in LOCAL_SAMPLES] == sorted(path.name for path in GOLDENS.iterdir())
    assert {"minimal.yaml", "local-cpu.yaml", "qwen3-30b-a3b.yaml", "deepseek-v3.yaml"} <= {
        path.name for path in SAMPLES
    }


@pytest.mark.parametrize("name", NOT_ON_ONE_MACHINE)
def test_a_sample_for_a_cluster_is_refused_on_one_machine(name: str) -> None:
    assert refusal(load_resource(ROOT / "manifests" / f"{name}.yaml"), site()) == NOT_ON_ONE_MACHINE[name]


@pytest.mark.parametrize("path", LOCAL_SAMPLES, ids=lambda path: path.stem)
def test_a_plan_survives_the_files_that_it_is_written_to(path: Path) -> None:
    plan = plan_local(load_resource(path), site())
    assert [AgentConfig.model_validate_json(agent.model_dump_json()) for agent in plan.agents] == list(plan.agents)
    assert GatewayConfig.model_validate_json(plan.gateway.model_dump_json()) == plan.gateway


def test_the_gateway_knows_every_engine_at_the_address_where_it_listens() -> None:
    plan = plan_local(resource(engine={"replicas": 3, "parallelism": {"data": 2}}), site())
    for agent, address in zip(plan.agents, plan.gateway.engines, strict=True):
        assert address.name == agent.name
        assert address.url == f"http://127.0.0.1:{agent.engine.port}"
        assert address.agent_url == f"http://127.0.0.1:{agent.listen.port}"
        assert address.ranks == 2


def test_no_port_is_given_twice() -> None:
    plan = plan_local(resource(engine={"replicas": 4}), site())
    ports = [port for agent in plan.agents for port in (agent.listen.port, agent.engine.port)]
    ports += [plan.gateway.listen.port, plan.gateway.admin.port]
    assert len(set(ports)) == len(ports) == ports_needed(resource(engine={"replicas": 4}))


def test_the_port_that_the_resource_names_is_the_gateways() -> None:
    assert plan_local(resource(gateway={"port": 8123}), site()).gateway.listen.port == 8123


def test_too_few_ports_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(ValueError, match="4 ports are needed, got 3"):
        plan_local(resource(), site(ports=(1, 2, 3)))


@pytest.mark.parametrize(
    ("cpus", "engine", "threads"),
    [
        (8, {"replicas": 2}, "4"),
        (2, {"replicas": 2}, "1"),
        (2, {"replicas": 3}, "1"),
        (8, {"replicas": 2, "parallelism": {"tensor": 2}}, "2"),
        (8, {"replicas": 2, "resources": {"cpu": 3}}, "3"),
        (8, {"replicas": 2, "resources": {"cpu": "500m"}}, "1"),
    ],
)
def test_cpu_engines_share_the_cpus_of_the_machine(cpus: int, engine: dict[str, Any], threads: str) -> None:
    for agent in cpu_plan(site(gpus=(), cpus=cpus), **engine).agents:
        assert agent.engine.env["OMP_NUM_THREADS"] == threads


def test_cpu_engines_share_a_quarter_of_the_memory_unless_the_resource_says_how_much() -> None:
    machine = site(gpus=(), memory_bytes=24 * GIB)
    assert f"--kv-cache-memory-bytes={3 * GIB}" in cpu_plan(machine, replicas=2).agents[0].engine.args
    asked = cpu_plan(machine, replicas=2, resources={"kvCacheMemory": "1Gi"})
    assert f"--kv-cache-memory-bytes={GIB}" in asked.agents[0].engine.args


def test_each_gpu_belongs_to_one_engine() -> None:
    plan = plan_local(resource(engine={"replicas": 3, "parallelism": {"tensor": 2}}), site(gpus=tuple("abcdefg")))
    assert [agent.engine.env["CUDA_VISIBLE_DEVICES"] for agent in plan.agents] == ["a,b", "c,d", "e,f"]


def test_arguments_and_environment_of_the_resource_come_last_and_win() -> None:
    engine = cpu_plan(args=["--seed=1"], env={"OMP_NUM_THREADS": "7", "MINE": "x"}).agents[0].engine
    assert engine.args[-1] == "--seed=1"
    assert engine.env["OMP_NUM_THREADS"] == "7"
    assert engine.env["MINE"] == "x"


@pytest.mark.parametrize(
    ("uri", "model", "offline"),
    [("hf://org/a", "org/a", False), ("file:///m/a", "/m/a", True), ("s3://bucket/a", "s3://bucket/a", True)],
)
def test_each_kind_of_uri_reaches_vllm_as_vllm_wants_it(uri: str, model: str, offline: bool) -> None:
    agent = plan_local(resource(model={"uri": uri}), site()).agents[0]
    engine = agent.engine
    assert engine.model == model
    assert ("HF_HUB_OFFLINE" in engine_environment(agent, {}, cpu_build=False, cpus=1)) == offline
    assert ("--load-format=runai_streamer" in engine.args) == uri.startswith("s3")


def test_the_cache_and_revision_of_the_model_reach_the_engine() -> None:
    model = {"uri": "hf://org/a", "revision": "v2", "cache": {"path": "/cache"}, "name": "served"}
    engine = plan_local(resource(model=model), site()).agents[0].engine
    assert (engine.revision, engine.env["HF_HUB_CACHE"], engine.served_name) == ("v2", "/cache", "served")


def test_the_gateways_limits_are_those_of_the_resource() -> None:
    limits = {"maxBody": "1Mi", "headerTimeout": "1s", "bodyTimeout": "2s", "connectTimeout": "3s", "idleTimeout": "4s"}
    gateway = {"limits": limits, "hold": {"requests": 5, "timeout": "6s"}}
    assert plan_local(resource(gateway=gateway), site()).gateway.limits == Limits(
        max_body_bytes=1 << 20,
        header_timeout_s=1,
        body_timeout_s=2,
        connect_timeout_s=3,
        idle_timeout_s=4,
        hold_requests=5,
        hold_timeout_s=6,
    )
    assert plan_local(resource(), site()).gateway.limits == Limits(), "the defaults of both are the same"


@pytest.mark.parametrize(
    ("cors", "args", "origins"),
    [
        ({}, [], ("*",)),
        ({}, ['--allowed-origins=["http://localhost:3000"]'], ("http://localhost:3000",)),
        ({}, ["--allowed-origins", '["https://a.org", "https://b.org"]'], ("https://a.org", "https://b.org")),
        ({}, ["--allowed-origins=[]"], ()),
        ({}, ["--allowed-origins=nonsense"], ("*",)),
        ({}, ["--allowed-origins"], ("*",)),
        ({"allowedOrigins": []}, ['--allowed-origins=["*"]'], ()),
        ({"allowedOrigins": ["https://a.org"]}, [], ("https://a.org",)),
    ],
)
def test_pages_that_may_use_the_engine_may_use_the_gateway(cors, args, origins):
    planned = plan_local(resource(gateway={"cors": cors}, engine={"args": args}), site())
    assert planned.gateway.cors.allowed_origins == origins


@pytest.mark.parametrize(
    ("args", "completions"),
    [
        ([], True),
        (["--seed=1", "--enforce-eager", "--compilation-config={}", "--model-loader-extra-config", "{}"], True),
        (["--reasoning-parser=qwen3"], True),
        (["--override-generation-config={}"], False),
        (["--override_generation_config.max_new_tokens=5"], False),
        (["--overr", "{}"], False),
        (["--gen=vllm"], False),
        (["--logits=mine:Processor"], False),
        (["--mid=mine.Middleware"], False),
        (["--conf", "engine.yaml"], False),
    ],
)
def test_completions_go_on_from_their_prefix_where_a_token_depends_on_those_before_alone(args, completions):
    """Chats never do here: vLLM takes reasoning out of some of them without a flag."""
    asked = resource(gateway={"continuation": "deterministic"}, engine={"args": args})
    expected = ContinuedStreams(completions_by_prefix=completions, chats_by_prefix=False)
    assert plan_local(asked, site()).gateway.continuation == expected
    assert plan_local(resource(engine={"args": args}), site()).gateway.continuation is None


def test_the_header_that_names_the_tenant_reaches_the_gateway() -> None:
    assert plan_local(resource(gateway={"tenantHeader": "x-team"}), site()).gateway.tenant_header == "x-team"
    assert plan_local(resource(), site()).gateway.tenant_header == "x-gateway-inference-fairness-id"


def test_the_placement_of_experts_reaches_the_agents() -> None:
    shape = {"parallelism": {"data": 2, "expert": True}}
    asked = {"mode": "active", "redundantExperts": 2, "maxStall": "10ms"}
    for engine in (shape, {**shape, "runtime": "vllm-cpu"}):
        agent = plan_local(resource(engine=engine, scheduling={"expert": asked}), site()).agents[0]
        assert (agent.engine.expert_parallel, agent.engine.redundant_experts) == (True, 2)
        assert agent.expert == ExpertSettings(mode=ExpertMode.ACTIVE, max_stall_s=0.01)
    assert plan_local(resource(), site()).agents[0].expert == ExpertSettings(), "the defaults of both are the same"


def test_settings_of_experts_that_are_not_spread_are_named() -> None:
    asked = {"expert": {"mode": "active", "interval": 3000}}
    assert find_idle(resource(scheduling=asked)) == ["spec.scheduling.expert.mode"]
    spread = {"parallelism": {"data": 2, "expert": True}}
    assert find_idle(resource(engine=spread, scheduling=asked)) == []


@pytest.mark.parametrize(
    ("experts", "copies", "line"),
    [
        (16, 0, None),
        (16, 2, None),
        (None, 1, None),
        (16, 1, "16 experts and 1 copies do not divide by 2 ranks; 2 copies do"),
        (15, 0, "15 experts and 0 copies do not divide by 2 ranks; 1 copies do"),
    ],
)
def test_experts_that_cannot_be_spread_evenly_are_refused(experts: int | None, copies: int, line: str | None) -> None:
    spread = {"parallelism": {"data": 2, "expert": True}}
    asked = resource(engine=spread, scheduling={"expert": {"redundantExperts": copies}})
    problem = find_uneven(asked, experts)
    assert (None if problem is None else problem.message) == line
    assert find_uneven(resource(engine={"parallelism": {"data": 2}}), 15) is None


@pytest.mark.parametrize(
    ("text", "experts"),
    [
        ('{"num_experts": 16}', 16),
        ('{"n_routed_experts": 256, "num_experts_per_tok": 8}', 256),
        ('{"text_config": {"num_local_experts": 8}}', 8),
        ("{}", None),
        ("[]", None),
        ("{", None),
        ('{"num_experts": "many"}', None),
    ],
)
def test_the_number_of_experts_is_read_where_the_model_says_it(tmp_path: Path, text: str, experts: int | None) -> None:
    (tmp_path / "config.json").write_text(text)
    assert read_experts(tmp_path / "config.json") == experts


def test_the_agents_timeouts_are_those_of_the_resource() -> None:
    engine = cpu_plan(startupTimeout="1m", livenessTimeout="2s", drainTimeout="3s").agents[0].engine
    assert (engine.startup_timeout_s, engine.liveness_timeout_s, engine.drain_timeout_s) == (60, 2, 3)
    default = plan_local(resource(), site()).agents[0].engine
    of_agent = {
        name: field.default for name, field in type(default).model_fields.items() if name.endswith("_timeout_s")
    }
    assert {name: getattr(default, name) for name in of_agent} == of_agent, "the defaults of both are the same"


@pytest.mark.parametrize(
    ("spec", "machine", "line"),
    [
        (
            {"engine": {"replicas": 2, "parallelism": {"tensor": 2}}},
            {"gpus": ("0",)},
            "spec.engine: needs 2 x 2 GPUs, the machine has 1",
        ),
        (
            {},
            {"gpus": ()},
            "spec.engine: needs 1 x 1 GPUs, the machine has 0; the runtime vllm-cpu needs none",
        ),
        (
            {"engine": {"runtime": "vllm-cpu", "replicas": 3, "resources": {"cpu": 3}}},
            {},
            "spec.engine.resources.cpu: needs 3 x 3 CPUs, the machine has 8",
        ),
        (
            {"engine": {"runtime": "vllm-cpu", "replicas": 2, "resources": {"kvCacheMemory": "40Gi"}}},
            {},
            "spec.engine.resources.kvCacheMemory: needs 2 x 40Gi, the machine has 64.0Gi",
        ),
        ({"model": {"uri": "file://a"}}, {}, "spec.model.uri: an absolute folder is needed here, got 'file://a'"),
    ],
)
def test_what_the_machine_does_not_have_is_refused(spec: dict[str, Any], machine: dict[str, Any], line: str) -> None:
    assert refusal(resource(**spec), site(**machine)) == line


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.stem)
def test_the_minimal_sample_is_small_and_every_sample_is_one_document(path: Path) -> None:
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert document["metadata"]["name"]
    if path.stem == "minimal":
        assert len(yaml.safe_dump(document["spec"]).splitlines()) <= 5


if __name__ == "__main__":
    GOLDENS.mkdir(parents=True, exist_ok=True)
    for sample in LOCAL_SAMPLES:
        (GOLDENS / sample.name).write_text(render_sample(sample), encoding="utf-8")
