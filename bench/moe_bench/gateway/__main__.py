"""`python -m moe_bench.gateway --vllm-router PATH`: starts everything, measures, prints the table."""

import asyncio
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Annotated

import typer
import uvloop
from moe_scheduling.problems import InvalidInput, Problem

from moe_bench.complaints import told_plainly
from moe_bench.gateway.comparison import build_document, compare, render_comparison
from moe_bench.gateway.processes import running
from moe_bench.narration import Narrator

app = typer.Typer(add_completion=False)


@app.command()
@told_plainly
def main(
    vllm_router: Annotated[Path, typer.Option("--vllm-router", help="The program vllm-router.")],
    pairs: Annotated[int, typer.Option(min=2, help="Alternating pairs of each measurement.")] = 8,
    seconds: Annotated[float, typer.Option(min=0.5, help="Length of one measurement.")] = 2.0,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write figures and raw pairs here.")] = None,
) -> None:
    """Compare the gateway with vllm-router: requests and SSE chunks per CPU second, and added latency."""
    version = read_version(vllm_router)
    narrator = Narrator()
    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    with tempfile.TemporaryDirectory(prefix="bench-gateway-") as folder, running(vllm_router, Path(folder)) as bed:
        narrator("two mock engines, the gateway and vllm-router are up")
        compared = compare(bed, pairs=pairs, seconds=seconds, told=narrator)
    narrator.console.print(render_comparison(compared, version))
    if json_out is not None:
        json_out.write_text(json.dumps(build_document(compared, version, seconds), indent=1) + "\n", "utf-8")


def read_version(vllm_router: Path) -> str:
    """The version of the package that the program comes with, as its environment's Python tells it.

    Raises:
        InvalidInput: there is no such program.
    """
    if not vllm_router.is_file():
        raise InvalidInput([Problem("--vllm-router", f"no such file: {vllm_router}")])
    script = "from importlib.metadata import version; print(version('vllm-router'))"
    python = vllm_router.parent / "python"
    told = subprocess.run([python, "-c", script], capture_output=True, text=True, check=False)
    return told.stdout.strip() or "of unknown version"


if __name__ == "__main__":
    app()
