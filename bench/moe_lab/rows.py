"""One line of a micro-benchmark's report.

A module of this package that measures something has `run() -> Iterable[BenchmarkRow]`; `python -m moe_lab` finds it,
runs it and prints its rows. A row keeps every measured value, so that the report can state its spread and its sample
size.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkRow:
    """What one case measured: `values` are repetitions of the same measurement in `unit`, at least one."""

    benchmark: str
    case: str
    unit: str
    values: Sequence[float]
    goal: str = ""

    def __post_init__(self) -> None:
        if not self.values:
            raise ValueError(f"{self.benchmark}, {self.case}: a row needs at least one value")
