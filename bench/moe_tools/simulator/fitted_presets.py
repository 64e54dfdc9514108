"""Presets of fitted step times: the table `step_times.csv` beside this module, one line for each preset.

Made by `python -m moe_lab.step_times fit`; not to be edited by hand. A preset is of one GPU, model and parallelism: of
its ranks no other number was measured.
"""

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from types import MappingProxyType

from moe_tools.simulator.step_time import Coefficients, FittedCost, StepModel

TABLE = "step_times.csv"
SIZES = ("experts", "top_k", "expert_ranks", "ranks")
COLUMNS = ("preset", *SIZES, "kv_blocks", "measurements", "source", *Coefficients._fields)


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedPreset:
    """Fitted step times of one engine.

    Attributes:
        model: of the engine.
        coefficients: fitted.
        kv_blocks: of 16 tokens that a rank has.
        measurements: fitted on.
        source: of the measured times, for reports.
    """

    model: StepModel
    coefficients: Coefficients
    kv_blocks: int
    measurements: int
    source: str

    @property
    def ranks(self) -> int:
        """Ranks of the group that was measured."""
        return self.model.ranks

    def cost(self, ranks: int) -> FittedCost:
        """Returns the cost of a group.

        Raises:
            ValueError: it was fitted for another number of ranks.
        """
        if ranks != self.model.ranks:
            raise ValueError(f"was fitted on {self.model.ranks} ranks in lockstep, not on {ranks}")
        return FittedCost(
            model=self.model, coefficients=self.coefficients, source=self.source, memory_blocks=self.kv_blocks
        )


def parse_presets(text: str) -> Mapping[str, FittedPreset]:
    """Returns the presets of a table in CSV.

    Raises:
        KeyError: a column is missing.
        ValueError: a cell is no number.
    """
    return MappingProxyType({row["preset"]: _preset(row) for row in csv.DictReader(text.splitlines())})


def _preset(row: Mapping[str, str]) -> FittedPreset:
    return FittedPreset(
        model=StepModel(
            experts=int(row["experts"]),
            top_k=int(row["top_k"]),
            expert_ranks=int(row["expert_ranks"]),
            ranks=int(row["ranks"]),
        ),
        coefficients=Coefficients(**{name: float(row[name]) for name in Coefficients._fields}),
        kv_blocks=int(row["kv_blocks"]),
        measurements=int(row["measurements"]),
        source=row["source"],
    )


def render_presets(presets: Mapping[str, FittedPreset]) -> str:
    """Returns the table in CSV; seconds with four digits."""
    lines = [",".join(COLUMNS)]
    for name, preset in presets.items():
        sizes = [str(getattr(preset.model, size)) for size in SIZES]
        seconds = [f"{value:.4g}" for value in preset.coefficients]
        source = f'"{preset.source}"'
        lines.append(",".join([name, *sizes, str(preset.kv_blocks), str(preset.measurements), source, *seconds]))
    return "\n".join(lines) + "\n"


FITTED_PRESETS = parse_presets((resources.files(__package__) / TABLE).read_text("utf-8"))
