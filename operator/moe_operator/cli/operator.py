"""`moeserving operator`: runs the operator, in a cluster or beside one (`KUBECONFIG`)."""

import asyncio
import logging
import os
import signal
import socket
import sys
from typing import Annotated

import typer
from moe_contract.api_server import LoginError

from moe_operator.kubernetes.leader import Terms
from moe_operator.kubernetes.operator import Operator
from moe_operator.kubernetes.rivals import FORMER_LEASE
from moe_operator.kubernetes.settings import WORKERS, OperatorSettings, read_defaults, read_own_namespace

_UNUSABLE = 2


def operator(
    namespace: Annotated[
        list[str] | None, typer.Option(help="Namespace to serve; may be repeated.", show_default="all")
    ] = None,
    liveness_port: Annotated[int, typer.Option(min=1, max=65535, help="Port of /healthz.")] = 8080,
    metrics_port: Annotated[int, typer.Option(min=0, max=65535, help="Port of /metrics; 0: a free one.")] = 8081,
    workers: Annotated[int, typer.Option(min=1, max=256, help="Resources reconciled at a time.")] = WORKERS,
    resync: Annotated[float, typer.Option(min=1.0, help="Seconds between two looks at everything.")] = 600.0,
    lease_duration: Annotated[
        float, typer.Option(min=1.0, help="Seconds after which a leader that is gone is replaced.")
    ] = 15.0,
    lease: Annotated[str, typer.Option(help="Lease in the operator's namespace; one for each release.")] = FORMER_LEASE,
    identity: Annotated[str | None, typer.Option(help="Name in the Lease.", show_default="host name")] = None,
) -> None:
    """Make the MoEServings of a cluster real, until SIGTERM."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for name in ("kopf", "aiohttp.access"):
        logging.getLogger(name).setLevel(logging.WARNING)
    own = read_own_namespace(os.environ)
    settings = OperatorSettings(
        namespaces=tuple(namespace or ()),
        own_namespace=own,
        lease=lease,
        liveness_port=liveness_port,
        metrics_port=metrics_port,
        workers=workers,
        resync_s=resync,
        defaults=read_defaults(os.environ, own),
        terms=Terms(duration_s=lease_duration, renew_s=lease_duration * 2 / 3, retry_s=min(2.0, lease_duration / 6)),
        identity=identity or socket.gethostname(),
    )
    try:
        running = Operator(settings)
    except LoginError as error:
        typer.echo(f"no cluster: {error}; set KUBECONFIG or run in a pod", err=True)
        raise typer.Exit(_UNUSABLE) from None
    asyncio.run(_run(running))


async def _run(running: Operator) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, running.stop)
    await running.run()
