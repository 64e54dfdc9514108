"""`moeserving gateway`, also `python -m moe_gateway`: with a configuration file, or in front of engines by address."""

import asyncio
import gc
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import typer
import uvloop
from moe_contract.addresses import LOOPBACK
from moe_contract.control_tokens import ControlTokens
from moe_contract.documents import parse_model
from moe_contract.gateway_config import EngineAddress, GatewayConfig, load_gateway_config
from moe_contract.input_errors import InputError, InvalidInput
from moe_contract.sections import Listen

from moe_gateway.gateway import Gateway, run_gateway
from moe_gateway.logs import set_up_logs

DEFAULT_PORT, DEFAULT_ADMIN_PORT = 8000, 9000

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command("gateway")
def gateway(
    config: Annotated[
        Path | None, typer.Option(help="The gateway's configuration, a JSON file.", show_default=False)
    ] = None,
    engine: Annotated[
        list[str] | None,
        typer.Option(
            help="Instead of a file: address of a vLLM server, such as http://127.0.0.1:8001; once for each.",
            show_default=False,
        ),
    ] = None,
    host: Annotated[
        str | None, typer.Option(help="With --engine: address to listen on.", show_default=LOOPBACK)
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(min=1, max=65535, help="With --engine: port for clients.", show_default=str(DEFAULT_PORT)),
    ] = None,
    admin_port: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=65535,
            help="With --engine: port of metrics and state, on the loopback address.",
            show_default=str(DEFAULT_ADMIN_PORT),
        ),
    ] = None,
    access_log: Annotated[bool, typer.Option(help="Log every request, not only those that went wrong.")] = False,
) -> None:
    """Run a gateway in front of the engines of its configuration, or of any vLLM servers."""
    try:
        settings = _read_settings(config, engine or [], {"--host": host, "--port": port, "--admin-port": admin_port})
        served = Gateway(settings, ControlTokens(settings.token_file), access_log=access_log)
    except InvalidInput as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None
    run_until_signal(served)


def run_until_signal(served: Gateway) -> None:
    """Serves until SIGTERM or SIGINT, then drains; a second one ends at once."""
    set_up_logs()
    # Modules stay for ever: without this a full collection goes through them, and all streams wait for its end.
    gc.freeze()
    try:
        uvloop.run(_run(served))
    except OSError as error:
        typer.echo(f"the gateway cannot listen: {error.strerror or error}", err=True)
        raise typer.Exit(1) from None


def _read_settings(config: Path | None, engines: list[str], given: dict[str, str | int | None]) -> GatewayConfig:
    """The configuration that the options ask for.

    Raises:
        InvalidInput: the options exclude each other, or one is not valid.
    """
    if config is not None:
        others = {"--engine": engines or None, **given}
        if errors := [
            InputError(name, "is in the file of --config") for name, row in others.items() if row is not None
        ]:
            raise InvalidInput(errors)
        return load_gateway_config(config)
    if not engines:
        raise InvalidInput([InputError("--engine", "name engines, or a file with --config")])
    listen = Listen(host=str(given["--host"] or LOOPBACK), port=int(given["--port"] or DEFAULT_PORT))
    admin = Listen(port=int(given["--admin-port"] or DEFAULT_ADMIN_PORT))
    return GatewayConfig(listen=listen, admin=admin, engines=tuple(name_engines(engines)))


def name_engines(urls: list[str]) -> Iterator[EngineAddress]:
    """Plain vLLM servers, each named by its host and port.

    Raises:
        InvalidInput: an address is of another form than `http://HOST[:PORT]`, or is given twice.
    """
    names = set()
    for url in urls:
        try:
            address = parse_model(EngineAddress, {"name": urlsplit(url).netloc.lower(), "url": url})
        except (InvalidInput, ValueError):
            message = f"an address such as http://127.0.0.1:8001 is needed, got {url[:80]!r}"
            raise InvalidInput([InputError("--engine", message)]) from None
        if address.name in names:
            raise InvalidInput([InputError("--engine", f"{url} is given twice")])
        names.add(address.name)
        yield address


async def _run(served: Gateway) -> None:
    stop, force_stop = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (force_stop if stop.is_set() else stop).set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    await run_gateway(served, stop, force_stop)
