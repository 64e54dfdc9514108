"""The benchmark of the operator: its reading of metrics, and a small run against a real API server."""

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cluster_life
import pytest
from cluster_api import ApiCluster
from moe_lab.reconciling.bound import Bound
from moe_lab.reconciling.build_crd import read_crd
from moe_lab.reconciling.cluster import connect, is_converged
from moe_lab.reconciling.measurement import BenchmarkPhase, ReconcilingResult
from moe_lab.reconciling.process import parse_metrics, quantile_s
from moe_lab.reconciling.report import report
from moe_operator.kubernetes.metrics import Metrics
from moe_operator.kubernetes.queue import WorkQueue
from moe_operator.kubernetes.store import Store
from prometheus_client import generate_latest

CHANGING = ("apply", "patch", "create", "update", "delete")
COMMAND = [sys.executable, "-m", "moe_lab.reconciling"]

# Run as `FILE -c CODE` or `FILE -m MODULE ARGUMENTS`.
OLDER_BUILD = """
import runpy
import sys

import moe_operator.api as api
import moe_operator.api.crd as crd
from moe_contract.input_errors import InputError, InvalidInput

build_crd, parse_resource = crd.build_crd, api.parse_resource

def build_older_crd():
    made = build_crd()
    spec = made["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
    gateway = spec["properties"]["gateway"]
    del gateway["properties"]["cors"], gateway["default"]["cors"]
    return made

def parse_older(document, *arguments, **options):
    if "cors" in document["spec"]["gateway"]:
        raise InvalidInput([InputError("spec.gateway.cors", "unknown field")])
    return parse_resource(document, *arguments, **options)

crd.build_crd, api.parse_resource = build_older_crd, parse_older
if sys.argv[1] == "-c":
    exec(sys.argv[2], {})
else:
    module, sys.argv[:] = sys.argv[2], [sys.argv[2], *sys.argv[3:]]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


def test_the_operators_own_metrics_are_read() -> None:
    metrics = Metrics(WorkQueue(), Store())
    metrics.calls["apply", "Deployment"] = 3
    metrics.calls["dry run", "Deployment"] = 5
    metrics.calls["list", "Pod"] = 7
    metrics.calls["update", "Lease"] = 9
    for seconds in (0.02, 0.02, 0.3):
        metrics.observe("ok", seconds)
    metrics.observe("failed", 9.0)
    read = parse_metrics(generate_latest(metrics.registry).decode())
    assert read.calls["apply", "Deployment"] == 3
    assert read.writes == 3
    assert (read.ended, read.passes["failed"], read.queue) == (4, 1, 0)
    assert read.buckets[0.025] == 2
    assert read.buckets[math.inf] == 4


def test_a_quantile_is_linear_within_its_bucket() -> None:
    after = {0.1: 50.0, 0.2: 100.0, math.inf: 100.0}
    assert quantile_s({}, after, 0.5) == pytest.approx(0.1)
    assert quantile_s({}, after, 0.75) == pytest.approx(0.15)
    assert quantile_s({}, after, 1.0) == pytest.approx(0.2)
    assert quantile_s({0.1: 50.0, 0.2: 50.0, math.inf: 50.0}, after, 0.5) == pytest.approx(0.15)
    assert math.isnan(quantile_s(after, after, 0.5))
    assert quantile_s({}, {0.1: 0.0, math.inf: 5.0}, 0.5) == 0.1, "beyond the last bound nothing is known"


def test_a_resource_has_converged_when_this_generation_is_said_to_be_well() -> None:
    status = {"observedGeneration": 2, "conditions": [{"type": "Degraded", "status": "False"}]}
    assert is_converged({"metadata": {"generation": 2}, "status": status})
    assert not is_converged({"metadata": {"generation": 3}, "status": status})
    assert not is_converged({"metadata": {"generation": 2}, "status": {"observedGeneration": 2}})
    assert not is_converged({"metadata": {"generation": 1}})


@pytest.fixture
def own_cluster(tmp_path: Path) -> Iterator[ApiCluster]:
    """A cluster that nobody else fills."""
    yield cluster_life.up("api", tmp_path / "cluster", tied=True)
    cluster_life.down(tmp_path / "cluster")


@pytest.mark.timeout(600)
def test_a_small_run_says_what_it_measured(own_cluster: ApiCluster, tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    words = ["--kubeconfig", own_cluster.kubeconfig, "--resources", "3", "--changes", "2", "--idle", "1", "--json", out]
    done = subprocess.run([*COMMAND, *map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(out.read_text("utf-8"))
    assert figures["bound"]["writes"] == 3 * 16
    assert figures["bound"]["server_cpu_s"] > 0
    check_figures(figures["builds"]["now"])
    for text in ("from a changed resource to its Deployment: p50", "from an agent's changed state to the status: p50"):
        assert f"now, {text}" in done.stdout
    assert "the API server's own bound: a bare client makes 48 writes in" in done.stdout
    assert "now, idle, API calls a minute:" in done.stdout
    assert "times the bound" in done.stdout
    assert "the builds' CRDs differ" not in done.stdout


@pytest.mark.timeout(600)
def test_pairs_measure_from_nothing_alone_and_leave_nothing(own_cluster: ApiCluster, tmp_path: Path) -> None:
    words = ["--kubeconfig", own_cluster.kubeconfig, "--resources", "2", "--pairs", "2", "--beside", sys.executable]
    words += ["--json", tmp_path / "pairs.json"]
    done = subprocess.run([*COMMAND, *map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "from nothing, 2 resources, 2 pairs: geometric means and 95 % intervals" in done.stdout
    for words_of_line in (
        "seconds, now beside before: ",
        "CPU seconds of the operator, now beside before: ",
        "CPU seconds of the servers, now beside before: ",
        "CPU seconds of both, now beside before: ",
        "seconds, now beside the bound: ",
        "seconds, before beside the bound: ",
    ):
        assert f"\n{words_of_line}" in done.stdout
    assert "idle" not in done.stdout
    rows = json.loads((tmp_path / "pairs.json").read_text())["pairs"]
    assert [sorted(row["phases"]) for row in rows] == [["before", "now"]] * 2
    assert all(row["phases"]["now"]["calls"]["apply Deployment"] == 4 for row in rows)


async def test_each_build_is_measured_with_its_own_crd(own_cluster: ApiCluster, tmp_path: Path) -> None:
    """The older build would refuse a resource in which the API server has filled in a field of the newer CRD."""
    older, newer = read_crd(make_older_build(tmp_path)), read_crd(Path(sys.executable))
    async with connect(own_cluster.kubeconfig) as cluster:
        for number, crd in enumerate((newer, older, older, newer)):
            await cluster.prepare(crd)
            await cluster.create([f"r{number}"])
            made = {row["metadata"]["name"]: row["spec"]["gateway"] for row in await cluster.servings()}
            assert ("cors" in made[f"r{number}"]) == (crd == newer)
    phase = BenchmarkPhase(
        name="from nothing",
        seconds=3.0,
        passes=1,
        p50_s=0.1,
        p99_s=0.1,
        calls={},
        writes=5,
        failed=0,
        cpu_s=1.0,
        servers_cpu_s={},
        memory_bytes=1,
        own_memory_bytes=1,
    )
    waits = {"changes_s": (1.0,), "readiness_s": (1.0,), "crowded_s": (1.0,), "states_s": (1.0,)}
    measured = ReconcilingResult(resources=1, phases=(phase, replace(phase, name="idle")), **waits)
    bound = Bound(seconds=2.0, writes=4, in_flight=8, client_cpu_s=0.1, server_cpu_s=0.1)
    lines = [*map(str, report(bound, {"before": measured, "now": measured}, plans_differ=True))]
    assert any(line.startswith("the builds' CRDs differ: each is measured with its own") for line in lines)
    assert "before, from nothing: 1.50 times the bound, 5 writes" in lines


def test_an_environment_without_an_operator_is_reported_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="gives no CRD: "):
        read_crd(tmp_path / "none")


def make_older_build(folder: Path) -> Path:
    """What stands for the interpreter of a build that does not know `gateway.cors`."""
    python = folder / "older"
    python.write_text(f"#!{sys.executable}\n{OLDER_BUILD}", "utf-8")
    python.chmod(0o755)
    return python


def check_figures(measured: dict[str, Any]) -> None:
    assert [phase["name"] for phase in measured["phases"]] == ["from nothing", "idle", "taken over", "to nothing"]
    phases = {phase["name"]: phase for phase in measured["phases"]}
    # Fourteen children, the finalizer, a status, an event.
    assert phases["from nothing"]["writes"] >= 3 * 17
    for name in ("idle", "taken over"):
        # A status may change where an answer was late.
        changed = {call.partition(" ")[::2] for call, count in phases[name]["calls"].items() if count}
        assert {kind for verb, kind in changed if verb in CHANGING} <= {"Lease", "MoEServing"}
    assert phases["taken over"]["passes"] >= 3
    for phase in measured["phases"]:
        assert phase["failed"] == 0
        assert phase["memory_bytes"] > phase["own_memory_bytes"] > 1e7
        assert phase["servers_cpu_s"].keys() == {"API server", "etcd"}
    # Nothing happens, so no pass is made.
    assert phases["idle"]["passes"] == 0
    assert [len(measured[name]) for name in ("changes_s", "readiness_s", "states_s", "crowded_s")] == [2] * 4


def test_a_kubeconfig_that_is_not_there_is_reported_in_a_line(tmp_path: Path) -> None:
    words = ["--kubeconfig", str(tmp_path / "none")]
    done = subprocess.run([*COMMAND, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("--kubeconfig: ")
    assert "Traceback" not in done.stderr
