"""What the runs say: means over seeds, ratios in pairs, the best rival of each column, knees, sustained loads. Pure.

A pair is one workload and seed at one load under two variants: the same requests at the same times. A ratio is the
geometric mean over pairs with a 95 % t interval on the logarithms.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from moe_tools.simulator.saturation import KNEE_FACTOR
from moe_tools.statistics import Estimate, paired_ratio

from moe_lab.experiments.variants import PRODUCT, REFERENCE, VARIANTS

# Targets of a sustained load: a first token within 2 s for 99 of 100, and 20 tokens a second for the mean reader.
TTFT_TARGET_S = 2.0
TPOT_TARGET_S = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A figure of a run that is compared."""

    name: str
    label: str
    unit: str
    scale: float = 1000.0
    higher_is_better: bool = False


COLUMNS = (
    Column(name="ttft_mean", label="TTFT mean", unit="ms"),
    Column(name="ttft_p99", label="TTFT P99", unit="ms"),
    Column(name="ttft_p99_longest", label="TTFT P99, longest tenth", unit="ms"),
    Column(name="tpot_mean", label="TPOT mean", unit="ms"),
    Column(name="tpot_p99", label="TPOT P99", unit="ms"),
    Column(name="output_tokens_per_s", label="output tokens", unit="/s", scale=1.0, higher_is_better=True),
    Column(name="jain", label="Jain index", unit="", scale=1.0, higher_is_better=True),
)
BY_NAME = {column.name: column for column in COLUMNS}
TENANT_COLUMNS = (
    Column(name="ttft_light", label="TTFT mean, light tenants", unit="ms"),
    Column(name="ttft_heavy", label="TTFT mean, the others", unit="ms"),
    Column(name="jain_tenants", label="index of tenants", unit="", scale=1.0, higher_is_better=True),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One fleet, workload and load (part of the fleet's capacity) at which variants are compared."""

    fleet: str
    workload: str
    load: float


class Results:
    """All records, found by case, variant and seed.

    Args:
        records: lines of the file of results; those of the same id replace each other, the last one counts.
    """

    def __init__(self, records: Iterable[Mapping[str, Any]]) -> None:
        self._figures: dict[Case, dict[str, dict[int, Mapping[str, float]]]] = defaultdict(lambda: defaultdict(dict))
        self.runs = 0
        self.seeds: set[int] = set()
        for record in {record["id"]: record for record in records}.values():
            if record["load"] == 0:
                continue
            case = Case(fleet=fleet_name(record["fleet"]), workload=record["workload"], load=record["load"])
            self._figures[case][record["variant"]][record["seed"]] = record["figures"]
            self.runs += 1
            self.seeds.add(record["seed"])

    @property
    def cases(self) -> list[Case]:
        """Returns all cases, ordered by fleet, workload and load."""
        return sorted(self._figures, key=lambda case: (case.fleet, case.workload, case.load))

    def variants(self, case: Case) -> list[str]:
        """The variants that were run at the knee, or at loads on both sides, in the order of their table."""
        around = [self._figures[side] for side in self._around(case)]
        return [name for name in VARIANTS if around and all(name in rows for rows in around)]

    def values(self, case: Case, variant: str, column: str) -> dict[int, float]:
        """The figure by seed; between two measured loads on a line of the logarithms."""
        sides = self._around(case)
        rows = [
            {
                seed: figures[column]
                for seed, figures in self._figures[side].get(variant, {}).items()
                if column in figures
            }
            for side in sides
        ]
        if len(rows) < 2:
            return rows[0] if rows else {}
        (low, high), (first, second) = (side.load for side in sides), rows
        share = (case.load - low) / (high - low)
        return {
            seed: math.exp((1 - share) * math.log(first[seed]) + share * math.log(second[seed]))
            for seed in first.keys() & second.keys()
            if first[seed] > 0 < second[seed]
        }

    def _around(self, case: Case) -> list[Case]:
        """The case, or those of the nearest measured loads below and above; none where there are not both."""
        if case in self._figures:
            return [case]
        loads = self.loads(case.fleet, case.workload)
        sides = [max((load for load in loads if load < case.load), default=None)]
        sides.append(min((load for load in loads if load > case.load), default=None))
        return [replace(case, load=load) for load in sides if load is not None] if None not in sides else []

    def mean(self, case: Case, variant: str, column: str) -> float:
        """Over the seeds; NaN where there is none."""
        values = list(self.values(case, variant, column).values())
        return float(np.mean(values)) if values else math.nan

    def pairs(self, case: Case, first: str, second: str, column: str) -> list[tuple[float, float]]:
        """The figure of both, seed by seed."""
        one, other = self.values(case, first, column), self.values(case, second, column)
        return [(one[seed], other[seed]) for seed in sorted(one.keys() & other.keys()) if one[seed] > 0 < other[seed]]

    def ratio(self, case: Case, first: str, second: str, column: str) -> Estimate | None:
        """second / first; None without a pair."""
        pairs = self.pairs(case, first, second, column)
        return paired_ratio(pairs) if pairs else None

    def best_rival(self, case: Case, column: str) -> str | None:
        """The rival with the best mean of the figure: tuned for each case and each column by itself."""
        means = {
            name: self.mean(case, name, column)
            for name in self.variants(case)
            if VARIANTS[name].is_rival and self.values(case, name, column)
        }
        if not means:
            return None
        best = max if BY_NAME[column].higher_is_better else min
        return best(means, key=means.__getitem__)

    def against_best(self, cases: Sequence[Case], column: str, chosen_by: str | None = None) -> Estimate | None:
        """ours / the best rival of each case, over the pairs of all these cases.

        Args:
            cases: which; at a load between two measured ones figures are interpolated.
            column: the figure that is compared.
            chosen_by: the figure that the rival is the best in; None: the compared one.
        """
        pairs = [
            pair
            for case in cases
            if (rival := self.best_rival(case, chosen_by or column)) is not None
            for pair in self.pairs(case, rival, PRODUCT, column)
        ]
        return paired_ratio(pairs) if pairs else None

    def against(self, cases: Sequence[Case], rival: str, column: str) -> Estimate | None:
        """ours / this rival, over the pairs of all these cases."""
        pairs = [pair for case in cases for pair in self.pairs(case, rival, PRODUCT, column)]
        return paired_ratio(pairs) if pairs else None

    def loads(self, fleet: str, workload: str) -> list[float]:
        """At which this workload was run."""
        return sorted(case.load for case in self._figures if (case.fleet, case.workload) == (fleet, workload))

    def knee(self, fleet: str, workload: str) -> float | None:
        """The load at which the best rival's mean TTFT is five times that on an idle engine; between measured loads."""
        points = []
        for load in self.loads(fleet, workload):
            case = Case(fleet=fleet, workload=workload, load=load)
            rival = self.best_rival(case, "ttft_mean")
            if rival is not None:
                points.append((load, self.mean(case, rival, "ttft_mean") / self.mean(case, REFERENCE, "ttft_floor")))
        return crossing(points, KNEE_FACTOR)

    def knee_cases(self, fleet: str, workloads: Iterable[str]) -> list[Case]:
        """Each workload at its knee, where it was found."""
        knees = {workload: self.knee(fleet, workload) for workload in workloads}
        return [Case(fleet=fleet, workload=name, load=load) for name, load in knees.items() if load is not None]

    def sustained(self, fleet: str, workload: str, variant: str) -> float | None:
        """The greatest load at which both targets are met; None when none of the measured ones is."""
        least = math.inf
        for column, target in (("ttft_p99", TTFT_TARGET_S), ("tpot_mean", TPOT_TARGET_S)):
            points = [
                (load, value)
                for load in self.loads(fleet, workload)
                if not math.isnan(value := self.mean(Case(fleet=fleet, workload=workload, load=load), variant, column))
            ]
            if not points or points[0][1] > target:
                return None
            least = min(least, crossing(points, target) or points[-1][0])
        return least


def crossing(points: Sequence[tuple[float, float]], level: float) -> float | None:
    """Where values that belong to rising places first go above a level, on a line of the logarithms between two."""
    before: tuple[float, float] | None = None
    for place, value in points:
        if value > level:
            if before is None:
                return place
            share = math.log(level / before[1]) / math.log(value / before[1])
            return before[0] + share * (place - before[0])
        before = (place, value)
    return None


def fleet_name(fleet: Mapping[str, Any]) -> str:
    """Returns preset, number of servers and ranks in words, for tables."""
    ranks = f"{fleet['ranks']} ranks in lockstep" if fleet["ranks"] > 1 else "1 rank"
    servers = f"{fleet['servers']} servers of {ranks}" if fleet["servers"] > 1 else f"one server of {ranks}"
    return f"{fleet['preset']}, {servers}"
