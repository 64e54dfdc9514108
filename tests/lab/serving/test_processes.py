"""A's processes: started together, suspended and resumed, never left behind."""

import subprocess
import sys

import psutil
import pytest
from moe_contract.input_errors import InvalidInput
from moe_lab.serving.measurement import Side, measure
from moe_lab.serving.processes import DoesNotServe, read_cpu_s, resume, running, suspend
from moe_tools.compare_command import ComparisonEffort
from moe_tools.replay_command import Source

from tests.lab.serving.stand_ins import (
    SERVER,
    SIDES,
    free_port,
    is_stopped,
    launchers_left,
    program,
    until,
)


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
            await measure(stock, ours, server.url, Source(limit=40), ComparisonEffort(rate=40.0), lambda _: None)
        until(lambda: not is_stopped(psutil.Process(processes[0]).children()[0]))


def test_a_process_that_ends_takes_the_others_with_it_and_is_reported_with_the_end_of_its_log(tmp_path):
    broken = program("broken", code="import sys; print('no such option'); sys.exit(3)")
    said = "broken ended with status 3; the end of its log:\nno such option"
    with pytest.raises(DoesNotServe, match=said), running([program("one"), broken], tmp_path):
        pass
    assert not launchers_left()


def test_a_process_that_never_serves_is_reported(tmp_path):
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
