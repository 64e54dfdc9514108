"""The end of the demo: whether the measurement shows a difference, the tables, and the lines below them. Pure."""

from collections.abc import Sequence
from enum import StrEnum

from rich.table import Table

from moe_tools.comparison import Comparison, PiecePair, render_comparison, render_failures, render_ratio
from moe_tools.statistics import Estimate

DECIDING = "TTFT, mean"
WIDEST = 2.5
"""Upper end of an interval over its lower end, from which on it says too little of how much."""


class Verdict(StrEnum):
    """What the measured mean TTFT shows. `unclear`: its interval covers 1, or is wider than `WIDEST`, or is missing."""

    BETTER = "better"
    WORSE = "worse"
    UNCLEAR = "unclear"


def judge(comparisons: Sequence[Comparison]) -> Verdict:
    """The verdict on the mean TTFT."""
    ratio = find(comparisons, DECIDING).ratio
    if ratio is None or is_noisy(ratio) or ratio.covers(1.0):
        return Verdict.UNCLEAR
    return Verdict.BETTER if ratio.value < 1 else Verdict.WORSE


def is_noisy(ratio: Estimate | None) -> bool:
    """Whether the interval is missing, or wider than `WIDEST`: it can tell nothing."""
    return ratio is None or ratio.low <= 0 or ratio.high / ratio.low > WIDEST


def find(comparisons: Sequence[Comparison], metric: str) -> Comparison:
    """The row of this metric."""
    return next(row for row in comparisons if row.metric == metric)


def render_measured(measured: Sequence[Comparison], pairs: Sequence[PiecePair]) -> Table:
    """The table of `moeserving compare`."""
    return render_comparison(measured, pairs)


def render_modelled(
    measured: Sequence[Comparison], modelled: Sequence[Comparison], pairs: Sequence[PiecePair]
) -> Table:
    """Measured and modelled ratios side by side; the table fits 80 columns."""
    caption = (
        "A: vLLM's own order, round robin. B: ours. In brackets: 95 % t interval.\n"
        f"Measured: {len(pairs)} {'pair' if len(pairs) == 1 else 'pairs'} of runs. {render_failures(pairs)}\n"
        "Modelled: vLLM's real scheduler and our decisions in virtual time, where "
        "step times and network are modelled and a machine's noise is absent."
    )
    table = Table(title="What users got", caption=caption, caption_justify="left", title_justify="left")
    table.add_column("")
    for name in ("B/A, measured here", "B/A, modelled"):
        table.add_column(name, justify="right", no_wrap=True)
    for real, virtual in zip(measured, modelled, strict=True):
        table.add_row(real.metric, render_ratio(real.ratio), render_ratio(virtual.ratio))
    return table


def render_conclusion(
    verdict: Verdict, measured: Sequence[Comparison], modelled: Sequence[Comparison] = ()
) -> list[str]:
    """What to look at, in words.

    Args:
        verdict: on the measured comparison.
        measured: its metrics.
        modelled: those of the comparison in virtual time; empty where the measured one shows a difference.
    """
    ratio = find(measured, DECIDING).ratio
    if verdict is Verdict.UNCLEAR:
        virtual = find(modelled, DECIDING).ratio
        return [
            f"Look at the row '{DECIDING}'. Measured {render_ratio(ratio)}: {_why_unclear(ratio)}",
            f"Modelled {render_ratio(virtual)}: {_in_words(virtual)}",
            *_why_not_seen(ratio, virtual),
            *_name_worse(modelled),
            *_why(),
        ]
    return [f"Look at the row '{DECIDING}': {render_ratio(ratio)}. {_in_words(ratio)}", *_name_worse(measured), *_why()]


def _name_worse(rows: Sequence[Comparison]) -> list[str]:
    """A line with the metrics that got worse, but for the deciding one; none where none did."""
    worse = [
        f"{row.metric} {render_ratio(row.ratio)}" for row in rows if row.verdict == "worse" and row.metric != DECIDING
    ]
    return [f"Worse: {'; '.join(worse)}."] if worse else []


def render_next_steps() -> list[str]:
    """Commands to go on with."""
    return [
        "Next:",
        "  the same engines, to use:",
        "    .venv/bin/moeserving up -f manifests/local-cpu.yaml --port 8000",
        "  on them the same, measured longer:",
        "    .venv/bin/moeserving compare tiny --url http://127.0.0.1:8000 \\",
        "        --shape twoEnd --answer-tokens 16 --load 1.4 --pairs 16",
        "  your own requests:",
        "    .venv/bin/moeserving demo --trace FILE",
        "  beside stock vLLM behind vllm-router:",
        "    make bench-serving",
        "  all workloads, loads and rivals: docs/results/README.md",
    ]


def _why_unclear(ratio: Estimate | None) -> str:
    if is_noisy(ratio):
        return "no verdict, this machine was too noisy."
    return "no difference is shown on this machine."


def _why_not_seen(measured: Estimate | None, modelled: Estimate | None) -> list[str]:
    """A line where a measurement that is not noisy excludes the modelled gain."""
    if measured is None or modelled is None or is_noisy(measured) or modelled.high >= measured.low:
        return []
    return [
        "The modelled gain is not seen here. The model leaves out that engines, gateway and client share the cores."
    ]


def _in_words(ratio: Estimate | None) -> str:
    if ratio is None or ratio.covers(1.0):
        return "no difference is shown."
    if ratio.value < 1:
        return f"users wait {1 - ratio.value:.0%} less for the first token."
    return f"users wait {ratio.value - 1:.0%} longer for the first token."


def _why() -> list[str]:
    return [
        "Short prompts pass long ones while requests wait. Each piece is a peak above the capacity; far below it no "
        "request waits and every order gives the same times.",
    ]
