"""The supervisor by itself, with shell scripts as its processes: what it starts again, and how it ends them."""

import asyncio
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from moe_operator.local import launcher
from moe_operator.local.folder import Folder
from moe_operator.local.record import Life, ProcessRecord, Record, SiteRecord, find_process, load_record
from moe_operator.local.restarts import Rules
from moe_operator.local.supervisor import Supervisor

RULES = Rules(
    first_backoff_s=0.05, last_backoff_s=0.2, steady_s=60.0, end_grace_s=2.0, force_stop_s=2.0, look_every_s=0.05
)
GIVE_UP_S = 30.0

# `sleep` runs beside the shell, so that a trap runs at once.
SERVES = "echo serves; trap 'echo ends; exit 0' TERM; while :; do sleep 0.02; done"
DEAF = "echo serves; trap 'echo deaf' TERM; while :; do sleep 0.02; done"
FORCED = "echo serves; trap 'echo drains; trap \"echo forced; exit 0\" TERM' TERM; while :; do sleep 0.02; done"
FAILS = "echo no such thing; exit 3"


class Deployment:
    """A supervisor in this process, and what it runs."""

    def __init__(self, root: Path, *, drain_timeout_s: float = GIVE_UP_S, **scripts: str) -> None:
        self.folder = Folder(root=root, name="a")
        self.folder.make()
        self.folder.token.write_text("secret")
        rows = tuple(
            ProcessRecord(name=name.replace("_", "-"), command=("sh", "-c", script), url="http://127.0.0.1:9")
            for name, script in scripts.items()
        )
        site = SiteRecord(ports=(), cpus=1, memory_bytes=1, gpus=())
        record = Record(
            name="a", endpoint="http://127.0.0.1:9", served_name="a", drain_timeout_s=drain_timeout_s, site=site,
            processes=rows, ready_changed=time.time(),
        )  # fmt: skip
        self.supervisor = Supervisor(self.folder, record, RULES)
        self.seen: dict[str, psutil.Process] = {}

    async def __aenter__(self) -> "Deployment":
        self.task = asyncio.create_task(self.supervisor.run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self.supervisor.request_stop()
        self.supervisor.request_stop()
        await asyncio.wait_for(self.task, GIVE_UP_S)
        assert not [name for name, process in self.seen.items() if process.is_running()]
        assert not self.folder.state.exists()
        assert not self.folder.token.exists()

    async def until(self, holds: Callable[[Record], bool], what: str) -> Record:
        async with asyncio.timeout(GIVE_UP_S):
            while True:
                record = load_record(self.folder)
                if record is not None:
                    rows = {row.name: find_process(row.process) for row in record.processes}
                    self.seen |= {name: process for name, process in rows.items() if process is not None}
                    if holds(record):
                        return record
                assert not self.task.done(), f"the supervisor ended before: {what}"
                await asyncio.sleep(0.01)

    async def until_reported(self, holds: Callable[[], bool]) -> None:
        """Without a look at the state."""
        give_up_s = time.monotonic() + GIVE_UP_S
        while not holds():
            assert time.monotonic() < give_up_s
            await asyncio.sleep(0.01)

    async def serves(self, *names: str) -> None:
        """Until each has said so."""
        await self.until(lambda _: all("serves" in self.said(name) for name in names), "all serve")

    async def stop(self) -> None:
        self.supervisor.request_stop()
        await asyncio.wait_for(self.task, GIVE_UP_S)

    def said(self, name: str) -> str:
        path = self.folder.log(name)
        return path.read_text() if path.exists() else ""


def row_of(record: Record, name: str) -> ProcessRecord:
    return next(row for row in record.processes if row.name == name)


async def test_the_gateway_has_ended_before_an_agent_is_asked_to(tmp_path: Path) -> None:
    mark = tmp_path / "gateway-ended"
    gateway = f"echo serves; trap 'sleep 0.3; touch {mark}; exit 0' TERM; while :; do sleep 0.02; done"
    agent = f"echo serves; trap 'ls {mark}; exit 0' TERM; while :; do sleep 0.02; done"
    async with Deployment(tmp_path, gateway=gateway, agent_0=agent, agent_1=agent) as deployment:
        await deployment.serves("gateway", "agent-0", "agent-1")
        await deployment.stop()
        assert [deployment.said(name) for name in ("agent-0", "agent-1")] == [f"serves\n{mark}\n"] * 2


async def test_a_process_that_fails_is_started_again_and_again_and_the_others_stay(tmp_path: Path) -> None:
    async with Deployment(tmp_path, gateway=SERVES, agent_0=FAILS) as deployment:
        await deployment.serves("gateway")
        record = await deployment.until(lambda record: row_of(record, "agent-0").restarts >= 3, "three restarts")
        assert row_of(record, "agent-0").last_exit == "exit status 3"
        assert (row_of(record, "gateway").restarts, row_of(record, "gateway").life) == (0, Life.RUNNING)


async def test_a_process_that_is_killed_comes_back_as_another_one(tmp_path: Path) -> None:
    async with Deployment(tmp_path, gateway=SERVES, agent_0=SERVES) as deployment:
        await deployment.serves("gateway", "agent-0")
        killed = deployment.seen["agent-0"]
        killed.kill()
        record = await deployment.until(
            lambda record: row_of(record, "agent-0").restarts == 1 and row_of(record, "agent-0").life is Life.RUNNING,
            "it is back",
        )
        assert row_of(record, "agent-0").last_exit == "killed by SIGKILL"
        assert deployment.seen["agent-0"].pid != killed.pid


async def test_a_process_that_cannot_be_started_is_tried_again(tmp_path: Path) -> None:
    async with Deployment(tmp_path, gateway=SERVES, agent_0=SERVES) as deployment:
        await deployment.serves("gateway", "agent-0")
        log = deployment.folder.log("agent-0")
        log.rename(log.with_suffix(".kept"))
        log.mkdir()  # a log that cannot be opened
        deployment.seen["agent-0"].kill()
        words = "cannot be started: is a directory"
        await deployment.until(lambda record: row_of(record, "agent-0").last_exit == words, "it says why")
        log.rmdir()
        await deployment.serves("agent-0")


async def test_a_state_that_cannot_be_written_does_not_end_what_serves(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with Deployment(tmp_path, gateway=SERVES, agent_0=SERVES) as deployment:
        await deployment.serves("gateway", "agent-0")
        before = deployment.seen["agent-0"]
        state = deployment.folder.state
        state.unlink()
        state.mkdir()
        before.kill()
        await deployment.until_reported(lambda: caplog.text.count("cannot be written") >= 2)
        state.rmdir()
        deployment.seen["gateway"].kill()
        both = ("gateway", "agent-0")
        record = await deployment.until(
            lambda record: all(row_of(record, name).restarts == 1 for name in both), "the next change has both"
        )
        assert record.name == "a"


async def test_a_process_that_outstays_its_time_is_asked_again_before_it_is_killed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with Deployment(tmp_path, drain_timeout_s=1.0, gateway=FORCED, agent_0=DEAF) as deployment:
        await deployment.serves("gateway", "agent-0")
        await deployment.stop()
        assert deployment.said("gateway") == "serves\ndrains\nforced\n"
        assert deployment.said("agent-0") == "serves\ndeaf\ndeaf\n"
        assert caplog.text.count("gateway: not ended within 1 s, requests that still run there are cut") == 1
        assert caplog.text.count("agent-0: not ended within") == 2


async def test_a_second_request_to_stop_does_not_wait_for_the_drain_time(tmp_path: Path) -> None:
    async with Deployment(tmp_path, drain_timeout_s=10 * GIVE_UP_S, gateway=FORCED, agent_0=SERVES) as deployment:
        await deployment.serves("gateway", "agent-0")
        deployment.supervisor.request_stop()
        await deployment.until(lambda _: "drains" in deployment.said("gateway"), "it drains")
        await deployment.stop()
        assert deployment.said("gateway") == "serves\ndrains\nforced\n"


async def test_a_stop_in_the_pause_before_a_restart_ends_it(tmp_path: Path) -> None:
    async with Deployment(tmp_path, gateway=SERVES, agent_0=FAILS) as deployment:
        await deployment.serves("gateway")
        await deployment.until(lambda record: row_of(record, "agent-0").life is Life.BACKOFF, "it pauses")
        await deployment.stop()


async def test_a_stop_reaches_processes_that_are_only_just_being_started(tmp_path: Path) -> None:
    for turns in range(8):  # of the event loop, between the start and the stop
        async with Deployment(tmp_path / str(turns), gateway=SERVES, agent_0=SERVES) as deployment:
            for _ in range(turns):
                await asyncio.sleep(0)
            await deployment.stop()


async def test_processes_end_with_a_supervisor_that_is_killed(tmp_path: Path) -> None:
    """The tie is the kernel's, so the parent must be a process of its own."""
    code = (
        "import os, subprocess, sys, time\n"
        f"tied = [sys.executable, '-I', '-S', {launcher.__file__!r}, str(os.getpid())]\n"
        f"child = subprocess.Popen([*tied, 'sh', '-c', {SERVES!r}])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE)
    assert parent.stdout is not None
    child = psutil.Process(int(await parent.stdout.readline()))
    assert await parent.stdout.readline() == b"serves\n"
    parent.send_signal(signal.SIGKILL)
    await parent.wait()
    await asyncio.to_thread(child.wait, GIVE_UP_S)
