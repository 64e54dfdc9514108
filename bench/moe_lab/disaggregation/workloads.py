"""The workloads of the comparison: those of the experiments, one that changes its kind half-way, and agents' sessions.

Each is a function of a seed: other requests of the same kind for each seed.
"""

import csv
import gzip
import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from moe_contract.input_errors import InputError, InvalidInput, unknown_choice
from moe_tools.shapes import Shape, ShapeSettings, build_shape
from moe_tools.simulator.arrivals import ArrivalShape, arrange
from moe_tools.traces import TraceRequest, rebase

from moe_lab.experiments.workloads import CONTEXT_TOKENS, WORKLOADS

CHANGE = "change"
AGENTS = "agents"
NAMES = (*WORKLOADS, CHANGE, AGENTS)
SESSIONS_FILE = "agent_sessions.csv.gz"
# Longest prompt with its answer that is taken from a session, and calls of one session.
SESSION_TOKENS = 65_536
SESSION_CALLS = 20
# Blocks of the prompts of the file of sessions.
_BLOCK_TOKENS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Folders:
    """Where the public data are; None: their workloads cannot be run.

    Attributes:
        traces: the traces of the experiments.
        sessions: `agent_sessions.csv.gz`.
    """

    traces: Path | None = None
    sessions: Path | None = None


def max_model_len(workload: str) -> int:
    """Returns the longest prompt with its answer that engines take for a workload."""
    return SESSION_TOKENS if workload == AGENTS else CONTEXT_TOKENS


def build_workload(name: str, count: int, rate: float, seed: int, folders: Folders) -> tuple[TraceRequest, ...]:
    """The requests of one seed, arriving at a mean rate.

    Args:
        name: one of `NAMES`.
        count: requests.
        rate: arrivals a second.
        seed: draws requests and gaps.
        folders: of public data.

    Raises:
        InvalidInput: an unknown name, or its data are not there.
    """
    if name == CHANGE:
        return arrange(_changing(count, seed), ArrivalShape.POISSON, rate, seed)
    if name == AGENTS:
        return arrange(_agent_calls(count, seed, folders.sessions), ArrivalShape.TRACE, rate, seed)
    if name not in WORKLOADS:
        raise InvalidInput([unknown_choice("--workload", name, NAMES)])
    kind = WORKLOADS[name]
    return arrange(kind.build(count, seed, folders.traces), kind.arrivals, rate, seed)


def _changing(count: int, seed: int) -> tuple[TraceRequest, ...]:
    """Long prompts with short answers, and then short prompts with long answers."""
    first = ShapeSettings(
        count=count // 2, seed=seed, longest_tokens=8192, median_output_tokens=32, longest_output_tokens=512
    )
    then = ShapeSettings(
        count=count - count // 2, seed=seed, longest_tokens=2048, median_output_tokens=256, longest_output_tokens=2048
    )
    rows = (*build_shape(Shape.TWO_END, first), *build_shape(Shape.RANDOM, then))
    return tuple(replace(row, arrival_s=float(number)) for number, row in enumerate(rows))


def _agent_calls(count: int, seed: int, folder: Path | None) -> tuple[TraceRequest, ...]:
    """The first calls of sessions that are drawn; sessions begin at even distances, at random within each."""
    if folder is None or not (folder / SESSIONS_FILE).is_file():
        raise InvalidInput([InputError("--sessions", f"a folder with {SESSIONS_FILE} is needed")])
    sessions = [calls for calls in read_sessions(folder / SESSIONS_FILE) if len(calls) > 1]
    random = np.random.default_rng(seed)
    order = itertools.cycle(random.permutation(len(sessions)))
    found: list[TraceRequest] = []
    begins_s = 0.0
    for number, index in enumerate(order):
        if len(found) >= count:
            break
        calls = sessions[index]
        # Mean time between the begins of sessions: a fifth of the life of one, so that some live at once.
        begins_s += float(random.exponential(20.0))
        found += [
            replace(call, arrival_s=begins_s + call.arrival_s, blocks=_named(call.blocks, number)) for call in calls
        ]
    return rebase(sorted(found, key=lambda call: call.arrival_s)[:count])


def _named(blocks: Sequence[int], session: int) -> tuple[int, ...]:
    """The blocks of one session, which no other one has."""
    return tuple(session * 1_000_000 + block for block in blocks)


def read_sessions(path: Path) -> list[tuple[TraceRequest, ...]]:
    """Reads the first calls of each session, without those longer than `SESSION_TOKENS`.

    Args:
        path: a CSV file, compressed, whose rows are calls in the order of their session.
    """
    rows = defaultdict(list)
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            rows[row["trace"], row["agent"]].append(row)
    return [calls for session in rows.values() if (calls := tuple(_calls(session[:SESSION_CALLS])))]


def _calls(rows: Sequence[Mapping[str, str]]) -> Iterator[TraceRequest]:
    seen: tuple[int, ...] = ()
    fresh = itertools.count()
    begin_s = float(rows[0]["t_s"])
    for row in rows:
        prompt, answer = int(row["in_tokens"]), max(1, int(row["out_tokens"]))
        if prompt + answer > SESSION_TOKENS:
            return
        kept = seen[: int(row["prefix_blocks"])]
        blocks = kept + tuple(itertools.islice(fresh, max(0, prompt // _BLOCK_TOKENS - len(kept))))
        seen = blocks if len(blocks) >= len(kept) else seen
        yield TraceRequest(
            arrival_s=float(row["t_s"]) - begin_s,
            prompt_tokens=max(1, prompt),
            output_tokens=answer,
            blocks=blocks,
            block_tokens=_BLOCK_TOKENS,
        )
