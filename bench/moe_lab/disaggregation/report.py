"""Tables of the runs: for each load, the arrangements beside the reference; geometric means over workloads and seeds.

A pair is one workload, load and seed under two arrangements: the same requests at the same times. A ratio is the
geometric mean over the pairs, with a 95 % t interval on the logarithms.
"""

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from moe_tools.statistics import paired_ratio

from moe_lab.disaggregation.arrangements import REFERENCE, arrangements

COLUMNS = {
    "ttft_mean": "mean TTFT",
    "ttft_p99": "P99 TTFT",
    "tpot_mean": "mean TPOT",
    "tpot_p99": "P99 TPOT",
    "end_mean": "time to the last token",
    "good_per_s": "goodput",
}
Record = Mapping[str, Any]
# Workload, count and seed; then the arrangement.
_Pairs = dict[tuple[str, int, int], dict[str, Record]]


def render(records: Iterable[Record], base: str = REFERENCE) -> str:
    """All tables: one for each clock, number of GPUs and load over all workloads, and one for each workload.

    Args:
        records: of the runs; the last one of an id counts.
        base: the arrangement that the others are compared with.
    """
    cases: dict[tuple[str, int, float], _Pairs] = defaultdict(lambda: defaultdict(dict))
    for record in {record["id"]: record for record in records}.values():
        if record["load"]:
            key = (record["workload"], record["count"], record["seed"])
            cases[record["clock"], record["gpus"], record["load"]][key][_name(record)] = record
    parts = []
    for (clock, gpus, load), pairs in sorted(cases.items()):
        place = f"{clock}, {gpus} GPUs, load {load:g}"
        workloads = sorted({workload for workload, _, _ in pairs})
        if len(workloads) > 1:
            parts.append(_table(f"{place}, {', '.join(workloads)}", pairs, base))
        for workload in workloads:
            own = {key: rows for key, rows in pairs.items() if key[0] == workload}
            parts.append(_table(f"{place}, {workload}", own, base))
    return "\n\n".join(parts)


def _name(record: Record) -> str:
    """The arrangement, with the fields of the objective that are not the usual ones."""
    return "/".join([record["arrangement"], *record["id"].split("/")[7:]])


def _table(title: str, pairs: _Pairs, base: str) -> str:
    names = {name for rows in pairs.values() for name in rows}
    lines = [f"### {title}", "", f"| | {' | '.join(COLUMNS.values())} | pairs | runs |"]
    lines.append("|---" * (len(COLUMNS) + 3) + "|")
    for name in sorted(names, key=lambda name: _order(name, next(iter(pairs.values())))):
        both = [(rows[base], rows[name]) for rows in pairs.values() if name in rows and base in rows]
        if both:
            lines.append(_line(name, both))
    return "\n".join(lines)


def _order(name: str, rows: Mapping[str, Record]) -> tuple[int, str]:
    record = next(iter(rows.values()))
    known = list(arrangements(record["gpus"], record["clock"]))
    first = name.split("/", maxsplit=1)[0]
    return (known.index(first) if first in known else len(known), name)


def _line(name: str, both: Sequence[tuple[Record, Record]]) -> str:
    cells = []
    for column in COLUMNS:
        values = [(one["figures"][column], other["figures"][column]) for one, other in both]
        values = [(one, other) for one, other in values if one > 0 < other]
        if not values:
            cells.append("-")
            continue
        ratio = paired_ratio(values)
        mean = statistics.fmean(other for _, other in values)
        shown = f"{mean:.1f} /s" if column == "good_per_s" else f"{mean * 1e3:.0f} ms"
        interval = f", {ratio.low:.2f}-{ratio.high:.2f}" if len(values) > 1 else ""
        cells.append(f"{ratio.value:.2f}{interval} ({shown})")
    share = statistics.fmean(other["pairs"] for _, other in both)
    return f"| {name} | {' | '.join(cells)} | {share:.0%} | {len(both)} |"
