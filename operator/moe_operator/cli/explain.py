"""`moeserving explain`: why a request waited and went to its engine, by the terms of its prediction."""

import asyncio
import json
from collections.abc import Iterable
from typing import Annotated

import aiohttp
import typer
from moe_contract.clients import GatewayClient, PeerError
from moe_contract.request_record import RequestRecord, write_request_record

from moe_operator.cli.gateways import reach_gateways
from moe_operator.cli.output import (
    AsJson,
    Output,
    OutputFormat,
    choose_format,
    is_document,
    print_document,
    print_table,
)
from moe_operator.cli.place import Context, Name, Namespace, StateDir, errors_shown
from moe_operator.local.failure import Failure


def explain(
    request_id: Annotated[
        str, typer.Argument(metavar="REQUEST_ID", help="Value of the answer's x-request-id, also in the logs.")
    ],
    name: Name = None,
    state_dir: StateDir = None,
    namespace: Namespace = None,
    context: Context = None,
    output: Output = OutputFormat.TABLE,
    as_json: AsJson = False,
) -> None:
    """Show why a request waited and why it went to its engine: the prediction for each engine, term by term."""
    from moe_operator.cli.explanation import render_record

    form = choose_format(output, as_json=as_json)
    with errors_shown(), reach_gateways(name, state_dir, namespace, context) as gateways:
        record = asyncio.run(find_record(gateways.urls.values(), request_id))
        if record is None:
            raise Failure(
                f"request {request_id}: no gateway knows it; each remembers the newest 1000 that were meant for an "
                "engine, and forgets them when it restarts"
            )
        if is_document(form):
            print_document(json.loads(write_request_record(record)), form)
        else:
            print_table(render_record(record, wide=form is OutputFormat.WIDE))


async def find_record(urls: Iterable[str], request_id: str) -> RequestRecord | None:
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
