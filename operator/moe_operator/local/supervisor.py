"""The supervisor of one deployment: `python -m moe_operator.local STATE_DIR NAME`, started by `up`.

It keeps the gateway and the agents alive, writes `state.json` at every change, and ends them in an order that cuts
nothing: the gateway first, which takes no more requests and lets the running ones end, then the agents.

Invariants: it alone starts and ends these processes; a process that ended is started again after a growing pause; after
`run` none lives and `state.json` is gone.
"""

import asyncio
import logging
import os
import signal
import sys
import time
from contextlib import suppress
from dataclasses import replace

import aiohttp
from moe_contract.clients import GatewayClient

from moe_operator.local import launcher
from moe_operator.local.folder import Folder
from moe_operator.local.record import GATEWAY, Life, ProcessRecord, Record, identify, save_record
from moe_operator.local.restarts import Rules, backoff_s, describe_exit, next_failures

log = logging.getLogger("moeserving.supervisor")

_LOG_BYTES = 64 * 1024 * 1024


class Supervisor:
    """Starts, restarts and ends the processes of one deployment.

    Args:
        folder: files of the deployment.
        record: its processes.
        rules: times of restarts and of the end.
    """

    def __init__(self, folder: Folder, record: Record, rules: Rules) -> None:
        self._folder, self._rules = folder, rules
        self._record = replace(record, supervisor=identify(os.getpid()))
        self._stop, self._force_stop = asyncio.Event(), asyncio.Event()
        self._children: dict[str, asyncio.subprocess.Process] = {}

    def request_stop(self) -> None:
        """Begins to drain; a second call shortens the drain to `force_stop_s`."""
        (self._force_stop if self._stop.is_set() else self._stop).set()

    async def run(self) -> None:
        """Runs until a requested stop is done."""
        save_record(self._folder, self._record)
        keepers = {row.name: asyncio.create_task(self._keep(row)) for row in self._record.processes}
        watcher = asyncio.create_task(self._watch_ready())
        try:
            await self._stop.wait()
            log.info("stopping: the gateway ends its streams, then the engines stop")
            self._change(draining=True)
            await self._end({GATEWAY: keepers.pop(GATEWAY)})
            await self._end(keepers)
        finally:
            watcher.cancel()
            for child in self._children.values():
                with suppress(ProcessLookupError):
                    child.kill()
            self._folder.state.unlink(missing_ok=True)
            self._folder.token.unlink(missing_ok=True)
            self._folder.page.unlink(missing_ok=True)
        log.info("stopped")

    async def _keep(self, row: ProcessRecord) -> None:
        """Keeps one process alive until the stop."""
        failures = 0
        while not self._stop.is_set():
            started_s = time.monotonic()
            ended = await self._run_once(row)
            if self._stop.is_set():
                break
            failures = next_failures(failures, time.monotonic() - started_s, self._rules)
            pause_s = backoff_s(failures, self._rules)
            row = self._change_row(
                row.name, life=Life.BACKOFF, process=None, restarts=self._row(row.name).restarts + 1, last_exit=ended
            )
            log.warning("%s ended: %s; next start in %.1f s", row.name, ended, pause_s)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), pause_s)
        self._change_row(row.name, life=Life.STOPPED, process=None)

    async def _run_once(self, row: ProcessRecord) -> str:
        """Runs a process until it ends; returns how it ended."""
        try:
            child = await self._spawn(row)
        except OSError as error:
            return f"cannot be started: {(error.strerror or str(error)).lower()}"
        self._children[row.name] = child
        if self._stop.is_set():  # it missed the signal that the others got
            child.terminate()
        self._change_row(row.name, life=Life.RUNNING, process=identify(child.pid))
        log.info("%s runs as process %d", row.name, child.pid)
        ended = describe_exit(await child.wait())
        del self._children[row.name]
        return ended

    async def _spawn(self, row: ProcessRecord) -> asyncio.subprocess.Process:
        path = self._folder.log(row.name)
        if path.exists() and path.stat().st_size > _LOG_BYTES:
            os.replace(path, path.with_suffix(".log.1"))
        with path.open("ab") as output:
            return await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", launcher.__file__, str(os.getpid())),
                *row.command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=asyncio.subprocess.STDOUT,
            )

    async def _end(self, keepers: dict[str, "asyncio.Task[None]"]) -> None:
        """Asks processes to end, asks again after the drain time or at a forced stop, then kills."""
        patience = ((signal.SIGTERM, self._record.drain_timeout_s), (signal.SIGTERM, self._rules.end_grace_s))
        waiting = set(keepers.values())
        for number, patience_s in patience:
            self._send(keepers, number)
            limit_s = min(patience_s, self._rules.force_stop_s) if self._force_stop.is_set() else patience_s
            forcing = asyncio.create_task(self._force_stop.wait())
            done = asyncio.ensure_future(asyncio.wait(waiting))
            until = {done} if self._force_stop.is_set() else {done, forcing}
            await asyncio.wait(until, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
            forcing.cancel()
            done.cancel()
            if all(keeper.done() for keeper in waiting):
                return
            late = ", ".join(name for name in keepers if name in self._children)
            log.warning("%s: not ended within %.0f s, requests that still run there are cut", late, limit_s)
        self._send(keepers, signal.SIGKILL)
        await asyncio.gather(*waiting)

    def _send(self, names: dict[str, "asyncio.Task[None]"], number: signal.Signals) -> None:
        for name in names:
            if name in self._children:
                with suppress(ProcessLookupError):
                    self._children[name].send_signal(number)

    async def _watch_ready(self) -> None:
        """Notes when the deployment became ready, and when it no longer was."""
        async with aiohttp.ClientSession() as session:
            gateway = GatewayClient(session, self._record.gateway.url)
            while True:
                if (ready := await gateway.is_ready()) != self._record.ready:
                    log.info("ready" if ready else "no longer ready")
                    self._change(ready=ready, ready_changed=time.time())
                await asyncio.sleep(self._rules.look_every_s)

    def _row(self, name: str) -> ProcessRecord:
        return next(row for row in self._record.processes if row.name == name)

    def _change_row(self, name: str, **changes: object) -> ProcessRecord:
        changed = replace(self._row(name), **changes)  # type: ignore[arg-type]
        self._change(processes=tuple(changed if row.name == name else row for row in self._record.processes))
        return changed

    def _change(self, **changes: object) -> None:
        self._record = replace(self._record, **changes)  # type: ignore[arg-type]
        try:
            save_record(self._folder, self._record)
        except OSError as error:  # a full disk must not end what serves; the next change writes the whole file again
            log.error("%s cannot be written: %s", self._folder.state, error.strerror)


async def run_supervisor(folder: Folder, record: Record, rules: Rules) -> None:
    """Supervises until SIGTERM or SIGINT; a second signal forces the stop."""
    supervisor = Supervisor(folder, record, rules)
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, supervisor.request_stop)
    await supervisor.run()
