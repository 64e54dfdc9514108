"""The comparison of real engines, with stand-ins in the place of vLLM, of vllm-router and of `moeserving`."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from aiohttp import web
from moe_agent.supervisor.engine_command import build_arguments
from moe_agent.supervisor.node import build_node
from moe_contract.input_errors import InvalidInput
from moe_lab.gateway.comparison import read_machine
from moe_lab.serving import __main__ as command
from moe_lab.serving import bed, measurement
from moe_lab.serving.bed import Stage, plan_stage
from moe_lab.serving.knee import NoKnee, find_knee
from moe_lab.serving.measurement import Measured, Side, Work, measure
from moe_lab.serving.processes import DoesNotServe, read_cpu_s, resume, running, suspend
from moe_lab.serving.report import build_document, describe, describe_goal, describe_slowdown, render
from moe_lab.serving.stock import OURS, Program, Rival, check_comparable, plan_router, remove_ours
from moe_operator.api import load_resource
from moe_operator.local.folder import Folder
from moe_operator.local.machine import count_cpus, find_free_ports
from moe_operator.local.start import find_site
from moe_operator.plan import plan_local
from moe_tools.compare_command import Effort
from moe_tools.comparison import Pair, Policy, Sides, compare_metrics
from moe_tools.demo import SAMPLE, find_checkout
from moe_tools.replay_command import Source
from rich.console import Console
from typer.testing import CliRunner

from tests.tools.test_comparison import run_of

SERVER = """
import http.server, os, sys
class Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = b'{"data": []}'
        self.send_response(200); self.send_header("content-length", str(len(body))); self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_): pass
print("up as", os.getpid(), flush=True)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Page).serve_forever()
"""
ROUTER = """#!{python}
import sys
del sys.argv[1 : sys.argv.index("--port") + 1]
"""
SIDES = Sides(stock=Policy(label="stock", brief="stock vLLM"), ours=Policy(label="ours", brief="MoEServing"))


@pytest.fixture(autouse=True)
def short(monkeypatch) -> None:
    monkeypatch.setattr(measurement, "WARM_UP_S", 0.05)
    monkeypatch.setattr(measurement, "SETTLE_S", 0.0)


@pytest.fixture
def manifest(tmp_path) -> Path:
    """The sample, with a model that looks like one."""
    (tmp_path / "manifests").mkdir()
    path = tmp_path / SAMPLE
    path.write_text((find_checkout() / SAMPLE).read_text())
    model = tmp_path / ".cache" / "models" / "tiny"
    model.mkdir(parents=True)
    (model / "config.json").write_text(json.dumps({"num_experts": 16}))
    return path


RIVAL = Rival(program=Path("vllm-router"), policy="round_robin")
DIRECTLY = Rival(program=None, policy="round_robin")


def stage_of(manifest: Path) -> Stage:
    return plan_stage(manifest, RIVAL, 10.0)


def free_port() -> int:
    return find_free_ports(1)[0]


def program(name: str, *, port: int | None = None, code: str = SERVER) -> Program:
    port = port or free_port()
    return Program(
        name=name,
        command=(sys.executable, "-c", code, str(port)),
        environment=dict(os.environ),
        url=f"http://127.0.0.1:{port}",
    )


def measured_of(*pairs: tuple[float, float], idle_s: float = 0.0) -> Measured:
    return Measured(
        pairs=tuple(Pair(stock=run_of(a, a), ours=run_of(b, b)) for a, b in pairs),
        rate=2.0,
        capacities=(2.2, 2.4),
        work=(Work(label="stock", wall_s=10.0, busy_cpu_s=15.0, idle_cpu_s=idle_s),),
    )


def is_stopped(process: psutil.Process) -> bool:
    return process.status() == psutil.STATUS_STOPPED


def until(condition) -> None:
    give_up_s = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < give_up_s
        time.sleep(0.01)


def test_stock_engines_differ_from_ours_by_nothing_but_what_is_ours(manifest):
    stage = stage_of(manifest)
    assert len(stage.engines) == 2
    for engine in stage.engines:
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
    environment = stage_of(manifest).engines[0].environment
    assert environment["VLLM_PLUGINS"] == ""
    assert not [name for name in environment if name.startswith("MOESERVING")]
    assert environment["OMP_NUM_THREADS"] == str(max(1, count_cpus() // 2))
    assert environment["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"


def test_the_router_has_its_policy_and_all_engines(manifest):
    stage = stage_of(manifest)
    router = plan_router(stage.rival, stage.engines, port=1234, metrics_port=1235, inherited={"A": "b"})
    given = list(router.command)
    assert given[given.index("--policy") + 1] == "round_robin"
    assert given[given.index("--worker-urls") + 1 :] == [engine.url for engine in stage.engines]
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


def test_a_model_that_is_missing_is_told_with_the_command_that_makes_it(manifest):
    model = manifest.parents[1] / ".cache" / "models" / "tiny"
    (model / "config.json").unlink()
    model.rmdir()
    done = CliRunner().invoke(command.app, ["--vllm-router", sys.executable, "-f", str(manifest)])
    assert done.exit_code == 2
    assert f"no such folder: {model}; `moeserving model tiny {model}` makes a small model there" in done.stderr


def test_processes_serve_within_the_block_and_are_gone_after_it(tmp_path):
    with running([program("one"), program("two")], tmp_path) as processes:
        children = [child for pid in processes for child in psutil.Process(pid).children()]
        assert len(children) == 2
        assert read_cpu_s(processes) > 0
    assert not [pid for pid in processes if psutil.pid_exists(pid)]
    assert not [child for child in children if child.is_running()]
    assert read_cpu_s(processes) == 0
    assert (tmp_path / "two.log").read_text().startswith("up as")


def test_a_suspended_side_stands_still_and_goes_on_and_its_launcher_stays_awake(tmp_path):
    with running([program("one")], tmp_path) as processes:
        launcher = psutil.Process(processes[0])
        (child,) = launcher.children()
        suspend(processes)
        until(lambda: is_stopped(child))
        assert not is_stopped(launcher)
        resume(processes)
        until(lambda: not is_stopped(child))


async def test_a_measurement_that_fails_leaves_nobody_suspended(server, tmp_path):
    with running([program("one")], tmp_path) as processes:
        stock = Side(policy=SIDES.stock, url=server.url, processes=tuple(processes))
        ours = Side(policy=SIDES.ours, url="no URL", processes=())
        with pytest.raises(InvalidInput, match="must look like"):
            await measure(stock, ours, server.url, Source(limit=40), Effort(rate=40.0), lambda _: None)
        until(lambda: not is_stopped(psutil.Process(processes[0]).children()[0]))


def test_a_process_that_ends_takes_the_others_with_it_and_is_told_with_its_last_words(tmp_path):
    broken = program("broken", code="import sys; print('no such option'); sys.exit(3)")
    said = "broken ended with status 3; its last words:\nno such option"
    with pytest.raises(DoesNotServe, match=said), running([program("one"), broken], tmp_path):
        pass
    left = [child for child in psutil.Process().children(recursive=True) if "launcher" in " ".join(child.cmdline())]
    assert not left


def test_a_process_that_never_serves_is_told(tmp_path):
    silent = program("silent", code="import time; print('thinking', flush=True); time.sleep(600)")
    with pytest.raises(DoesNotServe, match="silent does not serve after 0 s"), running([silent], tmp_path, timeout_s=0):
        pass


def test_processes_end_with_the_one_that_started_them_even_suspended_and_when_it_is_killed(tmp_path):
    script = (
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "from moe_lab.serving.processes import running, suspend\n"
        "from moe_lab.serving.stock import Program\n"
        "code, port, folder = sys.argv[1:]\n"
        "command, url = (sys.executable, '-c', code, port), f'http://127.0.0.1:{port}'\n"
        "one = Program(name='one', command=command, environment=dict(os.environ), url=url)\n"
        "with running([one], Path(folder)) as pids:\n"
        "    suspend(pids); print(*pids, flush=True); time.sleep(600)\n"
    )
    arguments = [sys.executable, "-c", script, SERVER, str(free_port()), str(tmp_path)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        launcher = psutil.Process(int(process.stdout.readline()))
        started = [launcher, *launcher.children(recursive=True)]
        process.kill()
    assert len(started) == 2
    _, alive = psutil.wait_procs(started, timeout=30)
    assert not alive


async def test_requests_go_to_the_side_whose_turn_it_is_and_both_are_watched(server, monkeypatch):
    spent_s = {1: 0.0, 2: 0.0}

    def spend(processes) -> float:
        """At each look a process has taken as many seconds more as its number."""
        spent_s[processes[0]] += processes[0]
        return spent_s[processes[0]]

    monkeypatch.setattr(measurement, "read_cpu_s", spend)
    monkeypatch.setattr(measurement, "suspend", lambda processes: told.append(f"-{processes[0]}"))
    monkeypatch.setattr(measurement, "resume", lambda processes: told.append(f"+{processes[0]}"))
    told: list[str] = []
    stock = Side(policy=SIDES.stock, url=server.url, processes=(1,))
    ours = Side(policy=SIDES.ours, url="http://127.0.0.1:9", processes=(2,))
    said: list[str] = []
    effort = Effort(pairs=2, piece_s=0.1, rate=40.0)
    found = await measure(stock, ours, server.url, Source(limit=40), effort, said.append)
    assert all(len(pair.stock.failed) == 0 and len(pair.ours.answered) == 0 for pair in found.pairs)
    assert [row.label for row in found.work] == ["stock", "ours", "ours", "stock"]
    assert [(row.busy_cpu_s, row.idle_cpu_s) for row in found.work] == [(1, 2), (2, 1), (2, 1), (1, 2)]
    assert found.idle_cores == pytest.approx(6 / sum(row.wall_s for row in found.work))
    stock_works, ours_works = ["-2", "+1"], ["-1", "+2"]
    warm = [*stock_works, *ours_works]
    assert told == [*warm, *stock_works, *ours_works, *ours_works, *stock_works, "+1", "+2"]
    assert (found.capacities, found.rate) == (None, 40.0)
    assert sum(line.startswith("warming up") for line in said) == 2


async def test_the_load_follows_from_the_capacity_of_stock(server):
    sides = [Side(policy=policy, url=server.url, processes=()) for policy in (SIDES.stock, SIDES.ours)]
    effort = Effort(pairs=1, piece_s=0.2, load=0.5)
    server.first_token_s = 0.02
    found = await measure(*sides, server.url, Source(limit=200), effort, lambda _: None)
    assert found.rate == pytest.approx(found.capacities[0] * 0.5)
    assert found.capacities[1] > 0


@pytest.mark.parametrize(
    ("slowdown", "share"),
    [
        # That of a queue with one server at 80, 100 and 120 % of the capacity.
        (lambda load: 5.0 if load < 0.8 else 5.1, 0.8),
        (lambda load: 1.0 / max(1e-9, 1.25 - load), 1.05),
        (lambda load: math.exp(load / 1.2 * math.log(5.0)), 1.2),
        # Far from the capacity.
        (lambda load: 15.0 * load, 1 / 3),
        (lambda load: 2.0 * load, 2.5),
    ],
)
async def test_the_knee_is_found_within_five_percent(slowdown, share):
    async def slowdown_at(rate: float) -> float:
        return slowdown(rate / 30.0)

    assert await find_knee(slowdown_at, 30.0) == pytest.approx(30.0 * share, rel=0.05)


@pytest.mark.parametrize(("slowdown", "at"), [(1.0, r"99\.65"), (100.0, r"9\.03")])
async def test_a_knee_that_is_nowhere_near_is_not_made_up(slowdown, at):
    async def slowdown_at(_: float) -> float:
        return slowdown

    with pytest.raises(NoKnee, match=f"at {at} requests/s the mean TTFT is {slowdown} times"):
        await find_knee(slowdown_at, 30.0)


async def test_the_load_follows_from_the_knee_of_stock(server, monkeypatch):
    async def find(slowdown_at: Any, capacity: float) -> float:
        assert await slowdown_at(capacity) == pytest.approx(1.0, rel=0.9)
        return 2.0 * capacity

    monkeypatch.setattr(measurement, "find_knee", find)
    sides = [Side(policy=policy, url=server.url, processes=()) for policy in (SIDES.stock, SIDES.ours)]
    effort = Effort(pairs=1, piece_s=0.5, load=0.5, of_knee=True)
    server.first_token_s = 0.02
    said: list[str] = []
    found = await measure(*sides, server.url, Source(limit=400), effort, said.append)
    assert 0.02 <= found.alone_s < 1.0
    assert found.rate == pytest.approx(found.capacities[0])
    assert any(line.startswith("arrivals at 50% of stock's knee: ") for line in said)
    assert [row.label for row in found.work] == ["stock", "ours"]
    assert "mean TTFT over that of requests alone under A" in describe_slowdown(found)[0]
    prompts = [tuple(body["prompt"][:16]) for body in server.asked]
    pairs = 2 * len(found.pairs[0].stock.outcomes)
    assert not set(prompts[:-pairs]) & set(prompts[-pairs:])


async def test_no_knee_is_named_where_requests_fail(server):
    sides = [Side(policy=policy, url=server.url, processes=()) for policy in (SIDES.stock, SIDES.ours)]

    async def refuse(*_):
        return web.Response(status=503)

    server.misbehave = refuse
    with pytest.raises(NoKnee, match="no knee can be found: HTTP 503"):
        await measure(*sides, server.url, Source(limit=40), Effort(piece_s=0.1, of_knee=True), lambda _: None)


async def test_no_prompt_is_sent_twice_by_what_is_measured_and_what_is_not(server):
    stock, ours = (Side(policy=policy, url=server.url, processes=()) for policy in (SIDES.stock, SIDES.ours))
    await measure(stock, ours, server.url, Source(limit=40), Effort(pairs=2, piece_s=0.1, rate=40.0), lambda _: None)
    prompts = [tuple(body["prompt"][:16]) for body in server.asked]
    warm = len(prompts) - 4 * 4
    assert len(set(prompts[warm:])) == 16
    assert not set(prompts[:warm]) & set(prompts[warm:])


@pytest.mark.parametrize(
    ("pairs", "says"),
    [
        ([(1.0, 0.5), (1.0, 0.51), (1.0, 0.49)], "is reached: 0.50 [0.4"),
        ([(1.0, 0.8), (1.0, 0.81), (1.0, 0.79)], "is not reached: 0.80"),
        ([(1.0, 0.1), (1.0, 2.0)], "is not reached: 0.45 [0.00"),
    ],
)
def test_the_goal_is_reached_by_value_and_interval(pairs, says):
    assert says in describe_goal(compare_metrics(measured_of(*pairs).pairs))


def test_a_goal_that_was_not_measured_is_told():
    assert "was not measured" in describe_goal(compare_metrics(()))


def test_table_lines_and_json_have_sides_versions_and_what_disturbs():
    measured = measured_of((1.0, 0.5), (1.0, 0.6), idle_s=2.0)
    machine = read_machine("9.9.9", "cache_aware") | {"load_average": 99.0}
    console = Console(width=120, record=True, file=open(os.devnull, "w"))  # noqa: SIM115 - closed with the console
    with console.file:
        console.print(render(measured, SIDES, machine))
    text = " ".join(console.export_text().split())
    for part in ("A: stock. B: ours.", "TTFT, mean", "vllm-router 9.9.9", "0 under stock vLLM", "Arrivals: 2.00"):
        assert part in text
    lines = describe(measured, machine)
    assert "took 0.200 cores" in lines[1]
    assert len(lines) == 4
    document = build_document(measured, SIDES, Source(), Effort(), machine, {"vllm-router": ("a", "b")})
    read = json.loads(json.dumps(document, default=str))
    assert read["policies"]["ours"]["label"] == "ours"
    assert len(read["pairs"]) == 2
    assert read["environment"]["vllm_router"] == "9.9.9"


def test_a_quiet_machine_warns_of_nothing():
    assert len(describe(measured_of((1.0, 0.5)), read_machine("0", "random") | {"load_average": 0.0})) == 2


@pytest.fixture
def scripted(tmp_path, monkeypatch) -> Path:
    """A `moeserving` that writes down how it was called, and A of one stand-in."""
    script, log = tmp_path / "moeserving", tmp_path / "calls"
    script.write_text(f'#!/bin/sh\necho "$1" >> {log}\n[ -e {tmp_path}/refuse ] && exit 2\nexit 0\n')
    script.chmod(0o755)
    log.write_text("")
    monkeypatch.setattr("moe_tools.deployment.COMMAND", script)
    monkeypatch.setattr(bed, "wait_ready", lambda _url: None)
    return log


@contextmanager
def standing_in(manifest: Path):
    """`bed.standing` with stand-ins for A's programs and a folder of its own."""
    stage = stage_of(manifest)
    state = manifest.parents[1] / "state"
    scene = replace(stage.scene, deployment=replace(stage.scene.deployment, state_dir=state))
    router = manifest.parents[1] / "vllm-router"
    router.write_text(ROUTER.format(python=sys.executable) + SERVER)
    router.chmod(0o755)
    stage = replace(stage, scene=scene, engines=(program("engine"),), rival=replace(stage.rival, program=router))
    with bed.standing(stage, bed.Narrator()) as found:
        yield found


def test_both_sides_stand_within_the_block_and_both_are_down_after_it(manifest, scripted):
    with standing_in(manifest) as found:
        processes = found.stock.processes
        assert all(psutil.pid_exists(pid) for pid in processes)
        assert scripted.read_text().split() == ["up"]
        assert found.stock.policy.label == "stock vLLM behind vllm-router, round_robin"
    assert scripted.read_text().split() == ["up", "down"]
    assert not [pid for pid in processes if psutil.pid_exists(pid)]


def test_without_a_router_stock_is_its_engine(manifest, scripted):
    stage = stage_of(manifest)
    scene = replace(stage.scene, deployment=replace(stage.scene.deployment, state_dir=manifest.parents[1] / "state"))
    engine = program("engine")
    stage = replace(stage, scene=scene, engines=(engine,), rival=DIRECTLY)
    with bed.standing(stage, bed.Narrator()) as found:
        assert (found.stock.url, found.programs) == (engine.url, (engine,))
        assert len(found.stock.processes) == 1


def test_a_refused_start_of_ours_takes_stock_down(manifest, scripted):
    (scripted.parent / "refuse").touch()
    with pytest.raises(InvalidInput, match="moeserving up failed"), standing_in(manifest):
        pass
    assert scripted.read_text().split() == ["up", "down"]
    assert not [child for child in psutil.Process().children() if "launcher" in " ".join(child.cmdline())]


def test_a_signal_that_ends_the_command_takes_both_down(manifest, scripted):
    with (
        pytest.raises(KeyboardInterrupt),
        command.stopped_by_signals(),
        standing_in(manifest) as found,
    ):
        signal.raise_signal(signal.SIGTERM)
    assert scripted.read_text().split() == ["up", "down"]
    assert not [pid for pid in found.stock.processes if psutil.pid_exists(pid)]
