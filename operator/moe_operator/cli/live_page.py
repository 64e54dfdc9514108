"""The live page of a gateway, for `moeserving ui` and `moeserving up --open`: its address, and a browser that shows it.

The address has the page's key. Every user of a machine can read the command lines of all processes, so a browser gets
the path of a file that its owner alone can read, which leads on to the address.
"""

import threading
import webbrowser
from html import escape
from http import HTTPStatus
from pathlib import Path

import aiohttp
import typer
from moe_contract.clients import GatewayClient, PeerError, Refused
from moe_contract.page_keys import derive_page_key
from moe_contract.routes import UI

from moe_operator.local.folder import Folder, write_whole
from moe_operator.local.record import Record

_REDIRECT = """<!doctype html><html lang="en"><meta charset="utf-8"><title>MoEServing</title>
<meta http-equiv="refresh" content="0;url={address}">
<p><a href="{address}">The live page</a></p></html>
"""
_PROBLEMS: dict[int, str] = {
    HTTPStatus.NOT_FOUND: "the gateway serves no live page: gateway.ui.enabled is false",
    HTTPStatus.SERVICE_UNAVAILABLE: "the gateway runs from a checkout in which the live page is not built: `make ui` "
    "builds it there (Node.js 18 or newer); an installed wheel has it",
}


def page_address(url: str, token: str) -> str:
    """The page of a gateway's admin port; its key stays behind the `#`, which no browser sends."""
    return f"{url}{UI}/#key={derive_page_key(token.encode())}"


def local_page(folder: Folder, record: Record) -> str:
    """The address of the page of a deployment that runs on this machine."""
    return page_address(record.gateway.url, folder.token.read_text("utf-8").split()[0])


async def find_page_problem(url: str) -> str:
    """Why the gateway with this admin URL shows no page, in words; empty where it does."""
    async with aiohttp.ClientSession() as session:
        try:
            await GatewayClient(session, url).live_page()
        except Refused as error:
            return _PROBLEMS.get(error.status, f"the gateway at {url} {error}")
        except PeerError as error:
            return f"the gateway at {url} {error}"
    return ""


def open_in_browser(address: str, file: Path) -> threading.Thread:
    """Writes the file that leads to the address and opens it in a browser, where there is one.

    Some browsers end only when their window is closed; the thread that is returned ends with them.
    """
    write_whole(file, _REDIRECT.format(address=escape(address)))
    thread = threading.Thread(target=_show, args=(file.absolute().as_uri(),), daemon=True)
    thread.start()
    return thread


def _show(uri: str) -> None:
    try:
        shown = webbrowser.open(uri)
    except webbrowser.Error:
        shown = False
    if not shown:
        typer.echo("no browser was found here: open the address in one", err=True)
