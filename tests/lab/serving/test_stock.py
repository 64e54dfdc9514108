"""Side A: stock vLLM and vllm-router, planned from the same resource as ours; and which resources are refused."""

import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from moe_agent.supervisor.engine_command import build_arguments
from moe_agent.supervisor.node import build_node
from moe_contract.input_errors import InvalidInput
from moe_lab.serving import __main__ as command
from moe_lab.serving.stock import OURS, check_comparable, plan_router, remove_ours
from moe_operator.api import load_resource
from moe_operator.local.folder import Folder
from moe_operator.local.machine import count_cpus
from moe_operator.local.start import find_site
from moe_operator.plan import plan_local
from typer.testing import CliRunner

from tests.lab.serving.stand_ins import (
    DIRECTLY,
    RIVAL,
    plan_of,
)


def test_stock_engines_differ_from_ours_by_nothing_but_what_is_ours(manifest):
    plan = plan_of(manifest)
    assert len(plan.engines) == 2
    for engine in plan.engines:
        arguments = list(engine.command[engine.command.index("vllm.entrypoints.openai.api_server") + 1 :])
        assert "moe_agent" not in " ".join(engine.command)
        assert {"--max-num-seqs=64", "--max-num-batched-tokens=2048", "--dtype=float32"} <= set(arguments)
        assert f"--kv-cache-memory-bytes={512 << 20}" in arguments
    resource = load_resource(manifest)
    agent = plan_local(resource, find_site(resource, Folder(root=manifest.parent, name="tiny"))).agents[0]
    theirs = build_arguments(agent.engine, build_node(agent.engine, {}), cpu_build=True)
    removed = [part for pair in OURS for part in pair]
    assert sorted([*remove_ours(theirs), *removed]) == sorted(theirs)


def test_a_stock_engine_loads_no_plugin_and_has_the_threads_that_ours_has(manifest, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    environment = plan_of(manifest).engines[0].environment
    assert environment["VLLM_PLUGINS"] == ""
    assert not [name for name in environment if name.startswith("MOESERVING")]
    assert environment["OMP_NUM_THREADS"] == str(max(1, count_cpus() // 2))
    assert environment["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"


def test_the_router_has_its_policy_and_all_engines(manifest):
    plan = plan_of(manifest)
    router = plan_router(plan.rival, plan.engines, port=1234, metrics_port=1235, inherited={"A": "b"})
    given = list(router.command)
    assert given[given.index("--policy") + 1] == "round_robin"
    assert given[given.index("--worker-urls") + 1 :] == [engine.url for engine in plan.engines]
    assert given[given.index("--port") + 1] == "1234"
    assert (router.url, router.environment) == ("http://127.0.0.1:1234", {"A": "b"})


def test_arguments_that_are_not_as_the_agent_has_them_are_a_surprise():
    with pytest.raises(ValueError, match="is other"):
        remove_ours(["--scheduler-cls", "other"])
    with pytest.raises(ValueError, match="not in list"):
        remove_ours([])


ON_A_GPU = (
    ("runtime: vllm-cpu", "runtime: vllm"),
    ("replicas: 2", "replicas: 1"),
    ("    - --max-num-seqs=64", "    - --gpu-memory-utilization=0.45"),
)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ((ON_A_GPU[0],), "spec.engine.args: must have --gpu-memory-utilization=PART, at most 0.48"),
        ((*ON_A_GPU, ("=0.45", "=0.9")), "spec.engine.args: must have --gpu-memory-utilization=PART"),
        (
            (*ON_A_GPU, ("    resources:\n      kvCacheMemory: 512Mi\n", "")),
            "spec.engine.resources.kvCacheMemory: must be given",
        ),
        ((("replicas: 2", "parallelism: {data: 2}"),), "spec.engine.parallelism: must leave each engine"),
    ],
)
def test_what_stock_cannot_do_alike_is_refused(manifest, change, said):
    rewrite(manifest, change)
    with pytest.raises(InvalidInput, match=said):
        check_comparable(load_resource(manifest), RIVAL)


def test_engines_of_both_sides_can_share_a_gpu(manifest):
    rewrite(manifest, ON_A_GPU)
    check_comparable(load_resource(manifest), RIVAL)


def test_without_a_router_there_is_one_engine(manifest):
    with pytest.raises(InvalidInput, match=r"spec\.engine\.replicas: must be 1 without --vllm-router"):
        check_comparable(load_resource(manifest), DIRECTLY)
    rewrite(manifest, (("replicas: 2", "replicas: 1"),))
    check_comparable(load_resource(manifest), DIRECTLY)
    assert str(DIRECTLY) == "stock vLLM, reached directly"


def rewrite(manifest: Path, changes: Iterable[tuple[str, str]]) -> None:
    for old, new in changes:
        assert old in manifest.read_text()
        manifest.write_text(manifest.read_text().replace(old, new))


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--vllm-router", "nowhere"], "--vllm-router: no such file: nowhere; `make bench-gateway` installs it"),
        (["--vllm-router", sys.executable, "--policy", "best"], "--policy: unknown 'best'; known: cache_aware"),
        (["--vllm-router", sys.executable, "--shape", "odd"], "shape: unknown 'odd'"),
        (["--vllm-router", sys.executable, "--trace", "nowhere"], "nowhere: cannot be read"),
        (["--vllm-router", sys.executable, "-f", "/nowhere"], "/nowhere: cannot be read"),
        (["--vllm-router", sys.executable, "--knee", "--rate", "2"], "--rate: is given, so --knee has none to find"),
    ],
)
def test_wrong_input_is_one_line_that_names_what_is_wrong(arguments, line):
    done = CliRunner().invoke(command.app, arguments)
    assert done.exit_code == 2
    assert done.stderr.startswith(line)
    assert done.stderr.count("\n") == 1


def test_pieces_in_which_an_agent_would_take_its_engine_for_dead_are_refused(manifest):
    arguments = ["--vllm-router", sys.executable, "-f", str(manifest), "--piece-s", "46"]
    done = CliRunner().invoke(command.app, arguments)
    assert done.exit_code == 2
    assert done.stderr.startswith("--piece-s: must be 45 at most")


def test_a_model_that_is_missing_is_reported_with_the_command_that_makes_it(manifest):
    model = manifest.parents[1] / ".cache" / "models" / "tiny"
    (model / "config.json").unlink()
    model.rmdir()
    done = CliRunner().invoke(command.app, ["--vllm-router", sys.executable, "-f", str(manifest)])
    assert done.exit_code == 2
    assert f"no such folder: {model}; `moeserving model tiny {model}` makes a small model there" in done.stderr
