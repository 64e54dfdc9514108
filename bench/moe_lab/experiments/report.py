"""`docs/results/`: the tables, the plots and `summary.json`, made of a file of results and of nothing else.

Each figure that a page of the project states comes from `summary.json`. The text says which figures are
modelled, and where the product is worse.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_contract.input_errors import InputError, InvalidInput
from moe_tools.calibration.preset_errors import PRESET_ERRORS
from moe_tools.calibration.step_errors import StepKind
from moe_tools.comparison import render_ratio
from moe_tools.simulator.saturation import KNEE_FACTOR
from moe_tools.statistics import Estimate

from moe_lab.experiments.plots import plot_workload
from moe_lab.experiments.results import (
    COLUMNS,
    TENANT_COLUMNS,
    TPOT_TARGET_S,
    TTFT_TARGET_S,
    Case,
    Column,
    Results,
    fleet_name,
)
from moe_lab.experiments.runner import is_current, read_records, source_digests
from moe_lab.experiments.variants import PRODUCT, REFERENCE, VARIANTS
from moe_lab.experiments.workloads import ALL, KEPT_APART, WORKLOADS

_INTRODUCTION = """# Results of the simulator

Made by `python -m moe_lab.experiments report`; do not edit. Nothing here was measured on a GPU: queue order, admission,
caches, preemption and dispatch are vLLM's and the product's own code, step times are **modelled**: fitted to published
measurements ([how](../simulator.md#fitted-step-times)). A load is a part of the rate at which vLLM 0.32's mean TTFT is
five times that of an idle engine, measured for each workload and seed. Ratios are ours / the other: below 1 is better
for times. In brackets the 95 % t interval over pairs, the same requests at the same times.
"""
_SEEDS = f"""Nothing of the product was chosen on these seeds ({KEPT_APART} and up): other requests of each shape, and
pieces of the traces that share no request with those of seeds 1 to 4. Seeds below are for tuning, and in no table. But
for one thing: that the ranks of an engine had unlike step-time models was seen on seed 101, and mended on 1 and 2.
"""
_CLOCKS = """## Step times

A fleet's name is that of its preset. Errors are those of single steps that were not fitted on (median, p90); with step
times composed of kernels those of the fit to the composed steps, which were compared with no engine. Steps were
measured with at most 8,192 tokens and 32 decoding requests a rank (9 with four data-parallel ranks, 17 with two):
beyond that, as near saturation and with 16,384 tokens a step, the fit is extrapolated. An engine has steps of 8,192
tokens unless a row says otherwise; vLLM 0.32's default on a B300 is 16,384.
"""
# The words of the README for the step times.
CLOCK = "step times fitted to measured engines"
AT_KNEE = {
    "against_vllm": "vLLM 0.32 as it comes",
    "against_best_in_ttft": "the best in mean TTFT of each workload",
    "against_best": "the best of each workload and column",
}
_BY_LOAD = """## By load

Over all workloads but the adversarial ones: the geometric mean of ours / the rival. In the first row of a load the
rival is vLLM as it comes, in the second the one with the best mean TTFT of each workload, in the third the best of each
column and each workload (policy, budget, router), which is no system that one could run. A rival is the best by the
mean over the very seeds that it is compared on.
"""
_AT_KNEE = f"""## At the knee

The knee of a workload is the load at which the best rival's mean TTFT is {KNEE_FACTOR:g} times that of each request
alone. Figures at the knee are interpolated between the loads beside it, seed by seed. In the first row the rival is
vLLM as it comes, in the second the one with the best mean TTFT of each workload, in the third the best of each column
and each workload, which is no system that one could run. How far any order could go:
[the floor](../simulator.md#the-floor).
"""
_ABLATION = """## What each part is worth

Ours / ours with this otherwise, over all workloads but the adversarial ones: above 1 the other way is better for times.
"""
_TENANTS = """## Between tenants

Light: tenants that ask for no more than an equal part of the tokens. Index: Jain's, over the tenants' mean slowdown
(TTFT over that alone on an idle engine); a tenant that asks for less than its part may be served better than others.
"""
_KNEES = f"""## Knees and sustained loads

Knee: the load at which the best rival's mean TTFT is {KNEE_FACTOR:g} times that of each request alone.
Sustained: the greatest load with a P99 TTFT of at most {TTFT_TARGET_S:g} s and a mean TPOT of at most
{TPOT_TARGET_S * 1000:g} ms, ours and the best rival's.
"""


def write_report(raw: Path, folder: Path) -> None:
    """Writes the folder's files.

    Raises:
        InvalidInput: there are no results.
    """
    last = {record["id"]: record for record in read_records(raw)}.values()
    records = [record for record in last if record["seed"] >= KEPT_APART]
    results = Results(records)
    if not results.runs:
        raise InvalidInput([InputError(str(raw), "has no results: python -m moe_lab.experiments run")])
    folder.mkdir(parents=True, exist_ok=True)
    digests = source_digests()
    stale = sum(not is_current(record, digests) for record in records)
    pages = sorted({(case.fleet, case.workload) for case in results.cases})
    names = {page: f"{_slug(page[0])}-{page[1]}" for page in pages}
    for former in folder.glob("*.svg"):
        former.unlink()
    for (fleet, workload), name in names.items():
        if len(results.loads(fleet, workload)) > 1:
            plot_workload(results, fleet, workload, folder / f"{name}.svg")
    lines = [*_head(results, records, stale), *_clocks(records), *_at_load(results), *_at_knee(results)]
    lines += [*_ablation(results), *_worse(results)]
    lines += _tenants(results)
    lines += _knees(results)
    for (fleet, workload), name in names.items():
        lines += _workload(results, fleet, workload, name)
    (folder / "README.md").write_text("\n".join(lines) + "\n", "utf-8")
    summary = json.dumps(build_summary(results), indent=1, sort_keys=True)
    (folder / "summary.json").write_text(f"{summary}\n", "utf-8")


def build_summary(results: Results) -> dict[str, Any]:
    """The figures that other pages may state."""
    return {
        "clock": CLOCK,
        "runs": results.runs,
        "seeds": len(results.seeds),
        "at_knee": {fleet: _ratios(results, cases) for fleet, cases in _by_knee(results).items()},
        "by_load": {
            f"{fleet}: {load:g}": _ratios(results, cases) for (fleet, load), cases in _by_load(results).items()
        },
    }


def _ratios(results: Results, cases: Sequence[Case]) -> dict[str, Any]:
    ratios = {
        key: {column.name: _estimate(_ratio_against(results, cases, key, column.name)) for column in COLUMNS}
        for key in AT_KNEE
    }
    return {"workloads": [case.workload for case in cases], **ratios}


def _ratio_against(results: Results, cases: Sequence[Case], key: str, column: str) -> Estimate | None:
    if key == "against_vllm":
        return results.against(cases, REFERENCE, column)
    return results.against_best(cases, column, "ttft_mean" if key == "against_best_in_ttft" else None)


def _by_knee(results: Results) -> dict[str, list[Case]]:
    """By fleet, those workloads whose knee was found and where the product was run."""
    workloads: dict[str, set[str]] = {}
    for (fleet, _), cases in _by_load(results).items():
        workloads.setdefault(fleet, set()).update(case.workload for case in cases)
    found = {
        fleet: [case for case in results.knee_cases(fleet, sorted(names)) if PRODUCT in results.variants(case)]
        for fleet, names in workloads.items()
    }
    return {fleet: cases for fleet, cases in found.items() if cases}


def _estimate(ratio: Estimate | None) -> dict[str, float | int | None] | None:
    if ratio is None:
        return None
    high = ratio.high if math.isfinite(ratio.high) else None
    return {
        "value": round(ratio.value, 4),
        "low": round(ratio.low, 4),
        "high": high and round(high, 4),
        "pairs": ratio.count,
    }


def _by_load(results: Results) -> dict[tuple[str, float], list[Case]]:
    groups: dict[tuple[str, float], list[Case]] = {}
    for case in results.cases:
        if case.workload in WORKLOADS and PRODUCT in results.variants(case):
            groups.setdefault((case.fleet, case.load), []).append(case)
    return groups


def _head(results: Results, records: Sequence[Mapping[str, Any]], stale: int) -> Iterator[str]:
    versions = sorted({json.dumps(record["versions"], sort_keys=True) for record in records})
    yield _INTRODUCTION
    counts = sorted({record["count"] for record in records})
    seeds = f"seeds {min(results.seeds)} to {max(results.seeds)}; each load below says how many"
    lengths = {record["workload"]: ALL[record["workload"]].length for record in records if record["workload"] in ALL}
    longer = ", ".join(f"`{name}` {length:.3g}" for name, length in sorted(lengths.items()) if length != 1.0)
    times = f" ({longer} times as many)" if longer else ""
    yield f"{results.runs} runs of {', '.join(map(str, counts))} requests{times}, {seeds}."
    yield _SEEDS
    yield "Versions: " + "; ".join(
        ", ".join(f"{name} {version}" for name, version in json.loads(row).items()) for row in versions
    )
    if stale:
        yield ""
        due = "`python -m moe_lab.experiments run` is due"
        yield f"**{stale} runs come from other sources than the present ones**: {due}."
    yield ""


def _clocks(records: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The step times of each fleet with their errors by kind of steps."""
    yield _CLOCKS
    fleets = sorted({fleet_name(record["fleet"]): record for record in records if record["load"]}.items())
    rows = []
    for name, record in fleets:
        errors = PRESET_ERRORS.get(record["fleet"]["preset"], ())
        cells = {error.kind: f"{error.median:.1%}, {error.p90:.1%} ({error.measurements:,})" for error in errors}
        compared = errors[0].compared if errors else "-"
        rows.append([name, record["cost"], compared, *(cells.get(kind, "-") for kind in StepKind)])
    yield from _table(["fleet", "source", "errors on", *StepKind], rows)


def _at_knee(results: Results) -> Iterator[str]:
    rows = []
    for fleet, cases in _by_knee(results).items():
        for key, title in AT_KNEE.items():
            ratios = (_ratio_against(results, cases, key, column.name) for column in COLUMNS)
            rows.append([fleet, str(len(cases)), title, *map(render_ratio, ratios)])
    if rows:
        yield _AT_KNEE
        yield from _table(["fleet", "workloads", "rival", *(column.label for column in COLUMNS)], rows)


def _at_load(results: Results) -> Iterator[str]:
    """As at the knee, load by load."""
    rows = []
    for (fleet, load), cases in _by_load(results).items():
        for key, title in AT_KNEE.items():
            ratios = [_ratio_against(results, cases, key, column.name) for column in COLUMNS]
            if any(ratios):
                count = max(ratio.count for ratio in ratios if ratio is not None)
                rows.append([fleet, f"{load:.0%}", str(count), title, *map(render_ratio, ratios)])
    yield _BY_LOAD
    yield from _table(["fleet", "load", "pairs", "rival", *(column.label for column in COLUMNS)], rows)


def _ablation(results: Results) -> Iterator[str]:
    rows = []
    for (fleet, load), cases in _by_load(results).items():
        for name, variant in VARIANTS.items():
            if variant.uses_product and name != PRODUCT:
                ratios = [results.against(cases, name, column.name) for column in COLUMNS]
                if any(ratios):
                    count = max(ratio.count for ratio in ratios if ratio is not None)
                    rows.append([fleet, f"{load:.0%}", variant.label, str(count), *map(render_ratio, ratios)])
    if rows:
        yield _ABLATION
        yield from _table(["fleet", "load", "", "pairs", *(column.label for column in COLUMNS)], rows)


def _worse(results: Results) -> Iterator[str]:
    """Where the interval of a workload is clear of 1 on the wrong side."""
    rows = []
    for case in results.cases:
        for column in COLUMNS:
            rival = results.best_rival(case, column.name)
            ratio = None if rival is None else results.ratio(case, rival, PRODUCT, column.name)
            if rival is None or ratio is None or ratio.covers(1.0) or (ratio.value > 1) == column.higher_is_better:
                continue
            place = [case.fleet, case.workload, f"{case.load:.0%}"]
            rows.append([*place, column.label, VARIANTS[rival].label, render_ratio(ratio)])
    yield "## Where ours is worse"
    yield ""
    if not rows:
        yield "Nowhere with an interval clear of 1."
        yield ""
        return
    yield from _table(["fleet", "workload", "load", "", "best rival", "ours / rival"], rows)


def _tenants(results: Results) -> Iterator[str]:
    rows = [
        [
            case.workload,
            f"{case.load:.0%}",
            VARIANTS[variant].label,
            *(_cell(results.mean(case, variant, column.name), column) for column in TENANT_COLUMNS),
        ]
        for case in results.cases
        if case.workload in ALL and len(ALL[case.workload].senders.tenant_weights) > 1
        for variant in results.variants(case)
    ]
    if rows:
        yield _TENANTS
        yield from _table(["workload", "load", "", *map(_title, TENANT_COLUMNS)], rows)


def _knees(results: Results) -> Iterator[str]:
    yield _KNEES
    rows = []
    for fleet, workload in sorted({(case.fleet, case.workload) for case in results.cases}):
        knee = results.knee(fleet, workload)
        rivals = [
            load
            for name, variant in VARIANTS.items()
            if variant.is_rival and (load := results.sustained(fleet, workload, name)) is not None
        ]
        rows.append(
            [
                fleet,
                workload,
                "-" if knee is None else f"{knee:.2f}",
                _load(results.sustained(fleet, workload, PRODUCT)),
                _load(max(rivals, default=None)),
            ]
        )
    yield from _table(["fleet", "workload", "knee", "sustained by ours", "by the best rival"], rows)


def _load(load: float | None) -> str:
    return "-" if load is None else f"{load:.2f}"


def _workload(results: Results, fleet: str, workload: str, name: str) -> Iterator[str]:
    yield f"## {workload}: {fleet}"
    yield ""
    loads = results.loads(fleet, workload)
    if len(loads) > 1:
        yield f"![{workload}]({name}.svg)"
        yield ""
    for load in loads:
        case = Case(fleet=fleet, workload=workload, load=load)
        seeds = len(results.values(case, results.variants(case)[0], "ttft_mean"))
        floor = results.mean(case, results.variants(case)[0], "ttft_floor") * 1000
        yield f"Load {load:.0%}, {seeds} seeds; alone on an idle engine the mean TTFT is {floor:,.0f} ms."
        yield ""
        yield from _table(
            ["", *map(_title, COLUMNS), "ours / this: TTFT mean"],
            [_row(results, case, variant) for variant in results.variants(case)],
        )


def _row(results: Results, case: Case, variant: str) -> list[str]:
    cells = [_cell(results.mean(case, variant, column.name), column) for column in COLUMNS]
    ratio = None if variant == PRODUCT else results.ratio(case, variant, PRODUCT, "ttft_mean")
    return [VARIANTS[variant].label, *cells, render_ratio(ratio)]


def _title(column: Column) -> str:
    return f"{column.label} {column.unit}".strip()


def _cell(value: float, column: Column) -> str:
    if math.isnan(value):
        return "-"
    scaled = value * column.scale
    return f"{scaled:,.0f}" if abs(scaled) >= 100 else f"{scaled:.3g}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield "| " + " | ".join(row) + " |"
    yield ""


def _slug(text: str) -> str:
    return "".join(char if char.isalnum() else "-" for char in text.lower()).replace("--", "-").strip("-")
