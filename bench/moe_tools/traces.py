"""Request traces: when each request comes, how long its prompt and its answer are, what prefix it shares.

Read by `moeserving replay`, `compare` and `demo`. Three line formats are known: the Azure public dataset's CSV,
Mooncake's JSON lines, and plain JSON lines with this module's own field names. A line that cannot be read stops the
reading with its file and line number; nothing is skipped in silence.
"""

import csv
import json
import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

from moe_contract.input_errors import InputError, InvalidInput, errors_from_pydantic, unknown_choice
from pydantic import BaseModel, ConfigDict, Field, ValidationError

GRID_S = 3.0
"""Seconds between the timestamps of Mooncake's published traces: all requests of that time have the same one."""
_GRID_JITTER_S = 0.0015
BLOCK_TOKENS = 512
"""Mooncake's block: one id of `hash_ids` stands for this many prompt tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceRequest:
    """One request. `blocks` name the prompt's pieces of `block_tokens` each: equal ids stand for equal text.

    The last block may be cut short. No blocks: the prompt shares nothing with any other.

    Of a conversation (a name; empty: none) the simulator sends each request but the first `think_s` seconds after the
    answer to the one before. `tenant` is the number of the sender. Files of traces have none of the three.
    """

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()
    block_tokens: int = BLOCK_TOKENS
    tenant: int = 0
    conversation: str = ""
    think_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """Requests that fit the model, and how many of them had to be cut for it."""

    requests: tuple[TraceRequest, ...]
    cut: int
    limit_tokens: int | None

    def __str__(self) -> str:
        if self.limit_tokens is None:
            return f"{len(self.requests)} requests, none cut (the server names no longest length)"
        return f"{len(self.requests)} requests, {self.cut} of them cut to {self.limit_tokens} tokens with their answer"


class TraceFormat(StrEnum):
    """Format of the lines of a trace file."""

    AZURE = "azure"
    MOONCAKE = "mooncake"
    JSONL = "jsonl"


Tokens = Annotated[int, Field(ge=1)]


class _AzureLine(BaseModel):
    model_config = ConfigDict(frozen=True)
    TIMESTAMP: datetime
    ContextTokens: Tokens
    GeneratedTokens: Tokens

    def request(self) -> TraceRequest:
        return TraceRequest(
            arrival_s=self.TIMESTAMP.timestamp(),
            prompt_tokens=self.ContextTokens,
            output_tokens=self.GeneratedTokens,
        )


class _MooncakeLine(BaseModel):
    model_config = ConfigDict(frozen=True)
    timestamp: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    input_length: Tokens
    output_length: Tokens
    hash_ids: tuple[int, ...] = ()

    def request(self) -> TraceRequest:
        return TraceRequest(
            arrival_s=self.timestamp / 1000,
            prompt_tokens=self.input_length,
            output_tokens=self.output_length,
            blocks=self.hash_ids[: math.ceil(self.input_length / BLOCK_TOKENS)],
        )


class _PlainLine(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    arrival_s: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    prompt_tokens: Tokens
    output_tokens: Tokens
    blocks: tuple[int, ...] = ()
    block_tokens: Tokens = BLOCK_TOKENS

    def request(self) -> TraceRequest:
        return TraceRequest(**self.model_dump())


_Line = type[_AzureLine] | type[_MooncakeLine] | type[_PlainLine]
_LINES: dict[TraceFormat, _Line] = {
    TraceFormat.AZURE: _AzureLine,
    TraceFormat.MOONCAKE: _MooncakeLine,
    TraceFormat.JSONL: _PlainLine,
}


def read_trace(path: Path, trace_format: str | None = None, seed: int = 0) -> tuple[TraceRequest, ...]:
    """Reads a whole trace, ordered by arrival, the first arrival at 0 s.

    A Mooncake trace whose timestamps all lie on the grid of 3 s has its batches spread (`spread_batches`).

    Args:
        path: the file.
        trace_format: a `TraceFormat`; None finds it from the first line.
        seed: of the arrivals within a batch.

    Raises:
        InvalidInput: the file cannot be read, or its first malformed line, by number.
    """
    lines = _read_lines(path)
    known = parse_format(trace_format) if trace_format else detect_format(path, lines[0])
    requests = [line.request() for line in _parse_lines(path, lines, known)]
    if not requests:
        raise InvalidInput([InputError(str(path), "has no requests")])
    if known is TraceFormat.MOONCAKE and lies_on_grid(requests):
        requests = spread_batches(requests, seed)
    return rebase(requests)


def lies_on_grid(requests: Sequence[TraceRequest]) -> bool:
    """Returns whether all arrivals, at several times, are within 1.5 ms of a multiple of `GRID_S`."""
    ticks = [round(request.arrival_s / GRID_S) for request in requests]
    rests_s = [abs(request.arrival_s - GRID_S * tick) for request, tick in zip(requests, ticks, strict=True)]
    return len(set(ticks)) > 1 and max(rests_s) <= _GRID_JITTER_S


def spread_batches(requests: Sequence[TraceRequest], seed: int) -> list[TraceRequest]:
    """Returns the requests of each time of the grid at random times until the next one, in their order.

    Args:
        requests: whose arrivals lie on the grid of `GRID_S` seconds.
        seed: of the times.
    """
    draw = random.Random(seed)
    batches: dict[int, list[TraceRequest]] = defaultdict(list)
    for request in requests:
        batches[round(request.arrival_s / GRID_S)].append(request)
    spread = []
    for tick in sorted(batches):
        times_s = sorted(GRID_S * (tick + draw.random()) for _ in batches[tick])
        spread += [replace(row, arrival_s=time_s) for row, time_s in zip(batches[tick], times_s, strict=True)]
    return spread


def parse_format(name: str) -> TraceFormat:
    """The format of this name."""
    try:
        return TraceFormat(name)
    except ValueError:
        raise InvalidInput([unknown_choice("format", name, TraceFormat)]) from None


def detect_format(path: Path, first_line: str) -> TraceFormat:
    """What the first line looks like."""
    if "ContextTokens" in first_line:
        return TraceFormat.AZURE
    if '"input_length"' in first_line:
        return TraceFormat.MOONCAKE
    if '"prompt_tokens"' in first_line:
        return TraceFormat.JSONL
    known = ", ".join(sorted(TraceFormat))
    raise InvalidInput([InputError(f"{path}:1", f"the first line fits no known format; known: {known}")])


def rebase(requests: Iterable[TraceRequest]) -> tuple[TraceRequest, ...]:
    """Ordered by arrival, the first one at 0 s."""
    ordered = sorted(requests, key=lambda request: request.arrival_s)
    first = ordered[0].arrival_s if ordered else 0.0
    return tuple(replace(request, arrival_s=request.arrival_s - first) for request in ordered)


def cut_piece(requests: Sequence[TraceRequest], start: int, count: int | None = None) -> tuple[TraceRequest, ...]:
    """`count` requests from number `start` on (to the end for None), the first one at 0 s."""
    return rebase(requests[start : None if count is None else start + count])


def speed_up(requests: Iterable[TraceRequest], speed: float) -> tuple[TraceRequest, ...]:
    """The same requests in 1/`speed` of the time."""
    if not (speed > 0 and math.isfinite(speed)):
        raise InvalidInput([InputError("speed", f"must be more than 0, got {speed}")])
    return tuple(replace(request, arrival_s=request.arrival_s / speed) for request in requests)


def scale_lengths(requests: Iterable[TraceRequest], factor: float) -> tuple[TraceRequest, ...]:
    """Prompts, answers and shared blocks `factor` times as long, each of at least one token."""
    if not (factor > 0 and math.isfinite(factor)):
        raise InvalidInput([InputError("scale-lengths", f"must be more than 0, got {factor}")])
    return tuple(
        replace(
            request,
            prompt_tokens=_scale(request.prompt_tokens, factor),
            output_tokens=_scale(request.output_tokens, factor),
            block_tokens=_scale(request.block_tokens, factor),
        )
        for request in requests
    )


def fit_lengths(requests: Iterable[TraceRequest], limit_tokens: int | None) -> Fitted:
    """Cuts requests longer than `limit_tokens`: the answer to half the limit at most, then the prompt to the rest."""
    whole = tuple(requests)
    if limit_tokens is None:
        return Fitted(requests=whole, cut=0, limit_tokens=None)
    if limit_tokens < 2:
        raise InvalidInput([InputError("max-tokens", f"must be 2 or more, got {limit_tokens}")])
    fitted = tuple(_fit(request, limit_tokens) for request in whole)
    cut = sum(before != after for before, after in zip(whole, fitted, strict=True))
    return Fitted(requests=fitted, cut=cut, limit_tokens=limit_tokens)


def mean_rate(requests: Sequence[TraceRequest]) -> float:
    """Arrivals a second over the piece; infinite where all come at once."""
    span_s = requests[-1].arrival_s - requests[0].arrival_s
    return (len(requests) - 1) / span_s if span_s > 0 else math.inf


def _fit(request: TraceRequest, limit_tokens: int) -> TraceRequest:
    if request.prompt_tokens + request.output_tokens <= limit_tokens:
        return request
    output_tokens = min(request.output_tokens, limit_tokens // 2)
    prompt_tokens = min(request.prompt_tokens, limit_tokens - output_tokens)
    return replace(request, prompt_tokens=prompt_tokens, output_tokens=output_tokens)


def _scale(tokens: int, factor: float) -> int:
    return max(1, round(tokens * factor))


def _read_lines(path: Path) -> list[str]:
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except OSError as error:
        raise InvalidInput([InputError(str(path), f"cannot be read: {error.strerror}")]) from None
    except UnicodeDecodeError as error:
        raise InvalidInput([InputError(str(path), f"is not UTF-8 text: {error.reason}")]) from None
    if not lines:
        raise InvalidInput([InputError(str(path), "is empty")])
    return lines


def _parse_lines(path: Path, lines: list[str], trace_format: TraceFormat) -> Iterator[Any]:
    rows = _csv_rows(lines) if trace_format is TraceFormat.AZURE else _json_rows(lines)
    model = _LINES[trace_format]
    for number, row in rows:
        try:
            yield model.model_validate(row())
        except ValidationError as error:
            raise InvalidInput(_at_line(path, number, error, model)) from None
        except (ValueError, csv.Error) as error:
            raise InvalidInput([InputError(f"{path}:{number}", f"is not JSON: {error}")]) from None


def _at_line(path: Path, number: int, error: ValidationError, model: _Line) -> list[InputError]:
    errors = errors_from_pydantic(error.errors(), lambda _: model.model_fields)
    return [InputError(f"{path}:{number}", str(error)) for error in errors]


def _csv_rows(lines: list[str]) -> Iterator[tuple[int, Callable[[], Any]]]:
    names = [name.strip() for name in lines[0].split(",")]
    for number, line in enumerate(lines[1:], start=2):
        if line.strip():
            cells = [cell.strip() for cell in line.split(",")]
            yield number, lambda cells=cells: dict(zip(names, cells, strict=False))  # type: ignore[misc]


def _json_rows(lines: list[str]) -> Iterator[tuple[int, Callable[[], Any]]]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield number, lambda line=line: json.loads(line)  # type: ignore[misc]
