"""The KV blocks of one rank that lie in the host's memory: which tokens of a request vLLM would load from there.

Used by `scheduler.py` where vLLM has an OffloadingConnector, alone or as one of several. To look changes nothing there:
neither the order of eviction nor a statistic.
"""

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector
from vllm.v1.kv_offload.base import LookupResult, ReqContext, make_offload_key
from vllm.v1.kv_offload.cpu.manager import CPUOffloadingManager
from vllm.v1.request import Request

_NOBODY = ReqContext(req_id="")


class OffloadTier:
    """Looks into vLLM's table of offloaded blocks.

    Args:
        manager: vLLM's table.
        groups: the groups of the KV cache that are offloaded, each of full attention.
    """

    def __init__(self, manager: CPUOffloadingManager, groups: Any) -> None:
        self._manager, self._groups = manager, groups

    def held_tokens(self, request: Request, cached_tokens: int) -> int:
        """Returns the leading tokens that the rank holds: those cached on the GPU, and the offloaded ones after them.

        Loading a token takes a small part of the time of computing it, so both count alike.

        Args:
            request: one that waits.
            cached_tokens: its leading tokens that the GPU holds.
        """
        return max(cached_tokens, min(self._held_in_group(group, request, cached_tokens) for group in self._groups))

    @property
    def room_tokens(self) -> int:
        """Tokens for which the tier has room; its groups share its chunks."""
        chunk_tokens: int = min(group.tokens_per_chunk for group in self._groups)
        return self._manager._num_chunks // len(self._groups) * chunk_tokens

    def _held_in_group(self, group: Any, request: Request, cached_tokens: int) -> int:
        chunk_tokens: int = group.tokens_per_chunk
        # The last token of a prompt is always computed.
        end = (request.num_tokens - 1) // chunk_tokens
        for chunk in range(cached_tokens // chunk_tokens, end):
            block = request.block_hashes[(chunk + 1) * group.hashes_per_chunk - 1]
            if self._manager.lookup(make_offload_key(block, group.group_idx), _NOBODY) is LookupResult.MISS:
                return chunk * chunk_tokens
        return end * chunk_tokens


def find_tier(connector: Any) -> OffloadTier | None:
    """Returns the tier of a scheduler with this connector.

    None without one, where the attention has windows, and where a connector of the user's own keeps its blocks in
    another way: the order then counts the blocks on the GPU alone.
    """
    for part in getattr(connector, "sub_connectors", [connector]):
        if isinstance(part, OffloadingConnector):
            scheduler = part.connector_scheduler
            manager = getattr(scheduler, "manager", None)
            groups = getattr(getattr(scheduler, "config", None), "kv_group_configs", ())
            has_windows = any(group.sliding_window_size_in_chunks is not None for group in groups)
            if isinstance(manager, CPUOffloadingManager) and groups and not has_windows:
                return OffloadTier(manager, groups)
            return None
    return None
