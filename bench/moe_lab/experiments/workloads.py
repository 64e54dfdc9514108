"""The workloads of the experiments: five shapes, two traces, loads of clients, and the loads that break policies.

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

from moe_lab.experiments.clients import (
    ARENA_FILE,
    CLIENTS_FILE,
    SESSION_TOKENS,
    SESSIONS_FILE,
    build_agents,
    build_arena,
    build_servegen,
)

# Prompts of several thousand tokens with answers of a hundred: what makes queues of prefill, as the papers' loads do.
LONGEST_PROMPT = 8192
MEDIAN_OUTPUT = 64
LONGEST_OUTPUT = 1024
CONTEXT_TOKENS = 16_384
SAME_PREFIX_TOKENS = 2048
FLOOD_WEIGHT = 9.0
EQUAL_TENANTS = 4
AZURE = "azure_llm_2023_conv.csv"
# Of the workload `azureOnOff`: longest prompt, and answers as a part of those of the trace, whose mean is 211 tokens.
CLIPPED_PROMPT = 7400
SHORT_OUTPUT = 28 / 211
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
        context_tokens: longest prompt with its answer that the engines take.
        length: how many times the requests of a run that others have: many are on their way at once where prompts are
            short, and a run has to last for several of their lives.
    """

    build: Callable[[int, int, Path | None], tuple[TraceRequest, ...]]
    arrivals: ArrivalShape = ArrivalShape.POISSON
    senders: Senders = field(default_factory=Senders)
    trace: str = ""
    context_tokens: int = CONTEXT_TOKENS
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


def _clipped(count: int, seed: int, folder: Path | None) -> tuple[TraceRequest, ...]:
    """Azure's conversations with prompts twice as long, cut at 7,400 tokens, and short answers of 28 tokens."""
    return tuple(
        replace(
            row,
            prompt_tokens=min(CLIPPED_PROMPT, 2 * row.prompt_tokens),
            output_tokens=max(1, round(row.output_tokens * SHORT_OUTPUT)),
        )
        for row in _trace(AZURE)(count, seed, folder)
    )


def _servegen(count: int, seed: int, folder: Path | None) -> tuple[TraceRequest, ...]:
    return fit_lengths(build_servegen(count, seed, folder), CONTEXT_TOKENS).requests


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
        build=_trace(AZURE),
        arrivals=ArrivalShape.TRACE,
        trace=AZURE,
        length=3.0,
    ),
    "mooncake": WorkloadKind(
        build=_trace("mooncake_conversation.jsonl"), arrivals=ArrivalShape.TRACE, trace="mooncake_conversation.jsonl"
    ),
    "bursty": WorkloadKind(build=_shape(Shape.RANDOM), arrivals=ArrivalShape.BURSTY),
}
CLIENTS: Mapping[str, WorkloadKind] = {
    "azureOnOff": WorkloadKind(build=_clipped, arrivals=ArrivalShape.ON_OFF, trace=AZURE),
    "agents": WorkloadKind(build=build_agents, trace=SESSIONS_FILE, length=4.0, context_tokens=SESSION_TOKENS),
    "arena": WorkloadKind(build=build_arena, trace=ARENA_FILE, length=2.0),
    "serveGen": WorkloadKind(build=_servegen, arrivals=ArrivalShape.TRACE, trace=CLIENTS_FILE),
}
"""Loads as clients make them: in bursts, in conversations, of tenants that differ."""
ADVERSARIAL: Mapping[str, WorkloadKind] = {
    "allLong": WorkloadKind(build=_all_long),
    "flood": WorkloadKind(build=_shape(Shape.RANDOM), senders=Senders(tenant_weights=(FLOOD_WEIGHT, 1.0))),
    "equals": WorkloadKind(build=_shape(Shape.RANDOM), senders=Senders(tenant_weights=(1.0,) * EQUAL_TENANTS)),
    "samePrefix": WorkloadKind(build=_same_prefix),
    "burst": WorkloadKind(build=_shape(Shape.RANDOM), arrivals=ArrivalShape.BURST, length=BURST_LENGTH),
    "sawtooth": WorkloadKind(build=_shape(Shape.RANDOM), arrivals=ArrivalShape.SAWTOOTH),
}
ALL = {**WORKLOADS, **CLIENTS, **ADVERSARIAL}
