"""`moeserving gateway --config FILE`, also `python -m moe_gateway`."""

import asyncio
import signal
from pathlib import Path
from typing import Annotated

import typer
import uvloop
from moe_contract.control_tokens import ControlTokens
from moe_contract.gateway_config import load_gateway_config
from moe_contract.input_errors import InvalidInput

from moe_gateway.gateway import Gateway, run_gateway
from moe_gateway.logs import set_up_logs

app = typer.Typer(add_completion=False)


@app.command("gateway")
def gateway(
    config: Annotated[Path, typer.Option(help="The gateway's configuration, a JSON file.")],
    access_log: Annotated[bool, typer.Option(help="Log every request, not only those that went wrong.")] = False,
) -> None:
    """Run the gateway in front of the engines that its configuration names."""
    try:
        settings = load_gateway_config(config)
        served = Gateway(settings, ControlTokens(settings.token_file), access_log=access_log)
    except InvalidInput as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None
    set_up_logs()
    try:
        uvloop.run(_run(served))
    except OSError as error:
        typer.echo(f"the gateway cannot listen: {error.strerror or error}", err=True)
        raise typer.Exit(1) from None


async def _run(served: Gateway) -> None:
    stop, force_stop = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (force_stop if stop.is_set() else stop).set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    await run_gateway(served, stop, force_stop)
