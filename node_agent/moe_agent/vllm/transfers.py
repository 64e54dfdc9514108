"""Transfers of KV blocks as the scheduler of one rank sees them: which engines fit, the size of a token, what arrived.

Used by `scheduler.py` where vLLM has a KV connector. The worker's figures come with the output of a step.
"""

from collections.abc import Mapping
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from moe_agent.shared_memory.transfer_record import TransferRecord, TransferRecordWriter

# Weight that the transfers until now keep at each further one: about the last fifty count.
_KEPT = 0.98
_NIXL = "NixlConnector"


class TransferMeter:
    """Publishes the transfers of one rank.

    Args:
        run_dir: folder of the records.
        rank: the data-parallel rank.
        config: vLLM's configuration.
        kv_cache: vLLM's configuration of the KV cache.
    """

    def __init__(self, run_dir: Path, rank: int, config: Any, kv_cache: Any) -> None:
        self._config = config
        self._state = TransferRecord(peers=identify_peers(config), token_bytes=count_token_bytes(kv_cache))
        self._record = TransferRecordWriter(run_dir, rank, self._state)

    def watch(self, connector: Any) -> None:
        """Learns from what vLLM gives a connector before the engine serves: what its workers tell other engines."""
        if connector is None:
            return
        take = connector.set_xfer_handshake_metadata_pp_aware

        def learn_and_take(handshakes: Mapping[Any, Any]) -> None:
            if compared := find_compared(handshakes):
                self._state = replace(self._state, peers=identify_peers(self._config, compared))
                self._record.write(self._state)
            take(handshakes)

        connector.set_xfer_handshake_metadata_pp_aware = learn_and_take

    def count_failed(self, transfers: int) -> None:
        """Counts transfers that were not begun."""
        self._state = replace(self._state, failed=self._state.failed + transfers)
        self._record.write(self._state)

    def observe(self, output: Any) -> None:
        """Takes what a step's output says of transfers; almost every one says nothing."""
        connector = output.kv_connector_output
        if connector is None or (stats := connector.kv_connector_stats) is None:
            return
        state = count_transfers(self._state, stats.data)
        if state is not self._state:
            self._state = state
            self._record.write(state)


def count_transfers(state: TransferRecord, figures: Mapping[str, Any]) -> TransferRecord:
    """The state after the transfers of one step; the same object when there was none. Pure.

    Args:
        state: until now.
        figures: of vLLM's connector; of several connectors those of each by name.
    """
    figures = getattr(figures.get(_NIXL), "data", figures)
    seconds, sizes = figures.get("transfer_duration", ()), figures.get("bytes_transferred", ())
    failed = sum(len(figures.get(name, ())) for name in ("num_failed_transfers", "num_failed_handshakes"))
    if not seconds and not failed:
        return state
    moved_bytes, moved_s = state.moved_bytes, state.moved_s
    for taken_s, size in zip(seconds, sizes, strict=False):
        moved_bytes, moved_s = moved_bytes * _KEPT + size, moved_s * _KEPT + taken_s
    return replace(
        state,
        moved_bytes=moved_bytes,
        moved_s=moved_s,
        transfers=state.transfers + len(seconds),
        failed=state.failed + failed,
    )


def find_compared(handshakes: Mapping[Any, Any]) -> str:
    """What the workers of a rank have other engines compare; empty where one of them does not tell it. Pure."""
    compared = {getattr(payload, "compatibility_hash", "") for payload in handshakes.values()}
    return "" if "" in compared else ",".join(sorted(compared))


def identify_peers(config: Any, compared: str = "") -> int:
    """A number that is equal for engines which can exchange blocks: what the connectors compare when they first meet.

    Added is what makes the same tokens other values in the cache.

    Args:
        config: vLLM's configuration.
        compared: what the workers have other engines compare, with their attention backends; empty: not known yet, and
            the backend is the configured one.
    """
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import compute_nixl_compatibility_hash

    model = config.model_config
    compared = compared or compute_nixl_compatibility_hash(config, str(config.attention_config.backend))
    further = (compared, str(model.revision), str(model.quantization), str(config.lora_config is not None))
    return int.from_bytes(sha256("\n".join(further).encode()).digest()[:8], "big") >> 1


def count_token_bytes(kv_cache: Any) -> float:
    """Bytes of one token in the KV cache of one worker, over all layers. Pure."""
    return float(sum(_group_bytes(group) / group.kv_cache_spec.block_size for group in kv_cache.kv_cache_groups))


def _group_bytes(group: Any) -> int:
    """Bytes of a block of a group: its specification is one for each layer, or one for all of them together."""
    together = hasattr(group.kv_cache_spec, "kv_cache_specs")
    return int(group.kv_cache_spec.page_size_bytes * (1 if together else len(group.layer_names)))
