"""`moeserving ui`: the live page of a deployment's gateway, on this machine or in a cluster."""

import signal
import threading
import webbrowser
from typing import Annotated

import typer
from moe_contract.page_keys import derive_page_key
from moe_contract.routes import UI

from moe_operator.cli.experts import Context, Namespace
from moe_operator.cli.explain import reach_gateways
from moe_operator.cli.place import StateDir, errors_shown, find_folder
from moe_operator.experts.reach import Cluster, get_objects, read_tokens
from moe_operator.local.failure import Failure
from moe_operator.local.folder import Folder
from moe_operator.local.start import require_running
from moe_operator.plan.names import Names


def ui(
    name: Annotated[
        str | None,
        typer.Argument(help="Name of the deployment; may be left out while there is one.", show_default=False),
    ] = None,
    state_dir: StateDir = None,
    namespace: Namespace = None,
    context: Context = None,
    no_open: Annotated[bool, typer.Option("--no-open", help="Print the address and open no browser.")] = False,
) -> None:
    """Open the live page: is anything wrong, why did a request wait, which experts are hot."""
    with errors_shown():
        if namespace is None and context is None:
            _tell(local_page(find_folder(name, state_dir)), no_open)
            return
        with reach_gateways(name, state_dir, namespace, context) as urls:
            cluster = Cluster(namespace=namespace, context=context)
            tokens = read_tokens(get_objects(cluster, "secret", Names(name or "").control))
            if not tokens:
                raise Failure(f"{name}: its Secret has no control token")
            for url in urls[1:]:
                typer.echo(f"another gateway: {page_address(url, tokens[0])}")
            _tell(page_address(urls[0], tokens[0]), no_open)
            typer.echo("the way there is open until Ctrl-C")
            _wait_for_the_end()


def page_address(url: str, token: str) -> str:
    """The page of a gateway's admin port; its key stays behind the `#`, which no browser sends."""
    return f"{url}{UI}/#key={derive_page_key(token.encode())}"


def local_page(folder: Folder) -> str:
    """The address of the page of a deployment on this machine.

    Raises:
        Failure: it does not run.
    """
    record = require_running(folder)
    return page_address(record.gateway.url, folder.token.read_text("utf-8").split()[0])


def show_page(address: str) -> bool:
    """Opens a browser where there is one; returns whether it did."""
    try:
        return webbrowser.open(address)
    except webbrowser.Error:
        return False


def _tell(address: str, no_open: bool) -> None:
    typer.echo(address)
    if not no_open and not show_page(address):
        typer.echo("no browser was found here: open the address in one", err=True)


def _wait_for_the_end() -> None:
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    ended.wait()
