"""`turn-N.record`: which step of its group rank N began last, so that a rank for which the others wait is found.

Written by `moe_agent.vllm.lockstep_turns` in each engine core of a group, at the beginning of each of its steps, those
without requests of its own included; read by the agent.
"""

from pathlib import Path
from typing import NamedTuple

from moe_agent.shared_memory.layout import Layout
from moe_agent.shared_memory.seqlock import RecordReader, RecordUnreadableError, RecordWriter


class TurnState(NamedTuple):
    """The step that a rank began last.

    Attributes:
        turn: its number, in a count that all ranks share; it never falls.
        entered_s: monotonic clock of the machine when the rank began it.
    """

    turn: int
    entered_s: float


LAYOUT = Layout(TurnState)


def turn_record_path(run_dir: Path, rank: int) -> Path:
    """The file of rank `rank`."""
    return run_dir / f"turn-{rank}.record"


class TurnRecordWriter(RecordWriter[TurnState]):
    """Writes the turns of one rank; opened in its core."""

    def __init__(self, run_dir: Path, rank: int, first: TurnState) -> None:
        super().__init__(turn_record_path(run_dir, rank), LAYOUT, first)


class TurnRecords:
    """Reads the turns of the ranks of this node in the agent; a rank that has no record is left out."""

    def __init__(self, run_dir: Path, ranks: range) -> None:
        self._run_dir, self._ranks = run_dir, ranks
        self._readers: dict[int, RecordReader[TurnState]] = {}

    def remove(self) -> None:
        """Removes the records of an engine that has ended."""
        for reader in self._readers.values():
            reader.close()
        self._readers.clear()
        for rank in self._ranks:
            turn_record_path(self._run_dir, rank).unlink(missing_ok=True)

    def read(self) -> dict[int, TurnState]:
        """The last turn of each rank."""
        states = {}
        for rank in self._ranks:
            try:
                if rank not in self._readers:
                    self._readers[rank] = RecordReader(turn_record_path(self._run_dir, rank), LAYOUT, 0.0)
                states[rank] = self._readers[rank].read()
            except RecordUnreadableError:
                continue
        return states
