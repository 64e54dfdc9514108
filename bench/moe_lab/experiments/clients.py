"""Loads of many clients, drawn from published files: coding agents, the tenants of the arena, ServeGen's clients.

Each is a function of a seed. The files are named by the caller, for none is part of the project. What they cannot say
stands at each function, and in docs/simulator.md.
"""

import csv
import gzip
import io
import itertools
import json
import math
import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from moe_contract.input_errors import InputError, InvalidInput
from moe_tools.traces import TraceRequest

SESSIONS_FILE = "agent_sessions.csv.gz"
ARENA_FILE = "arena_tenants.csv"
CLIENTS_FILE = "servegen_deepseek_r1_clients.csv.gz"
LENGTHS_FILE = "servegen_deepseek_r1_length_quantiles.json.gz"
# Longest prompt with its answer that is taken from a session, and calls of one session.
SESSION_TOKENS = 65_536
SESSION_CALLS = 40
# The longest think time: after longer ones a person was away.
LONGEST_THINK_S = 60.0
# Blocks of the prompts of the file of sessions.
_BLOCK_TOKENS = 64

Row = Mapping[str, str]


def build_agents(count: int, seed: int, folder: Path | None, option: str = "traces") -> tuple[TraceRequest, ...]:
    """Returns calls of coding agents: whole conversations, in an order that is drawn, the last one cut short.

    A call's prompt is the one before it and more; it comes a think time, at most `LONGEST_THINK_S`, after the answer.
    When conversations begin is not published.

    Args:
        count: calls.
        seed: draws the conversations.
        folder: has `SESSIONS_FILE`.
        option: that names the folder, for errors.

    Raises:
        InvalidInput: the file is not there, or its rows are not those of such a file.
    """
    path = _find(folder, SESSIONS_FILE, option)
    sessions = [calls for calls in read_sessions(path) if len(calls) > 1]
    if not sessions:
        raise InvalidInput([InputError(str(path), "has no session of several calls")])
    random = np.random.default_rng(seed)
    order = itertools.cycle(random.permutation(len(sessions)))
    drawn = (_name(sessions[index], number) for number, index in enumerate(order))
    return tuple(itertools.islice(itertools.chain.from_iterable(drawn), count))


def _name(calls: Sequence[TraceRequest], number: int) -> list[TraceRequest]:
    """The calls as a conversation that shares no block with any other."""
    return [
        replace(call, conversation=f"c{number}", blocks=tuple(number * 1_000_000 + block for block in call.blocks))
        for call in calls
    ]


def read_sessions(path: Path) -> list[tuple[TraceRequest, ...]]:
    """Reads the first calls of each session, up to the first of more than `SESSION_TOKENS` tokens.

    Args:
        path: a CSV file, compressed, whose rows are calls in the order of their session.

    Raises:
        InvalidInput: a row is not that of such a file.
    """
    rows = defaultdict(list)
    try:
        for row in _read_csv(path):
            rows[row["trace"], row["agent"]].append(row)
        return [calls for session in rows.values() if (calls := tuple(_calls(session[:SESSION_CALLS])))]
    except (KeyError, ValueError) as error:
        raise _unlike(path, error) from None


def _calls(rows: Sequence[Row]) -> Iterator[TraceRequest]:
    seen: tuple[int, ...] = ()
    fresh = itertools.count()
    for row in rows:
        prompt, answer = max(1, int(row["in_tokens"])), max(1, int(row["out_tokens"]))
        if prompt + answer > SESSION_TOKENS:
            return
        kept = seen[: int(row["prefix_blocks"])]
        blocks = kept + tuple(itertools.islice(fresh, max(0, prompt // _BLOCK_TOKENS - len(kept))))
        seen = blocks
        yield TraceRequest(
            arrival_s=0.0,
            prompt_tokens=prompt,
            output_tokens=answer,
            blocks=blocks,
            block_tokens=_BLOCK_TOKENS,
            # Where a row has none the pause is not known.
            think_s=min(LONGEST_THINK_S, float(row["think_time_s"] or 0.0)),
        )


def build_arena(count: int, seed: int, folder: Path | None) -> tuple[TraceRequest, ...]:
    """Returns requests drawn from those of the arena's tenants: shares and lengths are theirs.

    The times of the file are of months squeezed into ten minutes, and are left out.

    Args:
        count: requests.
        seed: draws them.
        folder: has `ARENA_FILE`.

    Raises:
        InvalidInput: the file is not there, or its rows are not those of such a file.
    """
    path = _find(folder, ARENA_FILE)
    rows = _read_csv(path)
    random = np.random.default_rng(seed)
    try:
        known = [(int(row["client"]), int(row["prompt_len"]), int(row["output_len"])) for row in rows]
        drawn = [known[index] for index in random.integers(0, len(known), count)]
    except (KeyError, ValueError) as error:
        raise _unlike(path, error) from None
    return tuple(
        TraceRequest(arrival_s=float(number), tenant=tenant, prompt_tokens=max(1, prompt), output_tokens=max(1, output))
        for number, (tenant, prompt, output) in enumerate(drawn)
    )


def build_servegen(count: int, seed: int, folder: Path | None) -> tuple[TraceRequest, ...]:
    """Returns the requests of ServeGen's clients in one of its windows of ten minutes, which is drawn.

    Each client has its own rate and distribution of gaps, so that bursts are those of clients, and its own lengths. A
    published fit may have another mean than the published rate: the rate counts. Prompt and answer are drawn apart, for
    quantiles do not say how they go together.

    Args:
        count: requests.
        seed: draws the window, gaps and lengths.
        folder: has `CLIENTS_FILE` and `LENGTHS_FILE`.

    Raises:
        InvalidInput: a file is not there, or is not as published.
    """
    path, lengths_path = _find(folder, CLIENTS_FILE), _find(folder, LENGTHS_FILE)
    random = np.random.default_rng(seed)
    rows = _read_csv(path)
    try:
        windows = sorted({int(row["window_start_s"]) for row in rows})
        window_s = windows[int(random.integers(0, len(windows)))]
        active = [row for row in rows if int(row["window_start_s"]) == window_s and float(row["rate_req_s"]) > 0]
        arrivals = _client_arrivals(active, count, random)
    except (KeyError, ValueError) as error:
        raise _unlike(path, error) from None
    try:
        lengths = json.loads(_read(lengths_path))
        quantiles = np.asarray(lengths["quantiles"], dtype=float)
        senders = {client for _, client in arrivals}
        tables = {client: _at(lengths["clients"][client], window_s) for client in sorted(senders)}
        return tuple(
            TraceRequest(
                arrival_s=time_s,
                tenant=int(client),
                prompt_tokens=_draw_length(tables[client]["input_tokens"], quantiles, random),
                output_tokens=_draw_length(tables[client]["output_tokens"], quantiles, random),
            )
            for time_s, client in arrivals
        )
    except (LookupError, ValueError, TypeError) as error:
        raise _unlike(lengths_path, error) from None


def _client_arrivals(rows: Sequence[Row], count: int, random: np.random.Generator) -> list[tuple[float, str]]:
    """The first `count` arrivals of all clients together, in order, from 0 s on."""
    if not rows:
        raise ValueError("no client sends in this window")
    total = sum(float(row["rate_req_s"]) for row in rows)
    found: list[tuple[float, str]] = []
    # Bursty clients may send few in a short time: the time is lengthened until there are enough.
    span_s = 1.2 * count / total
    while len(found) < count:
        found = sorted((time_s, row["client"]) for row in rows for time_s in _times(row, span_s, random))
        span_s *= 2.0
    first_s = found[0][0]
    return [(time_s - first_s, client) for time_s, client in found[:count]]


def _times(row: Row, span_s: float, random: np.random.Generator) -> np.ndarray:
    """Arrivals of one client within a span; it is somewhere within a gap when the span begins."""
    shape, scale, rate = float(row["arg1"]), float(row["arg2"]), float(row["rate_req_s"])
    gaps = math.ceil(span_s * rate) + 20
    times = np.empty(0)
    while not len(times) or times[-1] < span_s:
        if row["gap_dist"] == "Weibull":
            drawn = scale * random.weibull(shape, gaps) / (scale * math.gamma(1.0 + 1.0 / shape))
        elif row["gap_dist"] == "Gamma":
            drawn = random.gamma(shape, scale, gaps) / (shape * scale)
        else:
            raise ValueError(f"gap_dist {row['gap_dist']!r}; known: Gamma, Weibull")
        before_s = times[-1] if len(times) else -random.random() * drawn[0] / rate
        times = np.concatenate([times, before_s + np.cumsum(drawn) / rate])
    return times[times < span_s]


def _at(periods: Mapping[str, Mapping[str, Sequence[float] | None]], window_s: int) -> Mapping[str, Sequence[float]]:
    """The quantiles of the period that a window lies in; of another one where that has none."""
    begins = sorted((int(begin) for begin, table in periods.items() if table["input_tokens"]), reverse=True)
    begin = next((begin for begin in begins if begin <= window_s), begins[-1])
    return periods[str(begin)]  # type: ignore[return-value]


def _draw_length(values: Sequence[float], quantiles: np.ndarray, random: np.random.Generator) -> int:
    return max(1, round(float(np.interp(random.random(), quantiles, values))))


def _find(folder: Path | None, name: str, option: str = "traces") -> Path:
    if folder is None or not (folder / name).is_file():
        raise InvalidInput([InputError(option, f"a folder with {name} is needed")])
    return folder / name


def _read_csv(path: Path) -> list[Row]:
    """The rows of a CSV file."""
    try:
        text = _read(path).decode()
    except UnicodeDecodeError as error:
        raise _unreadable(path, error) from None
    return list(csv.DictReader(io.StringIO(text)))


def _read(path: Path) -> bytes:
    """The bytes of a file; one whose name ends in .gz is compressed."""
    try:
        raw = path.read_bytes()
        return gzip.decompress(raw) if path.suffix == ".gz" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> InvalidInput:
    return InvalidInput([InputError(str(path), f"cannot be read: {error}")])


def _unlike(path: Path, error: Exception) -> InvalidInput:
    return InvalidInput([InputError(str(path), f"is not as published: {error!r}")])
