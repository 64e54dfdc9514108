"""`transfers-N.record`: what the scheduler of rank N says of KV blocks that travel, for the agent.

Written at the scheduler's start and after each step in which transfers ended.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from moe_contract.kv_transfer import KvTransferConfig, KvTransferState

from moe_agent.shared_memory.layout import Layout
from moe_agent.shared_memory.seqlock import RecordReader, RecordUnreadableError, RecordWriter

_PATIENCE_S = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferRecord:
    """What one rank knows of transfers.

    Attributes:
        peers: 63 bits, equal for engines that can exchange blocks.
        token_bytes: bytes of one token in the KV cache of one worker, over all layers.
        moved_bytes: recent transfers to this rank, older ones weighted less, in bytes.
        moved_s: the time of the same transfers, with the same weights, in seconds.
        transfers: transfers to this rank since its start.
        failed: failed ones of them.
    """

    peers: int
    token_bytes: float
    moved_bytes: float = 0.0
    moved_s: float = 0.0
    transfers: int = 0
    failed: int = 0


LAYOUT = Layout(TransferRecord)


def transfer_record_path(run_dir: Path, rank: int) -> Path:
    """The file of rank `rank`."""
    return run_dir / f"transfers-{rank}.record"


class TransferRecordWriter(RecordWriter[TransferRecord]):
    """Writes the record of one rank; opened by its scheduler."""

    def __init__(self, run_dir: Path, rank: int, first: TransferRecord) -> None:
        super().__init__(transfer_record_path(run_dir, rank), LAYOUT, first)


class TransferRecords:
    """Reads the records of all ranks of this node in the agent.

    Args:
        run_dir: folder of the records.
        ranks: the data-parallel ranks of this node.
        config: how the engine takes part.
    """

    def __init__(self, run_dir: Path, ranks: range, config: KvTransferConfig) -> None:
        self._run_dir, self._ranks, self._config = run_dir, ranks, config
        self._readers: dict[int, RecordReader[TransferRecord]] = {}

    def remove(self) -> None:
        """Removes the records of an engine that has ended."""
        for reader in self._readers.values():
            reader.close()
        self._readers.clear()
        for rank in self._ranks:
            transfer_record_path(self._run_dir, rank).unlink(missing_ok=True)

    def versions(self) -> tuple[int, ...]:
        """A number for each rank that changes with every write."""
        return tuple(reader.sequence() if (reader := self._reader(rank)) else 0 for rank in self._ranks)

    def read(self) -> KvTransferState:
        """The state of the engine: not known yet until all of its ranks have written."""
        found = []
        for rank in self._ranks:
            if (reader := self._reader(rank)) is not None:
                try:
                    found.append(reader.read())
                except RecordUnreadableError:
                    continue
        return build_state(self._config, found, len(self._ranks))

    def _reader(self, rank: int) -> RecordReader[TransferRecord] | None:
        if rank not in self._readers:
            try:
                self._readers[rank] = RecordReader(transfer_record_path(self._run_dir, rank), LAYOUT, _PATIENCE_S)
            except RecordUnreadableError:
                return None
        return self._readers[rank]


def build_state(config: KvTransferConfig, records: Iterable[TransferRecord], ranks: int) -> KvTransferState:
    """The state of an engine from the records of the ranks that have written one; it has `ranks` in all."""
    records = [*records]
    peers = {record.peers for record in records}
    moved_s = sum(record.moved_s for record in records)
    return KvTransferState(
        role=config.role,
        lease_s=config.lease_s,
        peers=f"{peers.pop():016x}" if len(records) == ranks and len(peers) == 1 else "",
        token_bytes=max((record.token_bytes for record in records), default=0.0),
        bytes_per_s=sum(record.moved_bytes for record in records) / moved_s if moved_s > 0.0 else 0.0,
        transfers=sum(record.transfers for record in records),
        failed=sum(record.failed for record in records),
    )
