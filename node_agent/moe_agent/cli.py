"""`moeserving agent --config FILE`, also `python -m moe_agent --config FILE`."""

import asyncio
import logging
import sys
from pathlib import Path
from typing import Annotated

import typer
from moe_contract.agent_config import load_agent_config
from moe_contract.input_errors import InvalidInput

from moe_agent.app import run_agent

app = typer.Typer(add_completion=False, rich_markup_mode=None, help="Run one engine and its node agent.")

_BAD_INPUT_STATUS = 2


@app.callback(invoke_without_command=True)
def agent(config: Annotated[Path, typer.Option(help="The agent's configuration, a JSON file.")]) -> None:
    """Starts one engine, watches it and publishes what it knows, until SIGTERM (drain) or a second one (now)."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        asyncio.run(run_agent(load_agent_config(config)))
    except InvalidInput as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(_BAD_INPUT_STATUS) from None
