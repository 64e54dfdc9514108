"""Watches a deployment from its start: reports how it starts, shows its status, and stops it at Ctrl-C.

Used by `moeserving up`. The supervisor is a process of its own; this one looks at it as `status` does and sends it
signals.
"""

import asyncio
import signal
import subprocess
import time
from contextlib import nullcontext, suppress
from datetime import UTC, datetime
from typing import Any

import typer
from rich.console import Console
from rich.live import Live

from moe_operator.cli.live_page import find_page_problem, local_page, open_in_browser
from moe_operator.cli.place import INTERRUPTED
from moe_operator.cli.start import describe_start
from moe_operator.cli.stopping import describe_stop
from moe_operator.cli.table import render_status
from moe_operator.cli.validate import one_line
from moe_operator.local.failure import Failure
from moe_operator.local.folder import Folder
from moe_operator.local.logs import read_tail
from moe_operator.local.observation import Observation, fetch_observation
from moe_operator.local.record import Alive, Record, identify, load_record
from moe_operator.local.report import Failed, Ready, Starting, build_status, find_failing, judge_start
from moe_operator.local.stop import request_stop
from moe_operator.local.traffic import Totals, build_throughput, extend_window, read_totals
from moe_operator.progress import stderr_line

_LOOK_EVERY_S = 0.5
_LOG_LINES = 15


class Watch:
    """Watches one deployment from its start."""

    def __init__(
        self, folder: Folder, process: "subprocess.Popen[bytes]", *, detach: bool, open_page: bool = False
    ) -> None:
        self._folder, self._process, self._detach, self._open_page = folder, process, detach, open_page
        self._supervisor: Alive = identify(process.pid)
        self._interrupted = asyncio.Event()
        self._console = Console(stderr=True)
        self._live: Live | None = None
        self._line = stderr_line()
        self._warned: set[str] = set()

    async def run(self) -> int:
        """The exit status of the command.

        Raises:
            Failure: the deployment did not become ready, or its supervisor ended.
        """
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(number, self._interrupt)
        try:
            try:
                ready = await self._wait_ready()
            finally:
                self._line.close()
            if ready is not None:
                await self._say_ready(ready)
                if self._detach:
                    return 0
                with self._display():
                    await self._watch()
            return await self._finish(INTERRUPTED if ready is None else 0)
        except Failure:
            request_stop(self._supervisor)
            await self._wait_ended()
            raise

    async def _wait_ready(self) -> Record | None:
        """The record once it is ready; None when it was interrupted."""
        began_s = time.monotonic()
        while not self._interrupted.is_set():
            seen = await self._look()
            if seen is not None:
                match judge_start(seen, datetime.now(UTC)):
                    case Ready():
                        return seen.record
                    case Failed() as failed:
                        self._fail(failed)
                    case Starting(phases=phases):
                        self._line.show(*describe_start(self._folder.name, phases, time.monotonic() - began_s))
            await self._pause()
        return None

    async def _watch(self) -> None:
        """Shows what the engines do, until an interrupt or the end."""
        window: tuple[Totals, ...] = ()
        while not self._interrupted.is_set() and self._process.poll() is None:
            seen = await self._look()
            if seen is None:
                return
            window = extend_window(window, read_totals(seen, time.monotonic()))
            if self._live is not None:
                status = build_status(seen, datetime.now(UTC))
                self._live.update(render_status(seen, status, throughput=build_throughput(window)))
            await self._pause()

    async def _finish(self, answer: int) -> int:
        """Drains after an interrupt; a supervisor that another command stopped is no failure either."""
        if self._interrupted.is_set():
            self._say(f"{self._folder.name}: stopping, running streams end first (another Ctrl-C stops at once)")
            request_stop(self._supervisor)
        status = await self._wait_ended()
        if status != 0:
            raise self._supervisor_failure(status)
        self._say(f"{self._folder.name}: stopped")
        return answer

    async def _wait_ended(self) -> int:
        """Until the supervisor has ended; each further interrupt forces it."""
        self._interrupted.clear()
        record, began_s = load_record(self._folder), time.monotonic()
        while (status := self._process.poll()) is None:
            if self._interrupted.is_set():
                self._interrupted.clear()
                request_stop(self._supervisor)
            if record is not None:
                self._line.show(*await describe_stop(record, time.monotonic() - began_s))
            await self._pause(0.1)
        self._line.close()
        return status

    async def _look(self) -> Observation | None:
        """Returns the present observation; None before the supervisor has begun and after a stop.

        Raises:
            Failure: the supervisor ended by itself.
        """
        if (status := self._process.poll()) not in (None, 0):
            raise self._supervisor_failure(int(status or 0))
        record = load_record(self._folder)
        if record is None or record.supervisor is None:
            if status == 0:
                self._interrupted.set()
            return None
        self._warn(record)
        return await fetch_observation(record)

    async def _pause(self, time_s: float = _LOOK_EVERY_S) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._interrupted.wait(), time_s)

    def _interrupt(self) -> None:
        self._interrupted.set()

    def _display(self) -> Any:
        self._live = (
            Live(console=self._console, transient=True, auto_refresh=True) if self._console.is_terminal else None
        )
        return self._live or nullcontext()

    async def _say_ready(self, record: Record) -> None:
        self._say(f"{record.name}: ready at {record.endpoint}", "", render_curl(record), "")
        if self._open_page:
            await self._show_page(record)
        if self._detach:
            self._say(
                f"moeserving status {record.name}    moeserving logs -f {record.name}    moeserving down {record.name}"
            )

    async def _show_page(self, record: Record) -> None:
        """Opens the live page in a browser; with `detach` waits for one that ends, such as a text browser."""
        if problem := await find_page_problem(record.gateway.url):
            self._say(f"no live page: {problem}", "")
            return
        page = local_page(self._folder, record)
        self._say(f"live page: {page}", "")
        browser = open_in_browser(page, self._folder.page)
        while self._detach and browser.is_alive() and not self._interrupted.is_set():
            await self._pause(0.1)

    def _warn(self, record: Record) -> None:
        """Names each process once that fails and without which the deployment serves."""
        for row in find_failing(record):
            if row.name not in self._warned:
                self._warned.add(row.name)
                words = f"{row.name} does not run: {row.last_exit}; requests are served without it"
                typer.echo(one_line(f"warning: {words} (moeserving logs {record.name} -p {row.name})"), err=True)

    def _say(self, *lines: str) -> None:
        for line in lines:
            typer.echo(line)

    def _fail(self, failed: Failed) -> None:
        tail = read_tail(self._folder.log(failed.process), _LOG_LINES)
        message = f"{self._folder.name}: {failed.process} does not come up: {failed.reason}; stopping"
        raise Failure(one_line(message), tuple(tail))

    def _supervisor_failure(self, status: int) -> Failure:
        tail = read_tail(self._folder.log("supervisor"), _LOG_LINES)
        return Failure(f"{self._folder.name}: the supervisor ended with status {status}", tuple(tail))


def render_curl(record: Record) -> str:
    """A curl command for one chat request."""
    body = (
        f'{{"model": "{record.served_name}", "messages": [{{"role": "user", "content": "Hello"}}], "max_tokens": 60}}'
    )
    return f"curl {record.endpoint}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'"
