"""Both sides up within the block and down after it."""

import signal
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from moe_contract.input_errors import InvalidInput
from moe_lab.serving import __main__ as command
from moe_lab.serving import testbed
from moe_tools.progress_printer import ProgressPrinter

from tests.lab.serving.stand_ins import (
    DIRECTLY,
    ROUTER,
    SERVER,
    launchers_left,
    plan_of,
    program,
)


@pytest.fixture
def scripted(tmp_path, monkeypatch) -> Path:
    """A `moeserving` that writes down how it was called, and A of one stand-in."""
    script, log = tmp_path / "moeserving", tmp_path / "calls"
    script.write_text(f'#!/bin/sh\necho "$1" >> {log}\n[ -e {tmp_path}/refuse ] && exit 2\nexit 0\n')
    script.chmod(0o755)
    log.write_text("")
    monkeypatch.setattr("moe_tools.deployment.COMMAND", script)
    monkeypatch.setattr(testbed, "wait_ready", lambda _url: None)
    return log


@contextmanager
def stand_ins(manifest: Path):
    """`testbed.running_testbed` with stand-ins for A's programs and a folder of its own."""
    plan = plan_of(manifest)
    state = manifest.parents[1] / "state"
    place = replace(plan.place, deployment=replace(plan.place.deployment, state_dir=state))
    router = manifest.parents[1] / "vllm-router"
    router.write_text(ROUTER.format(python=sys.executable) + SERVER)
    router.chmod(0o755)
    plan = replace(plan, place=place, engines=(program("engine"),), rival=replace(plan.rival, program=router))
    with testbed.running_testbed(plan, ProgressPrinter()) as found:
        yield found


def test_both_sides_stand_within_the_block_and_both_are_down_after_it(manifest, scripted):
    with stand_ins(manifest) as found:
        processes = found.stock.processes
        assert all(psutil.pid_exists(pid) for pid in processes)
        assert scripted.read_text().split() == ["up"]
        assert found.stock.policy.label == "stock vLLM behind vllm-router, round_robin"
    assert scripted.read_text().split() == ["up", "down"]
    assert not [pid for pid in processes if psutil.pid_exists(pid)]


def test_without_a_router_stock_is_its_engine(manifest, scripted):
    plan = plan_of(manifest)
    place = replace(plan.place, deployment=replace(plan.place.deployment, state_dir=manifest.parents[1] / "state"))
    engine = program("engine")
    plan = replace(plan, place=place, engines=(engine,), rival=DIRECTLY)
    with testbed.running_testbed(plan, ProgressPrinter()) as found:
        assert (found.stock.url, found.programs) == (engine.url, (engine,))
        assert len(found.stock.processes) == 1


def test_a_refused_start_of_ours_takes_stock_down(manifest, scripted):
    (scripted.parent / "refuse").touch()
    with pytest.raises(InvalidInput, match="moeserving up failed"), stand_ins(manifest):
        pass
    assert scripted.read_text().split() == ["up", "down"]
    assert not launchers_left()


def test_a_signal_that_ends_the_command_takes_both_down(manifest, scripted):
    with (
        pytest.raises(KeyboardInterrupt),
        command.stopped_by_signals(),
        stand_ins(manifest) as found,
    ):
        signal.raise_signal(signal.SIGTERM)
    assert scripted.read_text().split() == ["up", "down"]
    assert not [pid for pid in found.stock.processes if psutil.pid_exists(pid)]
