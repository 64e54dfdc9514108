"""How vLLM is started to exchange KV blocks with other engines, or to offload them to the host's memory. Pure.

Both are connectors of vLLM. The NixlConnector pulls blocks: the engine that decodes reads them out of the memory of the
one that computed the prompt; both meet at the side channel, a port for each data-parallel rank. The OffloadingConnector
copies blocks of the GPUs to the host's memory, and reads back what the GPUs have dropped. The facts about them are
those of vLLM 0.32 and 0.33, and of NIXL 1.5.
"""

import json
from collections.abc import Mapping
from importlib.util import find_spec
from ipaddress import ip_address

from moe_contract.addresses import is_address, local_host
from moe_contract.agent_config import EngineConfig
from moe_contract.engine_process import KV_TRANSFER_OPTION, KV_TRANSFER_VARIABLE, NO_CONNECTOR, POD_IP_VARIABLE
from moe_contract.kv_transfer import KvTransferConfig
from moe_scheduling.engine.disaggregation import EngineRole

CONNECTOR, OFFLOADING, MULTIPLE = "NixlConnector", "OffloadingConnector", "MultiConnector"
PACKAGE = "nixl"
# A consumer computes prompts for others too, and frees blocks no sooner than a transfer into them is safe. `kv_both`
# is what vLLM will remove.
_KV_ROLES = {
    EngineRole.UNIFIED: "kv_consumer",
    EngineRole.PREFILL: "kv_producer",
    EngineRole.DECODE: "kv_consumer",
}
# Offloaded blocks are stored and loaded by the same engine. Several connectors have this role together, whatever that
# of the exchange is: vLLM then frees a block no sooner than a load into it is safe.
_BOTH = "kv_both"
# Without devices the blocks travel over TCP, and through shared memory within a machine or pod.
_CPU_TRANSPORTS = "tcp,self,sm"
_LOOPBACK_DEVICE = "lo"


def build_connector_arguments(engine: EngineConfig, *, cpu_build: bool) -> list[str]:
    """Returns the arguments of vLLM by which an engine exchanges KV blocks, offloads them, or both; none for neither.

    Blocks that do not arrive are computed anew: by default vLLM would fail the request.
    """
    connectors = []
    if engine.kv_transfer is not None:
        connectors.append(_build_transfer(engine.kv_transfer, cpu_build=cpu_build))
    if engine.kv_offload_bytes is not None:
        connectors.append(_build_offload(engine.kv_offload_bytes))
    if not connectors:
        return []
    # Of several connectors the first one that has blocks loads them: those of another engine before those offloaded.
    several = {"kv_connector": MULTIPLE, "kv_role": _BOTH, "kv_connector_extra_config": {"connectors": connectors}}
    config = connectors[0] if len(connectors) == 1 else several
    return [KV_TRANSFER_OPTION, json.dumps(config | {"kv_load_failure_policy": "recompute"})]


def _build_transfer(transfer: KvTransferConfig, *, cpu_build: bool) -> dict[str, object]:
    config: dict[str, object] = {
        "kv_connector": CONNECTOR,
        "kv_role": _KV_ROLES[transfer.role],
        "kv_connector_extra_config": {"kv_lease_duration": round(transfer.lease_s)},
    }
    return config | ({"kv_buffer_device": "cpu"} if cpu_build else {})


def _build_offload(rank_bytes: int) -> dict[str, object]:
    """vLLM counts the bytes of a data-parallel rank, those of its tensor-parallel ranks together."""
    return {
        "kv_connector": OFFLOADING,
        "kv_role": _BOTH,
        "kv_connector_extra_config": {"cpu_bytes_to_use": rank_bytes},
    }


def with_transfer_environment(
    environment: Mapping[str, str], engine: EngineConfig, inherited: Mapping[str, str], *, cpu_build: bool
) -> dict[str, str]:
    """Returns the environment of an engine with that of its transfers, over which the resource's own variables win.

    Others reach the engine at its pod's address; without a pod all of them are on one machine.

    Args:
        environment: that of the engine.
        engine: the engine.
        inherited: the agent's own environment.
        cpu_build: the installed vLLM runs on CPUs.
    """
    if engine.kv_transfer is None:
        return dict(environment)
    host = inherited.get(POD_IP_VARIABLE) or local_host(engine.host)
    own = {
        KV_TRANSFER_VARIABLE: "1",
        "VLLM_NIXL_SIDE_CHANNEL_HOST": host,
        "VLLM_NIXL_SIDE_CHANNEL_PORT": str(engine.kv_transfer.port),
    }
    if cpu_build:
        # The repairs import NIXL before vLLM does, which then no longer sets the limit itself (a leak in UCX).
        defaults = {"UCX_TLS": _CPU_TRANSPORTS, "UCX_RCACHE_MAX_UNRELEASED": "1024"}
        if is_address(host) and ip_address(host).is_loopback:
            defaults["UCX_NET_DEVICES"] = _LOOPBACK_DEVICE
        own |= {name: value for name, value in defaults.items() if name not in environment}
    return {**environment, **own, **engine.env}


def find_missing_connector(engine: EngineConfig) -> str:
    """Returns why an engine that should exchange KV blocks cannot start here; empty when it can."""
    if engine.kv_transfer is None or find_spec(PACKAGE) is not None:
        return ""
    return f"{NO_CONNECTOR}, which is not installed here; use an image with it, or pip install nixl"
