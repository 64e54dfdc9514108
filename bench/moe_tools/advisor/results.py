"""The rows of the advice: figures, goodput under the bounds, the reason in words; as a table and as a document."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moe_tools.advisor.candidates import Candidate, Excluded
from moe_tools.simulator.outcome import WARM_UP_SHARE
from moe_tools.simulator.simulation import SimulationResult

# Columns of a terminal from which on the reasons stand in the table.
WIDE = 140
# docs/simulator.md, "Calibration": the comparisons of the simulator with a real engine.
MODEL_ERROR = (
    "Modelled, not measured. With step times fitted to a real engine (vLLM 0.32 on a CPU) the simulator's mean TTFT "
    "was within 8 % of the engine's in 18 of 18 comparisons; with those of a GPU it was not compared. Links of 25 GB/s "
    "a GPU are assumed."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """Bounds of a good request, in seconds: of its time to the first token, and of its time between tokens."""

    ttft_s: float
    inter_token_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """The figures of one shape; seconds, and requests a second.

    Attributes:
        candidate: the shape.
        ttft_mean_s: time to the first token.
        ttft_p99_s: its 99th percentile.
        tpot_mean_s: time for each output token after the first.
        tpot_p99_s: its 99th percentile.
        end_mean_s: time to the last token.
        good_per_s: requests a second that were answered within both bounds.
        good_share: their part of all requests.
        gpu_s: GPU seconds for each of them; infinite where there is none.
        failed: requests without an answer.
        split_share: part of the requests that were split.
        why: in words.
    """

    candidate: Candidate
    ttft_mean_s: float
    ttft_p99_s: float
    tpot_mean_s: float
    tpot_p99_s: float
    end_mean_s: float
    good_per_s: float
    good_share: float
    gpu_s: float
    failed: int
    split_share: float
    why: str


def read_outcome(candidate: Candidate, outcome: SimulationResult, bounds: Bounds) -> Advice:
    """The figures of a run, warm-up left out."""
    figures = outcome.figures
    steady = outcome.requests[math.floor(len(outcome.requests) * WARM_UP_SHARE) :]
    good = sum(
        row.first_token_s is not None
        and row.finished_s is not None
        and not row.failure
        and row.first_token_s - row.arrival_s <= bounds.ttft_s
        and row.finished_s - row.first_token_s <= bounds.inter_token_s * (row.output_tokens - 1)
        for row in steady
    )
    span_s = max((row.finished_s or 0.0 for row in steady), default=0.0) - min(row.arrival_s for row in steady)
    good_per_s = good / span_s if span_s > 0 else 0.0
    split_share = sum(bool(row.prefill_server) for row in outcome.requests) / len(outcome.requests)
    return Advice(
        candidate=candidate,
        ttft_mean_s=figures.ttft_mean,
        ttft_p99_s=figures.ttft_p99,
        tpot_mean_s=figures.tpot_mean,
        tpot_p99_s=figures.tpot_p99,
        end_mean_s=figures.end_mean,
        good_per_s=good_per_s,
        good_share=good / len(steady),
        gpu_s=candidate.shape.gpus / good_per_s if good_per_s else math.inf,
        failed=figures.failed,
        split_share=split_share,
        why=explain(candidate, split_share, figures.preemptions),
    )


def explain(candidate: Candidate, split_share: float, preemptions: int) -> str:
    """Why the figures of a shape are as they are.

    Args:
        candidate: the shape.
        split_share: part of the requests that were split.
        preemptions: of its run.
    """
    shape, gpus = candidate.shape, candidate.shape.servers[0] * candidate.shape.tensor
    if shape.prefill is not None:
        prompts = shape.prefill * gpus
        parts = [f"prompts on {prompts} GPUs hold up no answer; answers share {shape.gpus - prompts} GPUs"]
    elif gpus == 1:
        parts = ["a prompt holds up the answers of one GPU, and each GPU reads all experts"]
    else:
        # Without expert parallelism vLLM cuts each expert over the GPUs of all ranks.
        read = f"1/{gpus} of the experts" if shape.expert else f"1/{gpus} of each expert"
        parts = [f"a prompt holds up the answers of {gpus} GPUs, each of which reads {read}"]
    if shape.tensor > 1:
        parts.append(f"{shape.tensor} GPUs compute each prompt together")
    if shape.moves:
        begin = f"{shape.begin} of {len(shape.servers)} servers began for prompts"
        parts.append(f"{begin}, {split_share:.0%} of the requests split")
    if shape.redundant:
        parts.append(f"{shape.redundant} copies of experts a layer even the ranks out")
    if preemptions:
        parts.append(f"{preemptions} preemptions: too few KV blocks")
    return "; ".join(parts)


def rank(rows: Sequence[Advice]) -> list[Advice]:
    """The rows, the best first: most requests within the bounds (to 1 %), then the least time to the last token."""
    most = max((row.good_share for row in rows), default=0.0)
    return sorted(rows, key=lambda row: (row.failed > 0, round(most - row.good_share, 2), row.end_mean_s))


def render(
    rows: Sequence[Advice], excluded: Sequence[Excluded], bounds: Bounds, clock: str, *, width: int
) -> RenderableType:
    """The table, the best shape first, and what belongs to it in words.

    Args:
        rows: ranked.
        excluded: servers that were not simulated.
        bounds: of a good request.
        clock: whose step times they are, with their error.
        width: columns of the terminal; in a narrow one the reasons stand below the table, by the numbers of the rows.
    """
    is_wide = width >= WIDE
    title = (
        f"Shapes, the best first; good: TTFT within {bounds.ttft_s * 1e3:,.0f} ms, TPOT within "
        f"{bounds.inter_token_s * 1e3:,.0f} ms; * as in the file"
    )
    reasons = {row.why: [number for number, other in enumerate(rows, 1) if other.why == row.why] for row in rows}
    below = [] if is_wide else [f"{', '.join(map(str, numbers))}: {why}." for why, numbers in reasons.items()]
    omitted = [f"Left out: {row.servers}: {row.reason}." for row in excluded]
    return Group(Text(title), _build_table(rows, is_wide=is_wide), *map(Text, [*below, *omitted, clock, MODEL_ERROR]))


def _build_table(rows: Sequence[Advice], *, is_wide: bool) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), collapse_padding=True, show_edge=False)
    table.add_column("", justify="right")
    for name, least in (("servers", 14), ("roles", 12)):
        table.add_column(name, min_width=least)
    has_copies = any(row.candidate.shape.redundant for row in rows)
    good = "good\n1/s, part" if is_wide else "good"
    headings = ["tokens\na step", "TTFT, ms\nmean, P99", "TPOT, ms\nmean, P99", good, "GPU s\na good"]
    for name in headings + (["copies"] if has_copies else []):
        table.add_column(name, justify="right", no_wrap=True)
    if is_wide:
        table.add_column("why")
    for number, row in enumerate(rows, start=1):
        one = row.candidate
        table.add_row(
            f"{number}",
            one.servers + (" *" if one.is_present else ""),
            one.roles,
            f"{one.step_tokens:,}",
            f"{row.ttft_mean_s * 1e3:.0f}, {row.ttft_p99_s * 1e3:.0f}",
            f"{row.tpot_mean_s * 1e3:,.1f}, {row.tpot_p99_s * 1e3:,.1f}",
            f"{row.good_per_s:,.2f}, {row.good_share:.0%}" if is_wide else f"{row.good_share:.0%}",
            f"{row.gpu_s:,.2f}",
            *([f"{one.shape.redundant}"] if has_copies else []),
            *([row.why] if is_wide else []),
        )
    return table


def to_document(row: Advice) -> dict[str, Any]:
    """One row for JSON; a figure that is not finite is null."""
    one, figures = row.candidate, {}
    for name in row.__slots__:
        value = getattr(row, name)
        if name != "candidate":
            figures[name] = None if isinstance(value, float) and not math.isfinite(value) else value
    return {
        "servers": len(one.shape.servers),
        "ranks": one.shape.servers[0],
        "tensor": one.shape.tensor,
        "expert": one.shape.expert,
        "gpus": one.shape.gpus,
        "roles": one.roles,
        "step_tokens": one.step_tokens,
        "redundant_experts": one.shape.redundant,
        "is_present": one.is_present,
        **figures,
    }
