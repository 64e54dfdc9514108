"""`moeserving epp`: the endpoint picker alone, for engines by address or with the gateway's configuration file."""

from pathlib import Path
from typing import Annotated, Any

import typer
from moe_contract.addresses import LOOPBACK
from moe_contract.control_tokens import ControlTokens
from moe_contract.gateway_config import GatewayConfig, Limits, load_gateway_config
from moe_contract.input_errors import InputError, InvalidInput
from moe_contract.picker_config import PICKER_PORT, EndpointPickerConfig
from moe_contract.sections import Listen

from moe_gateway.cli import DEFAULT_ADMIN_PORT, name_engines, run_until_signal
from moe_gateway.gateway import Gateway

app = typer.Typer(add_completion=False, rich_markup_mode=None)
_PORT: dict[str, Any] = {"min": 1, "max": 65535}
_FILE = typer.Option(
    help="A gateway's configuration with `endpoint_picker`, a JSON file; its `listen` stays closed.", show_default=False
)
_ENGINE = typer.Option(
    help="Instead of a file: address of a vLLM server, such as http://10.0.0.5:8000; once for each.", show_default=False
)
_HOST = typer.Option(help="With --engine: address to listen on.", show_default=LOOPBACK)
_PICKER_PORT = typer.Option(**_PORT, help="With --engine: port for proxies (gRPC).", show_default=str(PICKER_PORT))
_ADMIN_PORT = typer.Option(
    **_PORT,
    help="With --engine: port of metrics and state, on the loopback address.",
    show_default=str(DEFAULT_ADMIN_PORT),
)
_TLS = typer.Option("--tls", help="With --engine: serve TLS, with a certificate that is made at the start.")
_FALLBACKS = typer.Option(
    min=0, max=8, help="With --engine: further engines to name, for proxies that retry.", show_default="0"
)
_HOLD = typer.Option(
    min=0,
    help="With --engine: requests held while none of the engines takes more; 0 refuses them at once.",
    show_default=str(Limits().hold_requests),
)


@app.command("epp")
def epp(
    config: Annotated[Path | None, _FILE] = None,
    engine: Annotated[list[str] | None, _ENGINE] = None,
    host: Annotated[str | None, _HOST] = None,
    port: Annotated[int | None, _PICKER_PORT] = None,
    admin_port: Annotated[int | None, _ADMIN_PORT] = None,
    tls: Annotated[bool, _TLS] = False,
    fallbacks: Annotated[int | None, _FALLBACKS] = None,
    hold: Annotated[int | None, _HOLD] = None,
    access_log: Annotated[bool, typer.Option(help="Log every request, not only those that went wrong.")] = False,
) -> None:
    """Pick the engine of each request for another proxy: an external processor for Envoy, for an InferencePool."""
    given = {
        "--host": host,
        "--port": port,
        "--admin-port": admin_port,
        "--tls": tls or None,
        "--fallbacks": fallbacks,
        "--hold": hold,
    }
    try:
        settings = _load(config, engine or [], given) if config is not None else _build(engine or [], given)
        served = Gateway(settings, ControlTokens(settings.token_file), access_log=access_log)
    except InvalidInput as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None
    run_until_signal(served)


def _load(path: Path, engines: list[str], given: dict[str, Any]) -> GatewayConfig:
    """The configuration of a file, without its port for clients.

    Raises:
        InvalidInput: the file is not valid or has no endpoint picker, or the options are for engines by address.
    """
    others = {"--engine": engines or None, **given}
    if errors := [InputError(name, "is in the file of --config") for name, row in others.items() if row is not None]:
        raise InvalidInput(errors)
    loaded = load_gateway_config(path)
    if loaded.endpoint_picker is None:
        raise InvalidInput(
            [InputError("endpoint_picker", "the section is missing, such as {'listen': {'port': 9002}}")]
        )
    return loaded.model_copy(update={"listen": None})


def _build(engines: list[str], given: dict[str, Any]) -> GatewayConfig:
    """The configuration for these engines.

    Raises:
        InvalidInput: there are none, or an address is not valid.
    """
    if not engines:
        raise InvalidInput([InputError("--engine", "name engines, or a file with --config")])
    listen = Listen(host=given["--host"] or LOOPBACK, port=given["--port"] or PICKER_PORT)
    hold = given["--hold"]
    return GatewayConfig(
        listen=None,
        admin=Listen(port=given["--admin-port"] or DEFAULT_ADMIN_PORT),
        engines=tuple(name_engines(engines)),
        limits=Limits() if hold is None else Limits(hold_requests=hold),
        endpoint_picker=EndpointPickerConfig(
            listen=listen, tls=bool(given["--tls"]), fallbacks=given["--fallbacks"] or 0
        ),
    )
