"""`experts-N.record`: what the worker of rank N found about its expert group, for the rank's scheduler.

Where the worker is a process of its own, the scheduler cannot ask it.
"""

from dataclasses import dataclass
from pathlib import Path

from moe_agent.shared_memory.layout import Layout
from moe_agent.shared_memory.seqlock import RecordReader, RecordWriter

# Config version of ranks on other nodes than the coordinator's: nobody there waits until the group has taken settings.
# The greatest integer that a record holds.
NOT_ASKED = 2**63 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertState:
    """What a rank knows of its expert group.

    Attributes:
        config_version: version of the control record that the group applies; 0 before it read one.
        balance: max / mean of the tokens over the group's ranks.
        pressure: tokens of this rank / the mean of the group's ranks.
    """

    config_version: int = 0
    balance: float = 1.0
    pressure: float = 1.0


LAYOUT = Layout(ExpertState)


def expert_record_path(run_dir: Path, rank: int) -> Path:
    """The file of rank `rank`."""
    return run_dir / f"experts-{rank}.record"


class ExpertRecordWriter(RecordWriter[ExpertState]):
    """Writes the record of one rank; opened by the rank's worker."""

    def __init__(self, run_dir: Path, rank: int, first: ExpertState) -> None:
        super().__init__(expert_record_path(run_dir, rank), LAYOUT, first)


class ExpertRecordReader(RecordReader[ExpertState]):
    """Reads the record of one rank in its scheduler; a read within an engine step does not wait."""

    def __init__(self, run_dir: Path, rank: int) -> None:
        super().__init__(expert_record_path(run_dir, rank), LAYOUT)


def remove_expert_records(run_dir: Path, ranks: range) -> None:
    """Removes the records of an engine that has ended."""
    for rank in ranks:
        expert_record_path(run_dir, rank).unlink(missing_ok=True)
