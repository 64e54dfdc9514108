"""`moeserving explain`: why the gateway sent a request to its engine, by the terms of its prediction."""

import asyncio
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated

import aiohttp
import typer
from moe_contract.clients import GatewayClient, PeerError
from moe_contract.engine_process import ADMIN_PORT
from moe_contract.input_errors import InputError, InvalidInput
from moe_contract.request_record import RequestRecord, write_request_record

from moe_operator.cli.experts import Context, Namespace
from moe_operator.cli.place import StateDir, errors_shown, find_folder
from moe_operator.experts.reach import Cluster, Forward, forward_port, get_objects
from moe_operator.local.failure import Failure
from moe_operator.local.start import require_running
from moe_operator.plan.names import COMPONENT, INSTANCE

_FILE_WIDTH = 160


def explain(
    request_id: Annotated[
        str, typer.Argument(metavar="REQUEST_ID", help="Value of the answer's x-request-id, also in the logs.")
    ],
    name: Annotated[
        str | None,
        typer.Argument(help="Name of the deployment; may be left out while there is one.", show_default=False),
    ] = None,
    state_dir: StateDir = None,
    namespace: Namespace = None,
    context: Context = None,
    as_json: Annotated[bool, typer.Option("--json", help="The gateway's record, as JSON.")] = False,
) -> None:
    """Show why a request went to its engine: the prediction for each engine, term by term."""
    from rich.console import Console

    from moe_operator.cli.explanation import render_record

    with errors_shown(), reach_gateways(name, state_dir, namespace, context) as urls:
        record = asyncio.run(find_record(urls, request_id))
        if record is None:
            raise Failure(
                f"request {request_id}: no gateway knows it; each remembers the newest 1000 that were meant for an "
                "engine, and forgets them when it restarts"
            )
        if as_json:
            typer.echo(write_request_record(record).decode())
        else:
            Console(width=None if sys.stdout.isatty() else _FILE_WIDTH).print(render_record(record))


async def find_record(urls: Sequence[str], request_id: str) -> RequestRecord | None:
    """The record of a request at the first gateway that knows it; None where none does.

    Raises:
        Failure: no gateway knows it, and one gave no answer.
    """
    problem = ""
    async with aiohttp.ClientSession() as session:
        for url in urls:
            try:
                record = await GatewayClient(session, url).request(request_id)
            except PeerError as error:
                problem = f"the gateway at {url} {error}"
                continue
            if record is not None:
                return record
    if problem:
        raise Failure(problem)
    return None


@contextmanager
def reach_gateways(
    name: str | None, state_dir: Path | None, namespace: str | None, context: str | None
) -> Iterator[list[str]]:
    """Yields the addresses of a deployment's gateways on this machine or in a cluster, while the block runs.

    Raises:
        InvalidInput: the deployment is not known.
        Failure: it does not run, or kubectl says why not.
    """
    if namespace is None and context is None:
        yield [require_running(find_folder(name, state_dir)).gateway.url]
        return
    with forward_gateways(name, Cluster(namespace=namespace, context=context)) as forwards:
        yield [forward.url for forward in forwards]


@contextmanager
def forward_gateways(name: str | None, cluster: Cluster) -> Iterator[list[Forward]]:
    """Yields the ways to the admin ports of a deployment's gateways in a cluster, while the block runs.

    Raises:
        InvalidInput: no deployment is named.
        Failure: none of its gateways runs, or kubectl says why not.
    """
    if name is None:
        raise InvalidInput([InputError("NAME", "name the deployment; `kubectl get moes` lists them")])
    selector = f"{INSTANCE}={name},{COMPONENT}=gateway"
    pods = get_objects(cluster, "pods", "--selector", selector).get("items", [])
    running = [pod["metadata"]["name"] for pod in pods if pod.get("status", {}).get("phase") == "Running"]
    if not running:
        raise Failure(f"{name}: no gateway runs there; see `kubectl get moes {name}`")
    with ExitStack() as stack:
        yield [stack.enter_context(forward_port(cluster, pod, ADMIN_PORT)) for pod in sorted(running)]
