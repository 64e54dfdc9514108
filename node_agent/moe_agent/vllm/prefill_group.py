"""The prefill load of the ranks of a lockstep group, exchanged through shared-memory records in their run folder.

Made by the scheduler of each rank where ranks step together; no collective and no message, so a rank never waits for
another. Ranks on other machines are not seen: the ranks of each machine coordinate among themselves.

Invariant: a record that cannot be read, or that is old, counts as an idle rank.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from moe_scheduling.request.prefill_budget import RankLoad

from moe_agent.shared_memory.prefill_record import PrefillRecordReader, PrefillRecordWriter, PrefillState, StepPart
from moe_agent.shared_memory.seqlock import RecordUnreadableError

# A rank that has published nothing for this long is idle: while one rank of a group computes, all make steps, and those
# with requests publish at each.
IDLE_AFTER_S = 1.0
# Steps are counted by turns: from 0 on in each wave, which begins when an idle group begins to step.
WAVE_TURNS = 2**32
# Calls between two searches for the records of ranks that are not there yet, or were replaced.
_SEARCH_EVERY = 64


class PrefillGroup(Protocol):
    """Exchange of prefill loads between the ranks of a group, as one rank sees it."""

    def publish(self, state: PrefillState) -> None:
        """Makes the own state visible to the other ranks."""

    def others(self, now_s: float) -> Sequence[PrefillState]:
        """The last state of each other rank that is not idle."""


class LocalPrefillGroup:
    """The ranks on this machine, through shared-memory records.

    Args:
        run_dir: folder of the records.
        rank: the own rank.
        ranks: number of ranks in the group.
    """

    def __init__(self, run_dir: Path, rank: int, ranks: int) -> None:
        self._run_dir = run_dir
        self._record = PrefillRecordWriter(run_dir, rank, PrefillState(0.0, 0.0, RankLoad(), RankLoad()))
        self._readers: dict[int, PrefillRecordReader | None] = {other: None for other in range(ranks) if other != rank}
        self._calls = 0

    def publish(self, state: PrefillState) -> None:
        self._record.write(state)

    def others(self, now_s: float) -> Sequence[PrefillState]:
        searches = self._calls % _SEARCH_EVERY == 0
        self._calls += 1
        states = []
        for rank, reader in self._readers.items():
            state = _read(reader)
            if searches and (state is None or now_s - state.written_s > IDLE_AFTER_S):
                state = _read(self._open(rank))
            if state is not None and now_s - state.written_s <= IDLE_AFTER_S:
                states.append(state)
        return states

    def _open(self, rank: int) -> PrefillRecordReader | None:
        """A reader of the record in place now: an engine that starts again replaces it."""
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
    """The load that the other ranks put into a step.

    Attributes:
        prefill_tokens: most prompt tokens of one rank.
        decoding: most decoding requests of one rank.
        tokens: all tokens of all these ranks.
    """

    prefill_tokens: int = 0
    decoding: int = 0
    tokens: int = 0


def sum_parts(parts: Iterable[StepPart]) -> OtherParts:
    """The load of one part for each rank; a rank without a part put nothing in."""
    prefill_tokens = decoding = tokens = 0
    for part in parts:
        prefill_tokens = max(prefill_tokens, part.prefill_tokens)
        decoding = max(decoding, part.decoding)
        tokens += part.prefill_tokens + part.decoding
    return OtherParts(prefill_tokens, decoding, tokens)


def load_in_this_step(state: PrefillState, last_decided_s: float, now_s: float) -> RankLoad:
    """The load of another rank that counts for the step that is planned now.

    The ranks plan a step at nearly the same time, in no certain order. A rank that has planned it already has taken its
    own part from its load, so its load before that counts. Two steps are further apart than two ranks are within one,
    so a plan made after the middle between the own last plan and now belongs to this step.

    Args:
        state: the state that the rank published.
        last_decided_s: when the own rank planned the step before.
        now_s: monotonic clock of the machine.
    """
    return state.before if state.decided_s > (last_decided_s + now_s) / 2 else state.after
