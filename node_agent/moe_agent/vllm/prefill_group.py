"""Prefill states that the ranks of a lockstep group exchange through shared-memory records in their common folder.

Made by the scheduler of each rank where ranks step together; without collectives and messages, so that a rank never
waits for another. Ranks on other machines are not seen: the ranks of each machine coordinate among themselves.

Invariant: a record that cannot be read, or that is old, counts as an idle rank.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from moe_scheduling.request.prefill_budget import RankLoad

from moe_agent.shared_memory.prefill_record import PrefillRecordReader, PrefillRecordWriter, PrefillState, StepPart
from moe_agent.shared_memory.seqlock import RecordUnreadableError

# Seconds after its last write from which a rank counts as idle: while one rank of a group computes, all make steps, and
# ranks with requests write at each.
IDLE_AFTER_S = 1.0
# Turns number the steps: from 0 on in each wave; a wave begins when an idle group begins to step.
WAVE_TURNS = 2**32
# Calls between two attempts to open records that do not exist yet or were replaced.
_LOOK_EVERY = 64


class PrefillGroup(Protocol):
    """The exchange with the other ranks of a group."""

    def publish(self, state: PrefillState) -> None:
        """Writes the state of this rank for the others."""

    def others(self, now_s: float) -> Sequence[PrefillState]:
        """Returns the newest state of each other rank that is not idle."""


class SharedMemoryPrefillGroup:
    """The exchange with the ranks on this machine.

    Args:
        run_dir: folder of the records.
        rank: number of this rank.
        ranks: number of ranks of the group.
    """

    def __init__(self, run_dir: Path, rank: int, ranks: int) -> None:
        self._run_dir = run_dir
        self._record = PrefillRecordWriter(run_dir, rank, PrefillState(0.0, 0.0, RankLoad(), RankLoad()))
        self._readers: dict[int, PrefillRecordReader | None] = {other: None for other in range(ranks) if other != rank}
        self._calls = 0

    def publish(self, state: PrefillState) -> None:
        self._record.write(state)

    def others(self, now_s: float) -> Sequence[PrefillState]:
        reopens = self._calls % _LOOK_EVERY == 0
        self._calls += 1
        states = []
        for rank, reader in self._readers.items():
            state = _read(reader)
            if reopens and (state is None or now_s - state.written_s > IDLE_AFTER_S):
                state = _read(self._open(rank))
            if state is not None and now_s - state.written_s <= IDLE_AFTER_S:
                states.append(state)
        return states

    def _open(self, rank: int) -> PrefillRecordReader | None:
        """Opens the record that is in place now: a restarted engine replaces its record. None where there is none."""
        if (old := self._readers[rank]) is not None:
            old.close()
        try:
            reader = PrefillRecordReader(self._run_dir, rank)
        except RecordUnreadableError:
            reader = None
        self._readers[rank] = reader
        return reader


def _read(reader: PrefillRecordReader | None) -> PrefillState | None:
    try:
        return None if reader is None else reader.read()
    except RecordUnreadableError:
        return None


class OtherParts(NamedTuple):
    """Load of the other ranks in one step.

    Attributes:
        prefill_tokens: greatest number of prompt tokens of one rank.
        decoding: greatest number of decoding requests of one rank.
        tokens: tokens of all of them.
    """

    prefill_tokens: int = 0
    decoding: int = 0
    tokens: int = 0


def sum_parts(parts: Iterable[StepPart]) -> OtherParts:
    """Returns the load of a step from the parts of the other ranks; missing parts count as empty."""
    prefill_tokens = decoding = tokens = 0
    for part in parts:
        prefill_tokens = max(prefill_tokens, part.prefill_tokens)
        decoding = max(decoding, part.decoding)
        tokens += part.prefill_tokens + part.decoding
    return OtherParts(prefill_tokens, decoding, tokens)


def load_in_this_step(state: PrefillState, last_decided_s: float, now_s: float) -> RankLoad:
    """Returns the load that another rank had before its part of the step that is planned now.

    The ranks plan a step at nearly the same time, in any order. A rank that has planned it already has subtracted its
    part, so its load before counts. Plans of two steps are further apart than plans of one step, so a plan made after
    the middle between this rank's last plan and now belongs to this step.

    Args:
        state: the other rank's state.
        last_decided_s: when this rank planned the step before.
        now_s: the time, on the monotonic clock of the machine.
    """
    return state.before if state.decided_s > (last_decided_s + now_s) / 2 else state.after
