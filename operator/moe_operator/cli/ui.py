"""`moeserving ui`: the live page of a deployment's gateway, on this machine or in a cluster."""

import asyncio
import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from moe_operator.cli.gateways import fetch_tokens, forward_gateways
from moe_operator.cli.live_page import find_page_problem, local_page, open_in_browser, page_address
from moe_operator.cli.place import Context, Name, Namespace, StateDir, errors_shown, find_folder
from moe_operator.experts.reach import Cluster, Forward
from moe_operator.local.failure import Failure
from moe_operator.local.folder import PAGE_FILE, Folder
from moe_operator.local.start import require_running

_LOOK_EVERY_S = 0.5


def ui(
    name: Name = None,
    state_dir: StateDir = None,
    namespace: Namespace = None,
    context: Context = None,
    no_open: Annotated[bool, typer.Option("--no-open", help="Print the address and open no browser.")] = False,
) -> None:
    """Open the live page: is anything wrong, why did a request wait, which experts are hot."""
    with errors_shown():
        if namespace is None and context is None:
            _show_local(find_folder(name, state_dir, in_cluster=True), no_open)
        else:
            _show_cluster(name, Cluster(namespace=namespace, context=context), no_open)


def _show_local(folder: Folder, no_open: bool) -> None:
    record = require_running(folder)
    _check_page(folder.name, record.gateway.url)
    address = local_page(folder, record)
    typer.echo(address)
    if not no_open:
        open_in_browser(address, folder.page).join()


def _show_cluster(name: str | None, cluster: Cluster, no_open: bool) -> None:
    with forward_gateways(name, cluster) as forwards:
        _check_page(name or "", forwards[0].url)
        tokens = fetch_tokens(name or "", cluster)
        if not tokens:
            raise Failure(f"{name}: its Secret has no control token")
        for other in forwards[1:]:
            typer.echo(f"another gateway: {page_address(other.url, tokens[0])}")
        address = page_address(forwards[0].url, tokens[0])
        ended = _catch_the_end()
        with TemporaryDirectory(prefix="moeserving-") as private:
            typer.echo(address)
            if not no_open:
                open_in_browser(address, Path(private) / PAGE_FILE)
            typer.echo("the way there is open until Ctrl-C")
            _wait_for_the_end(ended, forwards)


def _check_page(name: str, url: str) -> None:
    if problem := asyncio.run(find_page_problem(url)):
        raise Failure(f"{name}: {problem}")


def _catch_the_end() -> threading.Event:
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    return ended


def _wait_for_the_end(ended: threading.Event, forwards: Sequence[Forward]) -> None:
    """Until a signal; a way that ends by itself is named.

    Raises:
        Failure: it was the first one, by which the page was opened.
    """
    left = list(forwards)
    while not ended.wait(_LOOK_EVERY_S):
        for forward in [each for each in left if each.has_ended()]:
            left.remove(forward)
            if forward is forwards[0]:
                raise Failure(forward.describe_end())
            typer.echo(forward.describe_end(), err=True)
