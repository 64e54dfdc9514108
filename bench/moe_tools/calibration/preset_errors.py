"""Errors of the presets of fitted step times: the table `preset_errors.csv` beside this module.

Made by `python -m moe_lab.step_times errors DATA --csv FILE`; not to be edited by hand. Shown beside results that were
simulated with a preset.
"""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from types import MappingProxyType

from moe_tools.calibration.step_errors import ErrorRow, StepKind

TABLE = "preset_errors.csv"
COLUMNS = ("preset", "compared", "kind", "measurements", "median", "p90")
# Composed steps are no measurements: nothing is held out, and the fit's error on them says nothing of an engine.
COMPOSED = "composed steps"


@dataclass(frozen=True, slots=True, kw_only=True)
class PresetError:
    """Relative errors of one kind of steps.

    Attributes:
        compared: what the preset was compared with: `held-out runs`, `held-out shapes` or `composed steps`.
        kind: of the steps.
        measurements: how many.
        median: of their errors.
        p90: 90th percentile of their errors.
    """

    compared: str
    kind: StepKind
    measurements: int
    median: float
    p90: float


def parse_errors(text: str) -> Mapping[str, Sequence[PresetError]]:
    """Returns the errors of a table in CSV, by preset.

    Raises:
        KeyError: a column is missing.
        ValueError: a cell is no number, or no kind of steps.
    """
    found: dict[str, list[PresetError]] = {}
    for row in csv.DictReader(text.splitlines()):
        error = PresetError(
            compared=row["compared"],
            kind=StepKind(row["kind"]),
            measurements=int(row["measurements"]),
            median=float(row["median"]),
            p90=float(row["p90"]),
        )
        found.setdefault(row["preset"], []).append(error)
    return MappingProxyType(found)


def render_error_table(errors: Mapping[tuple[str, str], Sequence[ErrorRow]]) -> str:
    """Returns the table in CSV, by preset and what it was compared with; errors with four digits."""
    lines = [",".join(COLUMNS)]
    for (preset, compared), rows in sorted(errors.items()):
        lines += [f"{preset},{compared},{row.kind},{row.measurements},{row.median:.4f},{row.p90:.4f}" for row in rows]
    return "\n".join(lines) + "\n"


def describe_errors(preset: str) -> str:
    """Returns the median errors of a preset in words, and what it was compared with.

    Raises:
        KeyError: the table does not have the preset.
    """
    rows = PRESET_ERRORS[preset]
    errors = ", ".join(f"{row.kind} {row.median:.1%}" for row in rows)
    if rows[0].compared == COMPOSED:
        return f"{errors} of the composed steps, compared with no engine"
    return f"{errors} on {rows[0].compared}"


PRESET_ERRORS = parse_errors((resources.files(__package__) / TABLE).read_text("utf-8"))
