"""`moeserving top`: engines, queue, times and rates of a deployment, live, as the gateways' snapshots have them."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from contextlib import aclosing
from typing import TYPE_CHECKING, Annotated

import orjson
import typer
from moe_contract.clients import PeerError, Refused
from moe_contract.live_page import LiveSnapshot
from moe_contract.live_stream import watch_snapshots
from rich.console import Group

from moe_operator.cli.gateways import ReachedGateways, reach_gateways
from moe_operator.cli.output import Output, OutputFormat, is_document, print_document, print_table
from moe_operator.cli.place import Context, Name, Namespace, StateDir, errors_shown
from moe_operator.cli.top_view import render_top
from moe_operator.local.failure import Failure

if TYPE_CHECKING:
    from rich.live import Live

_AGAIN_AFTER_S = 1.0
# Time between two looks for gateways that came or went.
LOOK_EVERY_S = 5.0
_ENDS = "Ctrl-C ends"
_NO_PAGE = 404


def top(
    name: Name = None,
    state_dir: StateDir = None,
    namespace: Namespace = None,
    context: Context = None,
    once: Annotated[
        bool, typer.Option("--once", help="Print one screen and end, as where the output is no terminal.")
    ] = False,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Show engines, queue, times and rates, live: one screen a second until Ctrl-C."""
    wide = output is OutputFormat.WIDE
    with errors_shown(), reach_gateways(name, state_dir, namespace, context) as gateways:
        if is_document(output):
            snapshots = asyncio.run(fetch_snapshots(gateways))
            print_document({pod: json.loads(orjson.dumps(row)) for pod, row in snapshots.items()}, output)
        elif once or not sys.stdout.isatty():
            print_table(render_top(gateways.name, asyncio.run(fetch_snapshots(gateways)), wide=wide))
        else:
            asyncio.run(LiveTop(gateways, wide=wide).run())


async def fetch_snapshots(gateways: ReachedGateways) -> dict[str, LiveSnapshot]:
    """A snapshot of each gateway with the rates of a second.

    Raises:
        Failure: a gateway gives none.
    """
    key = gateways.page_key()
    rows = await asyncio.gather(*(_fetch_second(url, key) for url in gateways.urls.values()))
    return dict(zip(gateways.urls, rows, strict=True))


async def _fetch_second(url: str, key: str) -> LiveSnapshot:
    """The second snapshot of a gateway: rates are differences of counters, and the first one has none."""
    last = None
    try:
        async with aclosing(watch_snapshots(url, key)) as snapshots:
            async for snapshot in snapshots:
                if last is not None:
                    return snapshot
                last = snapshot
    except PeerError as error:
        raise Failure(explain(url, error)) from None
    raise Failure(f"the gateway at {url} has ended")


def explain(url: str, error: PeerError) -> str:
    """Why a gateway gives no snapshot, in words."""
    if isinstance(error, Refused) and error.status == _NO_PAGE:
        return f"the gateway at {url} gives no snapshots: gateway.ui.enabled is false; see `moeserving status`"
    return f"the gateway at {url} {error}"


class LiveTop:
    """The screen that is drawn anew with each snapshot.

    Args:
        gateways: to be watched.
        wide: whether all columns are shown.
    """

    def __init__(self, gateways: ReachedGateways, *, wide: bool) -> None:
        self._gateways, self._wide = gateways, wide
        self._key = gateways.page_key()
        self._newest: dict[str, LiveSnapshot] = {}
        self._problems: dict[str, str] = {}
        self._changed, self._ended = asyncio.Event(), asyncio.Event()
        self._watchers: dict[str, tuple[str, asyncio.Task[None]]] = {}

    async def run(self) -> None:
        """Draws the screen anew with each snapshot, until a signal.

        Raises:
            Failure: the way to each gateway has ended, and no other can come.
        """
        from rich.console import Console
        from rich.live import Live

        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._end)
        self._follow(self._gateways.urls)
        looking = None if self._gateways.refresh is None else asyncio.create_task(self._look(self._gateways.refresh))
        console = Console(highlight=False)
        try:
            with Live(console=console, screen=True, auto_refresh=False) as live:
                loop.add_signal_handler(signal.SIGTSTP, self._suspend, live)
                while not self._ended.is_set():
                    await self._changed.wait()
                    if looking is None and all(watcher.done() for _, watcher in self._watchers.values()):
                        break
                    self._changed.clear()
                    live.update(self._render(console.height), refresh=True)
        finally:
            loop.remove_signal_handler(signal.SIGTSTP)
            tasks = [watcher for _, watcher in self._watchers.values()] + ([] if looking is None else [looking])
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if not self._ended.is_set():
            raise Failure("; ".join(self._problems.values()))

    def _follow(self, urls: Mapping[str, str]) -> None:
        """Watches these gateways and no others, and those anew whose way had ended."""
        for pod, (url, watcher) in [*self._watchers.items()]:
            # A new way may have the port of the one that ended.
            if urls.get(pod) != url or watcher.done():
                watcher.cancel()
                del self._watchers[pod]
                self._newest.pop(pod, None)
                self._problems.pop(pod, None)
        for pod, url in urls.items():
            if pod not in self._watchers:
                watcher = asyncio.create_task(self._watch(pod, url))
                watcher.add_done_callback(lambda _: self._changed.set())
                self._watchers[pod] = url, watcher
        self._changed.set()

    async def _look(self, refresh: Callable[[], dict[str, str]]) -> None:
        """Looks for gateways that came or went, again and again."""
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            try:
                urls = await asyncio.to_thread(refresh)
            except Failure as failure:
                self._problems[""] = f"{failure}; looked for again every {LOOK_EVERY_S:g} s"
                self._changed.set()
            else:
                self._problems.pop("", None)
                self._follow(urls)

    def _suspend(self, live: "Live") -> None:
        """Ctrl-Z: gives the terminal back and stops; `fg` goes on below the kill."""
        loop = asyncio.get_running_loop()
        live.stop()
        loop.remove_signal_handler(signal.SIGTSTP)
        os.kill(os.getpid(), signal.SIGTSTP)
        loop.add_signal_handler(signal.SIGTSTP, self._suspend, live)
        live.start()
        self._changed.set()

    def _render(self, height: int) -> Group:
        last = "; ".join([*self._problems.values(), _ENDS])
        return render_top(self._gateways.name, self._newest, wide=self._wide, height=height, last=last)

    def _end(self) -> None:
        self._ended.set()
        self._changed.set()

    async def _watch(self, pod: str, url: str) -> None:
        """Keeps the newest snapshot of a gateway, and connects again after its end, while there is a way to it."""
        while True:
            problem = f"the gateway at {url} has ended"
            try:
                async with aclosing(watch_snapshots(url, self._key)) as snapshots:
                    async for snapshot in snapshots:
                        self._newest[pod] = snapshot
                        self._problems.pop(pod, None)
                        self._changed.set()
            except PeerError as error:
                problem = explain(url, error)
            if end := self._gateways.describe_end(pod):
                self._newest.pop(pod, None)
                self._problems[pod] = end if self._gateways.refresh is not None else f"{end}; start it again"
                return
            self._problems[pod] = f"{problem}, tried again each second"
            self._changed.set()
            await asyncio.sleep(_AGAIN_AFTER_S)
