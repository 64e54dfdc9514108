"""`rank-N.record`: what the scheduler of data-parallel rank N publishes for the agent."""

from dataclasses import dataclass
from pathlib import Path

from moe_scheduling.signals import EngineSignal

from moe_agent.shared_memory.layout import Layout
from moe_agent.shared_memory.seqlock import RecordReader, RecordUnreadableError, RecordWriter

# The agent has time to wait for a scheduler that is interrupted within a write.
_PATIENCE_S = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class RankState:
    """The last state that a rank published.

    Attributes:
        pid: process of the rank's scheduler.
        written_s: monotonic clock of the machine (`time.monotonic`, comparable between processes) at the write.
        config_version: version of the control record that the rank orders its queue by; 0 before it read one.
        signal: the engine's state.
    """

    pid: int
    written_s: float
    config_version: int
    signal: EngineSignal

    @property
    def idle(self) -> bool:
        """Whether the rank knows of no request."""
        return self.signal.running == 0 and self.signal.waiting == 0


LAYOUT = Layout(RankState)


def rank_record_path(run_dir: Path, rank: int) -> Path:
    """The file of rank `rank`."""
    return run_dir / f"rank-{rank}.record"


class RankRecordWriter(RecordWriter[RankState]):
    """Writes the state of one rank; opened by its scheduler."""

    def __init__(self, run_dir: Path, rank: int, first: RankState) -> None:
        super().__init__(rank_record_path(run_dir, rank), LAYOUT, first)


class RankRecordReader(RecordReader[RankState]):
    """Reads the state of one rank in the agent."""

    def __init__(self, run_dir: Path, rank: int) -> None:
        super().__init__(rank_record_path(run_dir, rank), LAYOUT, _PATIENCE_S)


class RankRecords:
    """Reads the states of all ranks of this node in the agent; a rank that has published nothing yet is left out."""

    def __init__(self, run_dir: Path, ranks: range) -> None:
        self._run_dir, self._ranks = run_dir, ranks
        self._readers: dict[int, RankRecordReader] = {}

    def remove(self) -> None:
        """Removes the records of an engine that has ended: what they say no longer holds."""
        for reader in self._readers.values():
            reader.close()
        self._readers.clear()
        for rank in self._ranks:
            rank_record_path(self._run_dir, rank).unlink(missing_ok=True)

    def versions(self) -> tuple[int, ...]:
        """A number for each rank that changes with every write."""
        return tuple(reader.sequence() if (reader := self._reader(rank)) else 0 for rank in self._ranks)

    def read(self) -> dict[int, RankState]:
        """The last state of each rank."""
        states = {}
        for rank in self._ranks:
            if (reader := self._reader(rank)) is not None:
                try:
                    states[rank] = reader.read()
                except RecordUnreadableError:
                    continue
        return states

    def unstepped_s(self, now_s: float) -> float:
        """Longest time, in seconds, for which a rank with requests has published nothing; 0 where all are idle.

        A rank publishes at the end of its steps, and when a request comes.
        """
        return max((now_s - state.written_s for state in self.read().values() if not state.idle), default=0.0)

    def _reader(self, rank: int) -> RankRecordReader | None:
        if rank not in self._readers:
            try:
                self._readers[rank] = RankRecordReader(self._run_dir, rank)
            except RecordUnreadableError:
                return None
        return self._readers[rank]
