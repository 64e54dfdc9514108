"""`moeserving doctor`: looks at a cluster and at this machine, and says for each finding what to do."""

import asyncio
import os
import shutil
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from moe_contract.api_server import ApiServer, LoginError
from rich.console import Console

from moe_operator.cli.output import Output, OutputFormat, is_document, print_document
from moe_operator.cli.place import FAILED, Context, errors_shown
from moe_operator.doctor.check import Check, has_problem
from moe_operator.doctor.fetch import ClusterView, fetch_cluster
from moe_operator.doctor.machine import check_machine
from moe_operator.doctor.report import (
    build_report,
    check_cluster,
    check_kubectl,
    check_no_cluster,
    render_sum,
    render_table,
)

DEFAULT_KUBECONFIG = Path.home() / ".kube" / "config"


def doctor(
    namespace: Annotated[
        str | None,
        typer.Option("--namespace", "-n", help="Namespace of the MoEServings.", show_default="that of the context"),
    ] = None,
    context: Context = None,
    local: Annotated[bool, typer.Option("--local", help="Look at this machine alone, for `moeserving up`.")] = False,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Look for problems of a cluster and of this machine, and say what to do: status 1 where there is one."""
    with errors_shown():
        checks = check_machine() if local else _check_cluster(namespace, context)
        _show(checks, output)
    raise typer.Exit(FAILED if has_problem(checks) else 0)


def _check_cluster(namespace: str | None, context: str | None) -> list[Check]:
    """The checks of the cluster; those of this machine where none is configured and none was asked for."""
    try:
        server = ApiServer(context=context or "")
    except LoginError as error:
        asked = bool(namespace or context or os.environ.get("KUBECONFIG") or DEFAULT_KUBECONFIG.exists())
        return [check_no_cluster(str(error), asked=asked), *([] if asked else check_machine())]
    view = asyncio.run(_fetch(server, namespace))
    return [*check_cluster(view, datetime.now(UTC)), check_kubectl(shutil.which("kubectl"))]


async def _fetch(server: ApiServer, namespace: str | None) -> ClusterView:
    try:
        return await fetch_cluster(server, namespace)
    finally:
        await server.close()


def _show(checks: Sequence[Check], output: OutputFormat) -> None:
    if is_document(output):
        print_document(build_report(checks), output)
        return
    Console(highlight=False).print(render_table(checks))
    typer.echo(render_sum(checks))
