"""What came out of the bench on a real group: decisions, the table, what they say, and the JSON with all raw rows."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

from moe_tools.comparison import Comparison, render_number
from moe_tools.statistics import Estimate, paired_ratio
from rich.table import Table

from moe_lab.experts.serving import ExpertServingEffort, ExpertServingResult, WindowPair
from moe_lab.experts.waves import (
    WaveSettings,
    Window,
    decode_step_ms,
    output_tokens_per_s,
    step_ms,
    tpot_ms,
    ttft_ms,
)

MEANT = "step, mean"
METRICS: tuple[tuple[str, str, Callable[[Window], float | None], bool], ...] = (
    (MEANT, "ms", step_ms, False),
    ("decode step, mean", "ms", decode_step_ms, False),
    ("TPOT, mean", "ms", tpot_ms, False),
    ("TTFT, mean", "ms", ttft_ms, False),
    ("output tokens", "/s", output_tokens_per_s, True),
    ("balance", "", lambda window: window.balance, False),
)

_OF_GROUP = {"ranks", "nodes", "layers", "experts", "slots_per_rank", "costs", "totals", "problems"}


def compare_windows(pairs: Sequence[WindowPair]) -> tuple[Comparison, ...]:
    """Every metric over the pairs in which both windows have it."""
    return tuple(_compare(metric, unit, read, higher, pairs) for metric, unit, read, higher in METRICS)


def _compare(
    metric: str, unit: str, read: Callable[[Window], float | None], higher: bool, pairs: Sequence[WindowPair]
) -> Comparison:
    values = [(read(pair.first), read(pair.second)) for pair in pairs]
    usable = [(first, second) for first, second in values if first and second]
    return Comparison(
        metric=metric,
        unit=unit,
        stock=fmean(first for first, _ in usable) if usable else math.nan,
        ours=fmean(second for _, second in usable) if usable else math.nan,
        ratio=paired_ratio(usable) if usable else None,
        higher_is_better=higher,
    )


def render_pairs(measured: ExpertServingResult) -> Table:
    """A, B and their ratio."""
    assert measured.target is not None
    failed = sum(len(pair.first.failed) + len(pair.second.failed) for pair in measured.pairs)
    caption = (
        f"A: the placement before. B: {measured.target.origin.value}.\n"
        f"B/A: geometric mean over {len(measured.pairs)} pairs, in brackets its 95 % t interval.\n"
        f"Where the interval covers 1, no difference is shown. {failed} requests failed."
    )
    table = Table(title="A real group", caption=caption, caption_justify="left", title_justify="left")
    table.add_column("")
    for name in ("A", "B", "B/A"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("B is")
    for row in compare_windows(measured.pairs):
        digits = render_balance if row.metric == "balance" else render_number
        cells = (f"{digits(value)} {row.unit}".rstrip() for value in (row.stock, row.ours))
        table.add_row(row.metric, *cells, render_interval(row.ratio), row.verdict)
    return table


def render_balance(value: float) -> str:
    """Returns the value with three decimals, since gains are often below a hundredth."""
    return f"{value:.3f}"


def render_interval(ratio: Estimate | None) -> str:
    """Returns `0.992 [0.981, 1.003]`: three decimals, since gains are often a hundredth."""
    return "-" if ratio is None else f"{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"


def render_decisions(measured: ExpertServingResult) -> Table:
    """What the mode active decided, the oldest first."""
    table = Table(title="In the mode active", title_justify="left")
    for name in ("s", "outcome", "moves", "balance", "predicted us", "measured us", "cost ms"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("reason", overflow="fold")
    for row in measured.decisions:
        found = row.decision
        balance = f"{found.balance_before or 1.0:.3f} -> {found.balance_after or 1.0:.3f}"
        table.add_row(
            f"{row.at_s:.0f}", found.outcome, str(found.moves), balance, _scaled(found.predicted_gain_s, 1e6),
            _scaled(found.measured_gain_s, 1e6), _scaled(found.cost_s, 1e3), found.reason,
        )  # fmt: skip
    return table


def describe(measured: ExpertServingResult, environment: Mapping[str, Any]) -> list[str]:
    """In sentences: what active did, what the pairs show, what makes them doubtful."""
    return [
        *describe_active(measured),
        *describe_pairs(measured),
        *describe_engine(measured.pairs),
        *warn(environment),
    ]


def describe_active(measured: ExpertServingResult) -> list[str]:
    """Returns a sentence on the decisions in the mode `active`: how many moved, how many were rolled back."""
    outcomes = [row.decision.outcome for row in measured.decisions]
    if not outcomes:
        return ["in the mode active nothing was decided"]
    moved, back = outcomes.count("moved"), outcomes.count("rolledBack")
    return [f"in the mode active {len(outcomes)} decisions: {moved} moved, {back} rolled back by itself"]


def describe_pairs(measured: ExpertServingResult) -> list[str]:
    """The mean step of B beside that of A."""
    if measured.target is None:
        return ["the decision finds nothing better than the placement at the start: there is nothing to compare"]
    row = next(row for row in compare_windows(measured.pairs) if row.metric == MEANT)
    if row.ratio is None:
        return ["the steps were not counted"]
    shown = render_interval(row.ratio)
    if row.ratio.covers(1.0):
        return [f"step time B/A {shown}: no difference is shown"]
    return [f"step time B/A {shown}: B's steps are {'shorter' if row.ratio.value < 1.0 else 'longer'}"]


def describe_engine(pairs: Sequence[WindowPair]) -> list[str]:
    """What the engine itself measured of the same changes: towards B as it is, towards A with its sign turned."""
    gains = engine_gains_s(pairs)
    if not gains:
        return []
    least, most = min(gains) * 1e6, max(gains) * 1e6
    mean = fmean(gains) * 1e6
    return [
        f"the engine itself measured B's gain {len(gains)} times: mean {mean:+.0f} us ({least:+.0f} to {most:+.0f})"
    ]


def engine_gains_s(pairs: Sequence[WindowPair]) -> list[float]:
    """Seconds a step that B wins, of each change that the engine measured."""
    first = [-pair.first.engine_gain_s for pair in pairs if pair.first.engine_gain_s is not None]
    return first + [pair.second.engine_gain_s for pair in pairs if pair.second.engine_gain_s is not None]


def warn(environment: Mapping[str, Any]) -> list[str]:
    """What makes the figures doubtful."""
    load, cores = environment["load_average"], environment["cores"]
    if load < cores / 2:
        return []
    return [f"the machine was busy before it began (load {load:.1f} on {cores} cores): measure again when idle"]


def build_document(
    measured: ExpertServingResult,
    settings: WaveSettings,
    topic: str,
    effort: ExpertServingEffort,
    environment: Mapping[str, Any],
) -> dict[str, Any]:
    """Returns the JSON document of a measurement: environment, settings, group, decisions, pairs and comparisons."""
    target = measured.target
    return {
        "environment": dict(environment),
        "settings": {"topic": topic, **asdict(settings), **asdict(effort)},
        "group": measured.document.model_dump(
            mode="json",
            include={"ranks", "nodes", "layers", "experts", "slots_per_rank", "costs", "totals", "problems"},
        ),
        "placements": {
            "a": measured.start,
            "b": target.slots if target else None,
            "origin": target.origin.value if target else None,
            "gate": target.gate if target else None,
        },
        "load": {"steps": measured.document.load.steps, "tokens": measured.document.load.tokens},
        "active": [{"at_s": row.at_s, **row.decision.model_dump(mode="json")} for row in measured.decisions],
        "comparisons": [{**asdict(row), "verdict": row.verdict} for row in compare_windows(measured.pairs)],
        "engine_gains_s": engine_gains_s(measured.pairs),
        "says": describe(measured, environment),
        "pairs": [{"a": _window(pair.first), "b": _window(pair.second)} for pair in measured.pairs],
    }


def _window(window: Window) -> dict[str, Any]:
    return {name: read(window) for name, _, read, _ in METRICS} | asdict(window)


def _scaled(value: float | None, factor: float) -> str:
    return "-" if value is None else f"{value * factor:.3g}"
