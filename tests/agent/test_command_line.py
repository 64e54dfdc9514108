"""The agent's command: bad input ends with one line each and status 2; the engine's command line and environment."""

import itertools
import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from moe_agent.app import check_library
from moe_agent.cli import app
from moe_agent.supervisor.engine_command import CPU_KV_CACHE_BYTES, build_arguments
from moe_agent.supervisor.node import Node
from moe_contract.agent_config import AgentConfig, load_agent_config
from moe_contract.engine_process import engine_environment
from moe_contract.input_errors import InvalidInput
from moe_scheduling.expert.decision import ExpertMode, ExpertSettings
from typer.testing import CliRunner, Result

ALONE = Node(index=0, leader="127.0.0.1", ranks=range(1))


def document(folder: Path, **changed: Any) -> dict[str, Any]:
    return {
        "name": "e0",
        "run_dir": str(folder / "run"),
        "listen": {"port": 8101},
        "token_file": str(folder / "token"),
        "engine": {"port": 8102, "model": str(folder), "served_name": "tiny", "args": ["--max-model-len", "2048"]},
    } | changed


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (None, "file: cannot read"),
        (b"", "not JSON"),
        (b"\x00\xff", "not JSON"),
        (b"[]", "a JSON object is needed, got list"),
        (b'{"name": "x"}', "engine: required, but absent"),
    ],
)
def test_a_file_that_is_no_configuration_is_reported_in_one_line(tmp_path, content, line):
    path = tmp_path / "agent.json"
    if content is not None:
        path.write_bytes(content)
    ended = run("--config", str(path))
    assert ended.exit_code == 2
    assert ended.stderr.splitlines()[0].startswith(line)
    assert "Traceback" not in ended.stderr


def test_an_unknown_key_is_reported_with_its_nearest(tmp_path):
    path = tmp_path / "agent.json"
    path.write_text(json.dumps(document(tmp_path, engin={})))
    ended = run("--config", str(path))
    assert ended.exit_code == 2
    assert ended.stderr.startswith("engin: unknown field; nearest known: engine")


def test_an_absent_token_is_reported(tmp_path):
    path = tmp_path / "agent.json"
    path.write_text(json.dumps(document(tmp_path)))
    ended = run("--config", str(path))
    assert ended.exit_code == 2
    assert ended.stderr.strip() == f"token_file: cannot read {tmp_path / 'token'}: No such file or directory"


def test_the_settings_file_is_laid_over_the_request_when_it_exists(tmp_path):
    path, settings = tmp_path / "agent.json", tmp_path / "request.json"
    request = {"policy": "fcfs", "ageing_rate": 7}
    path.write_text(json.dumps(document(tmp_path, request=request, settings_file=str(settings))))
    assert load_agent_config(path).request.policy == "fcfs"
    settings.write_text(json.dumps({"request": {"policy": "priority"}}))
    found = load_agent_config(path).request
    assert (found.policy, found.ageing_rate) == ("priority", 7.0)
    settings.write_text("{}")
    assert load_agent_config(path).request.policy == "fcfs"
    settings.write_text(json.dumps({"expert": {"mode": "active"}}))
    found = load_agent_config(path)
    assert (found.request.policy, found.expert.mode, found.expert.interval_steps) == ("fcfs", "active", 3000)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ('{"request": {"policy": "sjff"}}', "request.policy: unknown 'sjff'; known: fcfs, priority, sjf"),
        ('{"dispatch": {}}', "dispatch: unknown field; known: expert, request"),
        ('{"expert": {"mode": "auto"}}', "expert.mode: unknown 'auto'; known: active, dryRun, observe, off"),
    ],
)
def test_a_settings_file_that_is_bad_is_reported_in_one_line_with_its_path(tmp_path, text, message):
    path, settings = tmp_path / "agent.json", tmp_path / "request.json"
    path.write_text(json.dumps(document(tmp_path, settings_file=str(settings))))
    settings.write_text(text)
    ended = run("--config", str(path))
    assert ended.exit_code == 2
    assert ended.stderr.startswith(f"settings_file: {settings}: {message}")
    assert len(ended.stderr.splitlines()) == 1


def test_a_settings_file_that_cannot_be_read_is_reported(tmp_path):
    path = tmp_path / "agent.json"
    path.write_text(json.dumps(document(tmp_path, settings_file=str(tmp_path))))
    ended = run("--config", str(path))
    assert ended.stderr.strip() == f"settings_file: cannot read {tmp_path}: Is a directory"


def test_an_agents_port_that_is_taken_is_reported(tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        (tmp_path / "token").write_text("t")
        path = tmp_path / "agent.json"
        path.write_text(json.dumps(document(tmp_path, listen={"port": port})))
        ended = run("--config", str(path))
    assert ended.exit_code == 2
    assert ended.stderr.strip().endswith(f"listen: cannot listen on 127.0.0.1:{port}: address already in use")


def test_the_module_is_the_same_command(tmp_path):
    command = [sys.executable, "-m", "moe_agent", "--config", str(tmp_path / "absent.json")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert ended.returncode == 2
    assert ended.stderr.startswith("file: cannot read")


@pytest.fixture
def config(tmp_path: Path) -> AgentConfig:
    return AgentConfig.model_validate(document(tmp_path))


def test_the_resources_own_arguments_come_last(config):
    arguments = build_arguments(config.engine, ALONE, cpu_build=True)
    assert arguments[-2:] == ["--max-model-len", "2048"]
    assert arguments.index("--kv-cache-memory-bytes") < len(arguments) - 2


def test_the_arguments_carry_scheduler_middleware_shape_and_bound_of_the_drain(config):
    engine = config.engine.model_copy(
        update={"data_parallel": 2, "tensor_parallel": 4, "expert_parallel": True, "revision": "main", "args": ()}
    )
    arguments = build_arguments(engine, ALONE, cpu_build=False)
    pairs = dict(itertools.pairwise(arguments))
    assert pairs["--scheduler-cls"] == "moe_agent.vllm.scheduler.OrderedScheduler"
    assert pairs["--middleware"] == "moe_agent.vllm.middleware.ServingRoutesOnly"
    assert (pairs["--data-parallel-size"], pairs["--tensor-parallel-size"]) == ("2", "4")
    assert (pairs["--shutdown-timeout"], pairs["--revision"]) == ("120", "main")
    assert "--enable-expert-parallel" in arguments
    assert "--kv-cache-memory-bytes" not in arguments


def balancer(arguments: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(arguments[arguments.index("--eplb-config") + 1])
    return found


def test_an_expert_group_starts_with_a_balancer_whatever_the_mode(config):
    engine = config.engine.model_copy(
        update={"data_parallel": 2, "expert_parallel": True, "redundant_experts": 2, "args": ()}
    )
    expert = ExpertSettings(mode=ExpertMode.OFF, interval_steps=500, window_steps=200)
    arguments = build_arguments(engine, ALONE, cpu_build=False, expert=expert)
    assert {"--enable-expert-parallel", "--enable-eplb"} <= set(arguments)
    start = {"num_redundant_experts": 2, "window_size": 200, "step_interval": 500}
    assert balancer(arguments) == start
    on_cpu = build_arguments(engine, ALONE, cpu_build=True, expert=expert)
    assert balancer(on_cpu) == start | {"use_async": False, "communicator": "torch_gloo"}


@pytest.mark.parametrize("shape", [{"expert_parallel": True}, {"data_parallel": 2}, {"tensor_parallel": 2}])
def test_without_an_expert_group_there_is_no_balancer(config, shape):
    engine = config.engine.model_copy(update=shape)
    assert not {"--enable-eplb", "--eplb-config"} & set(build_arguments(engine, ALONE, cpu_build=True))


def test_vllm_understands_the_arguments(config, virtual_engines):
    from vllm.entrypoints.cli.serve import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser())
    engine = config.engine.model_copy(update={"args": ("--kv-cache-memory-bytes=5000", "--port=9")})
    parsed = parser.parse_args(build_arguments(engine, ALONE, cpu_build=True))
    assert parsed.kv_cache_memory_bytes == 5000, "the last one wins"
    assert parsed.port == 9
    assert parsed.shutdown_timeout == 120
    assert parsed.scheduling_policy == "priority"
    assert CPU_KV_CACHE_BYTES == 2**30


def test_vllm_understands_the_arguments_of_an_expert_group(config, virtual_engines):
    from vllm.entrypoints.cli.serve import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    shape = {"data_parallel": 2, "expert_parallel": True, "redundant_experts": 2}
    engine = config.engine.model_copy(update=shape)
    parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(build_arguments(engine, ALONE, cpu_build=True))
    assert parsed.enable_eplb
    assert parsed.eplb_config.num_redundant_experts == 2
    assert (parsed.eplb_config.use_async, parsed.eplb_config.communicator) == (False, "torch_gloo")


def test_the_environment_is_ours_below_the_inherited_below_the_resources(config):
    inherited = {"PATH": "/bin", "OMP_NUM_THREADS": "3", "MOESERVING_RUN_DIR": "/elsewhere"}
    made = engine_environment(config, inherited, cpu_build=True, cpus=8)
    assert made["PATH"] == "/bin"
    assert made["OMP_NUM_THREADS"] == "3"
    assert made["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert made["HF_HUB_OFFLINE"] == "1", "the model is a folder"
    assert made["MOESERVING_RUN_DIR"] == str(config.run_dir)
    own = config.model_copy(update={"engine": config.engine.model_copy(update={"env": {"OMP_NUM_THREADS": "5"}})})
    assert engine_environment(own, inherited, cpu_build=True, cpus=8)["OMP_NUM_THREADS"] == "5"


@pytest.mark.parametrize(("ranks", "cpu_build", "simulated"), [(1, True, None), (2, True, "1"), (2, False, None)])
def test_ranks_on_a_cpu_need_no_numa_node_each(config, ranks, cpu_build, simulated):
    engine = config.engine.model_copy(update={"data_parallel": ranks})
    made = engine_environment(config.model_copy(update={"engine": engine}), {}, cpu_build=cpu_build, cpus=8)
    assert made.get("VLLM_CPU_SIM_MULTI_NUMA") == simulated


def test_a_hub_model_stays_online_and_a_gpu_has_no_cpu_settings(config):
    hub = config.model_copy(update={"engine": config.engine.model_copy(update={"model": "org/name"})})
    made = engine_environment(hub, {}, cpu_build=False, cpus=8)
    assert made.keys() == {"VLLM_NO_USAGE_STATS", "MOESERVING_RUN_DIR"}


@pytest.mark.parametrize(("data", "tensor", "in_core"), [(1, 1, True), (2, 1, True), (1, 2, False)])
def test_a_rank_of_one_worker_computes_in_its_engine_core_on_the_cpu(config, data, tensor, in_core):
    engine = config.engine.model_copy(update={"data_parallel": data, "tensor_parallel": tensor})
    config = config.model_copy(update={"engine": engine})
    assert ("uni" in build_arguments(engine, ALONE, cpu_build=True)) is in_core
    assert ("VLLM_ENABLE_V1_MULTIPROCESSING" in engine_environment(config, {}, cpu_build=True, cpus=1)) is in_core
    assert "uni" not in build_arguments(engine, ALONE, cpu_build=False)


def test_one_rank_on_a_cpu_computes_in_the_engine_core(config):
    pairs = dict(itertools.pairwise(build_arguments(config.engine, ALONE, cpu_build=True)))
    assert pairs["--distributed-executor-backend"] == "uni"
    assert engine_environment(config, {}, cpu_build=True, cpus=2)["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    two = config.model_copy(update={"engine": config.engine.model_copy(update={"tensor_parallel": 2})})
    assert "--distributed-executor-backend" not in build_arguments(two.engine, ALONE, cpu_build=True)
    assert "VLLM_ENABLE_V1_MULTIPROCESSING" not in engine_environment(two, {}, cpu_build=True, cpus=2)


def test_kv_memory_that_the_resource_asks_for_wins_over_an_inherited_variable(config):
    inherited = {"VLLM_CPU_KVCACHE_SPACE": "40"}
    assert engine_environment(config, inherited, cpu_build=True, cpus=2)["VLLM_CPU_KVCACHE_SPACE"] == "40"
    asked = config.engine.model_copy(update={"args": ("--kv-cache-memory-bytes=1000",)})
    changed = config.model_copy(update={"engine": asked})
    assert "VLLM_CPU_KVCACHE_SPACE" not in engine_environment(changed, inherited, cpu_build=True, cpus=2)


def test_a_missing_system_library_is_named_with_its_package():
    with pytest.raises(InvalidInput, match=r"^engine: vLLM on the CPU needs libabsent.so.9, .*libnuma1$"):
        check_library("libabsent.so.9")
