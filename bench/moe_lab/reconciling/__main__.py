"""`python -m moe_lab.reconciling --kubeconfig FILE`: many resources under one operator; prints the table."""

import asyncio
import json
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from moe_contract.api_server import LoginError
from moe_contract.input_errors import InputError, InvalidInput
from moe_tools.progress_printer import ProgressPrinter
from moe_tools.user_errors import report_user_errors

from moe_lab.reconciling.bound import Bound
from moe_lab.reconciling.build_crd import Document, read_crd
from moe_lab.reconciling.cluster import connect
from moe_lab.reconciling.measurement import BenchmarkSetting, ReconcilingResult, measure
from moe_lab.reconciling.pairs import BuildPair, build_pairs_document, measure_pairs, report_pairs
from moe_lab.reconciling.process import find_servers
from moe_lab.reconciling.report import build_document, report
from moe_lab.reconciling.stand_in import stand_in

app = typer.Typer(add_completion=False)
# Of the table, which has more columns than a narrow terminal.
WIDTH = 140


@app.command()
@report_user_errors
def main(
    kubeconfig: Annotated[Path, typer.Option(help="An API server of its own: it is filled and emptied.")],
    resources: Annotated[int, typer.Option(min=1, max=30_000, help="How many.")] = 1000,
    changes: Annotated[int, typer.Option(min=1, help="Changes of single resources, one after the other.")] = 50,
    idle: Annotated[float, typer.Option(min=1.0, help="Seconds of idleness that are looked at.")] = 60.0,
    beside: Annotated[
        Path | None,
        typer.Option(
            help="Interpreter of another build's environment: its operator is measured first, in the same way."
        ),
    ] = None,
    pairs: Annotated[
        int,
        typer.Option(min=0, help="Pairs that measure from nothing alone, the builds in turns; 0 measures all once."),
    ] = 0,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write all figures here.")] = None,
) -> None:
    """Time to converge, length of a pass, memory, and calls of the operator under many resources."""
    progress = ProgressPrinter()
    try:
        with tempfile.TemporaryDirectory(prefix="bench-operator-") as folder:
            common = BenchmarkSetting(
                kubeconfig=kubeconfig,
                log=Path(folder, "now.log"),
                python=Path(sys.executable),
                resources=resources,
                changes=changes,
                idle_s=idle,
                servers=find_servers(kubeconfig),
            )
            settings = {"now": common}
            if beside is not None:
                settings = {"before": replace(common, log=Path(folder, "before.log"), python=beside)} | settings
            crds = {build: read_crd(setting.python) for build, setting in settings.items()}
            if pairs:
                _write(json_out, build_pairs_document(asyncio.run(_run_pairs(settings, crds, pairs, progress))))
                return
            bound, builds = asyncio.run(_run(settings, crds, progress))
    except (LoginError, OSError) as error:
        raise InvalidInput([InputError("--kubeconfig", str(error))]) from None
    except RuntimeError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None
    progress.console.width = max(progress.console.width, WIDTH)
    plans_differ = any(crd != crds["now"] for crd in crds.values())
    for line in report(bound, builds, plans_differ=plans_differ):
        progress.console.print(line, highlight=False, soft_wrap=True)
    _write(json_out, build_document(bound, builds))


def _write(path: Path | None, document: Mapping[str, object]) -> None:
    if path is not None:
        path.write_text(json.dumps(document, indent=1) + "\n", "utf-8")


async def _run(
    settings: Mapping[str, BenchmarkSetting], crds: Mapping[str, Document], progress: ProgressPrinter
) -> tuple[Bound, dict[str, ReconcilingResult]]:
    first = next(iter(settings.values()))
    measured = {}
    async with connect(first.kubeconfig) as cluster, stand_in(cluster.pods) as peers:
        await cluster.prepare(crds["now"])
        names = [f"b{number:05d}" for number in range(first.resources)]
        bound = await cluster.bound(names, first.servers.values())
        progress(f"a bare client makes {bound.writes} writes in {bound.seconds:.1f} s")
        for build, setting in settings.items():
            progress(f"the build {build}: {setting.python}")
            await cluster.prepare(crds[build])
            measured[build] = await measure(cluster, peers, setting, progress)
    return bound, measured


async def _run_pairs(
    settings: Mapping[str, BenchmarkSetting], crds: Mapping[str, Document], pairs: int, progress: ProgressPrinter
) -> list[BuildPair]:
    """Measures the pairs and prints their ratios."""
    first = next(iter(settings.values()))
    async with connect(first.kubeconfig) as cluster:
        measured = await measure_pairs(cluster, settings, crds, pairs, progress)
    for row in report_pairs(measured, first.resources):
        progress.console.print(row, highlight=False, soft_wrap=True)
    return measured


if __name__ == "__main__":
    app()
