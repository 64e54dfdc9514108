"""`python -m moe_lab`: runs every micro-benchmark of this package and prints what it measured.

A micro-benchmark is a module here with `run() -> Iterable[BenchmarkRow]`; it is found by that function alone.
"""

import ast
import importlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from moe_tools.report import read_environment
from moe_tools.statistics import estimate, percentile_of
from rich.console import Console
from rich.table import Table

from moe_lab.rows import BenchmarkRow


def main() -> None:
    """Prints the table as a whole at the end, and each module's name as it runs."""
    console = Console()
    rows: list[BenchmarkRow] = []
    for name in find_benchmarks(Path(__file__).parent):
        console.print(f"{name} ...", style="dim")
        rows.extend(importlib.import_module(f"moe_lab.{name}").run())
    console.print(render_rows(rows))


def find_benchmarks(folder: Path) -> Iterator[str]:
    """Modules that define `run` without a parameter, read from their source: nothing is imported to look."""
    for path in sorted(folder.glob("*.py")):
        tree = ast.parse(path.read_text("utf-8"))
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.name == "run" and not node.args.args:
                yield path.stem


def render_rows(rows: Iterable[BenchmarkRow]) -> Table:
    """Median with its interval, and p99, of each case."""
    environment = read_environment()
    packages = ", ".join(f"{name} {version}" for name, version in environment["packages"].items())
    table = Table(
        title="Micro-benchmarks",
        caption=f"Python {environment['python']}, {environment['cores']} cores; {packages}",
        caption_justify="left",
        title_justify="left",
    )
    for heading in ("benchmark", "case", "median [95 % interval]", "p99", "unit", "n", "goal"):
        table.add_column(heading, justify="left" if heading in ("benchmark", "case", "unit", "goal") else "right")
    for row in rows:
        table.add_row(*_cells(row))
    return table


def _cells(row: BenchmarkRow) -> tuple[str, ...]:
    middle = estimate(row.values, percentile_of(50))
    return (
        row.benchmark,
        row.case,
        f"{middle.value:.4g} [{middle.low:.4g}, {middle.high:.4g}]",
        f"{np.percentile(row.values, 99):.4g}",
        row.unit,
        f"{middle.count}",
        row.goal,
    )


if __name__ == "__main__":
    main()
