"""`prefill-N.record`: what rank N could prefill, and did, for the other ranks of its lockstep group."""

from pathlib import Path
from typing import NamedTuple

from moe_scheduling.request.prefill_budget import RankLoad

from moe_agent.shared_memory.layout import Layout
from moe_agent.shared_memory.seqlock import RecordReader, RecordWriter


class StepPart(NamedTuple):
    """The part of one rank in a step that it planned at `planned_s`."""

    planned_s: float = 0.0
    prefill_tokens: int = 0
    decoding: int = 0


class PrefillState(NamedTuple):
    """The last state that a rank published for the other ranks of its group.

    Attributes:
        written_s: monotonic clock of the machine at the write.
        decided_s: the same when the rank last planned a step.
        before: its load at that moment, before the step took from it.
        after: its load since then.
        parts: its parts in its last two steps, the newest first: when this rank defers a step, others know the one
            before.
        turn: number of the step that it planned last, in a count that all ranks share; it never falls.
        next_s: when it will plan the next step, as far as it knows; 0 where it does not.
    """

    written_s: float
    decided_s: float
    before: RankLoad
    after: RankLoad
    parts: tuple[StepPart, StepPart] = (StepPart(), StepPart())
    turn: int = 0
    next_s: float = 0.0


LAYOUT = Layout(PrefillState)


def prefill_record_path(run_dir: Path, rank: int) -> Path:
    """The file of rank `rank`."""
    return run_dir / f"prefill-{rank}.record"


class PrefillRecordWriter(RecordWriter[PrefillState]):
    """Writes the prefill state of one rank; opened by its scheduler."""

    def __init__(self, run_dir: Path, rank: int, first: PrefillState) -> None:
        super().__init__(prefill_record_path(run_dir, rank), LAYOUT, first)


class PrefillRecordReader(RecordReader[PrefillState]):
    """Reads the prefill state of another rank; a read within an engine step does not wait."""

    def __init__(self, run_dir: Path, rank: int) -> None:
        super().__init__(prefill_record_path(run_dir, rank), LAYOUT)
