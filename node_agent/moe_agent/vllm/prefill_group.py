"""What the ranks of a lockstep group know of one another's prefills, through pages in the folder they share.

Made by the scheduler of each rank where ranks step together; no collective and no message, so a rank never waits for
another. Ranks on other machines are not seen: each machine's ranks keep step among themselves.

Invariant: a page that cannot be read, or that is old, counts as an idle rank.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from moe_scheduling.request.prefill_budget import RankLoad

from moe_agent.shared_memory.records import (
    PageUnreadableError,
    PrefillPageReader,
    PrefillPageWriter,
    PrefillState,
    StepPart,
)

# A rank that has told nothing for so long is idle: while one rank of a group computes, all make steps, and those with
# requests tell at each.
IDLE_AFTER_S = 1.0
# Steps are counted by turns: from 0 on in each wave, which begins when an idle group begins to step.
WAVE_TURNS = 2**32
# Calls between two looks for the pages of ranks that are not there yet, or were put in place anew.
_LOOK_EVERY = 64


class PrefillGroup(Protocol):
    """The other ranks."""

    def publish(self, state: PrefillState) -> None:
        """Shows the own state to the others."""

    def others(self, now_s: float) -> Sequence[PrefillState]:
        """What those of the others last told that are not idle."""


class PagedPrefillGroup:
    """The ranks on this machine.

    Args:
        run_dir: where the pages are.
        rank: the own one.
        ranks: how many the group has.
    """

    def __init__(self, run_dir: Path, rank: int, ranks: int) -> None:
        self._run_dir = run_dir
        self._page = PrefillPageWriter(run_dir, rank, PrefillState(0.0, 0.0, RankLoad(), RankLoad()))
        self._readers: dict[int, PrefillPageReader | None] = {other: None for other in range(ranks) if other != rank}
        self._calls = 0

    def publish(self, state: PrefillState) -> None:
        self._page.write(state)

    def others(self, now_s: float) -> Sequence[PrefillState]:
        looks = self._calls % _LOOK_EVERY == 0
        self._calls += 1
        states = []
        for rank, reader in self._readers.items():
            state = _read(reader)
            if looks and (state is None or now_s - state.written_s > IDLE_AFTER_S):
                state = _read(self._open(rank))
            if state is not None and now_s - state.written_s <= IDLE_AFTER_S:
                states.append(state)
        return states

    def _open(self, rank: int) -> PrefillPageReader | None:
        """The page in place now: an engine that starts again puts a new one there."""
        if (old := self._readers[rank]) is not None:
            old.close()
        try:
            reader = PrefillPageReader(self._run_dir, rank)
        except PageUnreadableError:
            reader = None
        self._readers[rank] = reader
        return reader


def _read(reader: PrefillPageReader | None) -> PrefillState | None:
    try:
        return None if reader is None else reader.read()
    except PageUnreadableError:
        return None


class OtherParts(NamedTuple):
    """What the other ranks put into a step.

    Attributes:
        prefill_tokens: most prompt tokens of one of them.
        decoding: most decoding requests of one of them.
        tokens: all tokens of all of them.
    """

    prefill_tokens: int = 0
    decoding: int = 0
    tokens: int = 0


def sum_parts(parts: Iterable[StepPart]) -> OtherParts:
    """Of one part of each rank; one that is missing put nothing in."""
    prefill_tokens = decoding = tokens = 0
    for part in parts:
        prefill_tokens = max(prefill_tokens, part.prefill_tokens)
        decoding = max(decoding, part.decoding)
        tokens += part.prefill_tokens + part.decoding
    return OtherParts(prefill_tokens, decoding, tokens)


def load_in_this_step(state: PrefillState, last_decided_s: float, now_s: float) -> RankLoad:
    """What another rank had, or still has, to put into the step that is planned now.

    The ranks plan a step at nearly the same time, in no certain order. One that has planned it already has taken its
    own part from its load: what counts is the load before. Two steps are further apart than two ranks are within one,
    so a plan made after the middle between the own last one and now belongs to this step.

    Args:
        state: what it told.
        last_decided_s: when the own rank planned the step before.
        now_s: monotonic clock of the machine.
    """
    return state.before if state.decided_s > (last_decided_s + now_s) / 2 else state.after
