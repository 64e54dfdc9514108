"""vLLM's side of a KV transfer in virtual time: what NIXL's pull connector tells the scheduler, without a worker.

Loaded by vLLM by its path. The scheduler asks how many tokens of a prompt come from elsewhere, allocates blocks for
them, and keeps the blocks of a computed prompt until they were fetched; all of that is vLLM's own code. When a transfer
ends the world says so, in the output of a step, as a worker does.

The protocol is that of `NixlPullConnectorScheduler` (vLLM 0.32): `do_remote_decode` in the request to the prefill
engine, `do_remote_prefill` in the one to the decode engine.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorBase_V1, KVConnectorRole, SupportsHMA
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata
from vllm.v1.request import RequestStatus


class Pull(NamedTuple):
    """A request whose blocks are to be fetched: `tokens` of them, 0 where the local cache holds all."""

    name: str
    tokens: int


@dataclass
class Pulls(KVConnectorMetadata):
    """The transfers that begin with a step."""

    pulls: list[Pull] = field(default_factory=list)


class SimulatedConnector(KVConnectorBase_V1, SupportsHMA):
    """The scheduler's half of a connector that pulls."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._pulls: list[Pull] = []

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        params = request.kv_transfer_params
        if params and params.get("do_remote_prefill"):
            tokens = request.num_prompt_tokens - num_computed_tokens
            return (tokens, True) if tokens > 0 else (0, False)
        return 0, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        params = request.kv_transfer_params
        if params and params.get("do_remote_prefill"):
            self._pulls.append(Pull(request.request_id, num_external_tokens))
            # One transfer a request: after a preemption the tokens are computed here.
            params["do_remote_prefill"] = False

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        pulls, self._pulls = self._pulls, []
        return Pulls(pulls)

    def request_finished_all_groups(self, request: Any, block_ids: Any) -> tuple[bool, dict[str, Any] | None]:
        params = request.kv_transfer_params
        is_computed = request.status is RequestStatus.FINISHED_LENGTH_CAPPED
        return bool(params and params.get("do_remote_decode") and is_computed), None

    # The worker's half: there is no worker.

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        raise NotImplementedError

    def wait_for_layer_load(self, layer_name: str) -> None:
        raise NotImplementedError

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        raise NotImplementedError

    def wait_for_save(self) -> None:
        raise NotImplementedError
