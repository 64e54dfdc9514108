"""The workloads of the experiments: five shapes, two public traces, and the loads that break policies.

Each is a function of a seed: other requests of the same kind for each seed, so that pairs over seeds are independent. A
trace is cut at another place for each seed; its file is named by the caller, for none is part of the project.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from moe_contract.input_errors import InputError, InvalidInput
from moe_tools.shapes import Shape, ShapeSettings, build_shape
from moe_tools.simulator.arrivals import ArrivalShape, Senders
from moe_tools.traces import TraceRequest, cut_piece, fit_lengths, read_trace

# Prompts of several thousand tokens with answers of a hundred: what makes queues of prefill, as the papers' loads do.
LONGEST_PROMPT = 8192
MEDIAN_OUTPUT = 64
LONGEST_OUTPUT = 1024
CONTEXT_TOKENS = 16_384
SAME_PREFIX_TOKENS = 2048
FLOOD_WEIGHT = 9.0
EQUAL_TENANTS = 4
KEPT_APART = 101
"""Seeds from here on are for checking alone: other requests of each shape, other pieces of the traces."""
# Seeds of which no trace's request is kept apart.
PUBLISHED_SEEDS = range(1, 5)
_DRAWS = 1000
# 10,000 requests where a run has 600.
BURST_LENGTH = 10_000 / 600


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadKind:
    """A kind of load.

    Attributes:
        build: `count` requests for a seed; their times are set later.
        arrivals: how they come.
        senders: their tenants.
        trace: name of the trace's file that it needs; empty for none.
        length: how many times the requests of a run that others have: many are on their way at once where prompts are
            short, and a run has to last for several of their lives.
    """

    build: Callable[[int, int, Path | None], tuple[TraceRequest, ...]]
    arrivals: ArrivalShape = ArrivalShape.POISSON
    senders: Senders = field(default_factory=Senders)
    trace: str = ""
    length: float = 1.0


def _shape(shape: Shape) -> Callable[[int, int, Path | None], tuple[TraceRequest, ...]]:
    def build(count: int, seed: int, folder: Path | None) -> tuple[TraceRequest, ...]:
        return build_shape(
            shape,
            ShapeSettings(
                count=count,
                seed=seed,
                longest_tokens=LONGEST_PROMPT,
                median_output_tokens=MEDIAN_OUTPUT,
                longest_output_tokens=LONGEST_OUTPUT,
            ),
        )

    return build


def _trace(name: str) -> Callable[[int, int, Path | None], tuple[TraceRequest, ...]]:
    def build(count: int, seed: int, folder: Path | None) -> tuple[TraceRequest, ...]:
        if folder is None:
            raise InvalidInput([InputError("traces", f"a folder with {name} is needed")])
        whole = read_trace(folder / name, seed=seed)
        start = find_start(len(whole), count, seed)
        return fit_lengths(cut_piece(whole, start, count), CONTEXT_TOKENS).requests

    return build


def find_start(length: int, count: int, seed: int) -> int:
    """Where the seed's piece of a trace begins; one kept apart has no request of `PUBLISHED_SEEDS`.

    Args:
        length: requests of the trace.
        count: of the piece.
        seed: draws the place.

    Raises:
        InvalidInput: the rest of the trace is too short.
    """
    random = np.random.default_rng(seed)
    draws = (int(random.integers(0, max(1, length - count))) for _ in range(_DRAWS))
    if seed < KEPT_APART:
        return next(draws)
    taken = [find_start(length, count, other) for other in PUBLISHED_SEEDS]
    for start in draws:
        if all(abs(start - other) >= count for other in taken):
            return start
    raise InvalidInput(
        [InputError("--count", f"{count} requests do not fit into a trace of {length} beside those in use")]
    )


def _all_long(count: int, seed: int, folder: Path | None) -> tuple[TraceRequest, ...]:
    settings = ShapeSettings(
        count=count, seed=seed, shortest_tokens=8192, longest_tokens=12_288, median_output_tokens=MEDIAN_OUTPUT
    )
    return build_shape(Shape.AVERAGE, settings)


def _same_prefix(count: int, seed: int, folder: Path | None) -> tuple[TraceRequest, ...]:
    """A common beginning of 2,048 tokens, and then each its own."""
    return tuple(
        replace(row, prompt_tokens=row.prompt_tokens + SAME_PREFIX_TOKENS, blocks=(1,), block_tokens=SAME_PREFIX_TOKENS)
        for row in _shape(Shape.RANDOM)(count, seed, folder)
    )


WORKLOADS: Mapping[str, WorkloadKind] = {
    **{shape.value: WorkloadKind(build=_shape(shape)) for shape in Shape},
    "azure": WorkloadKind(
        build=_trace("azure_llm_2023_conv.csv"),
        arrivals=ArrivalShape.TRACE,
        trace="azure_llm_2023_conv.csv",
        length=3.0,
    ),
    "mooncake": WorkloadKind(
        build=_trace("mooncake_conversation.jsonl"), arrivals=ArrivalShape.TRACE, trace="mooncake_conversation.jsonl"
    ),
    "bursty": WorkloadKind(build=_shape(Shape.RANDOM), arrivals=ArrivalShape.BURSTY),
}
ADVERSARIAL: Mapping[str, WorkloadKind] = {
    "allLong": WorkloadKind(build=_all_long),
    "flood": WorkloadKind(build=_shape(Shape.RANDOM), senders=Senders(tenant_weights=(FLOOD_WEIGHT, 1.0))),
    "equals": WorkloadKind(build=_shape(Shape.RANDOM), senders=Senders(tenant_weights=(1.0,) * EQUAL_TENANTS)),
    "samePrefix": WorkloadKind(build=_same_prefix),
    "burst": WorkloadKind(build=_shape(Shape.RANDOM), arrivals=ArrivalShape.BURST, length=BURST_LENGTH),
    "sawtooth": WorkloadKind(build=_shape(Shape.RANDOM), arrivals=ArrivalShape.SAWTOOTH),
}
ALL = {**WORKLOADS, **ADVERSARIAL}
