"""`python -m moe_lab.gateway --vllm-router PATH`: starts everything, measures, prints the table."""

import asyncio
import json
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer
import uvloop
from moe_contract.input_errors import InputError, InvalidInput
from moe_tools.progress_printer import ProgressPrinter
from moe_tools.user_errors import report_user_errors

from moe_lab.gateway.comparison import (
    build_document,
    compare,
    describe,
    read_machine,
    render_comparison,
    warn_if_busy,
)
from moe_lab.gateway.processes import DEFAULT_POLICY, POLICIES, running

app = typer.Typer(add_completion=False)


@app.command()
@report_user_errors
def main(
    vllm_router: Annotated[Path, typer.Option("--vllm-router", help="The program vllm-router.")],
    policy: Annotated[str, typer.Option(help=f"Policy of vllm-router: {', '.join(POLICIES)}.")] = DEFAULT_POLICY,
    pairs: Annotated[int, typer.Option(min=2, help="Alternating pairs of each measurement.")] = 8,
    seconds: Annotated[float, typer.Option(min=0.5, help="Length of one measurement.")] = 2.0,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write figures and raw pairs here.")] = None,
) -> None:
    """Compare the gateway with vllm-router: requests and SSE chunks per CPU second, and added latency."""
    if policy not in POLICIES:
        raise InvalidInput([InputError("--policy", f"unknown {policy!r}; known: {', '.join(POLICIES)}")])
    machine = read_machine(read_version(vllm_router), policy)
    progress = ProgressPrinter()
    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    # The usual signal that ends this process ends the processes that it started, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        with (
            tempfile.TemporaryDirectory(prefix="bench-gateway-") as folder,
            running(vllm_router, Path(folder), policy) as testbed,
        ):
            progress("two mock engines, the gateway and vllm-router are up")
            compared = compare(testbed, pairs=pairs, seconds=seconds, progress=progress)
    except RuntimeError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None
    progress.console.print(render_comparison(compared, machine))
    for line in [*map(describe, compared), *warn_if_busy(machine)]:
        progress.console.print(line, highlight=False, soft_wrap=True)
    if json_out is not None:
        json_out.write_text(json.dumps(build_document(compared, machine, seconds), indent=1) + "\n", "utf-8")


def read_version(vllm_router: Path) -> str:
    """The version of the package that the program comes with, by its environment's Python.

    Raises:
        InvalidInput: there is no such program.
    """
    if not vllm_router.is_file():
        raise InvalidInput(
            [InputError("--vllm-router", f"no such file: {vllm_router}; `make bench-gateway` installs it")]
        )
    script = "from importlib.metadata import version; print(version('vllm-router'))"
    try:
        answer = subprocess.run(
            [vllm_router.parent / "python", "-c", script], capture_output=True, text=True, check=False
        )
    except OSError:
        return "of unknown version"
    return answer.stdout.strip() or "of unknown version"


if __name__ == "__main__":
    app()
