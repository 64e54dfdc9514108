"""The configuration of one engine: how the fields of the resource become vLLM's arguments and environment. Pure."""

from dataclasses import dataclass

from moe_contract.agent_config import EngineConfig
from moe_contract.engine_process import kv_cache_argument, share_environment
from moe_contract.kv_transfer import KvTransferConfig

from moe_operator.api.engine import Runtime
from moe_operator.api.model import Model as ModelSection
from moe_operator.api.resource import MoEServing
from moe_operator.api.units import duration_s, quantity_value
from moe_operator.plan import kv_offload

# Part of the machine's memory that the KV caches of CPU engines take together when nobody says: the weights, the
# processes themselves (about 1 GiB a rank) and the machine's other work need the rest.
CPU_KV_CACHE_PART = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What one replica has of the machine.

    Attributes:
        threads: OpenMP threads of each rank, on the CPU runtime alone; None leaves them to the agent, which takes as
            many as it may use CPUs.
        kv_cache_bytes: KV cache of each rank; None leaves it to vLLM.
        gpus: the devices that it sees; empty on the CPU runtime.
    """

    threads: int | None = None
    kv_cache_bytes: int | None = None
    gpus: tuple[str, ...] = ()


def build_engine(
    resource: MoEServing, *, host: str, port: int, share: Share, transfer: KvTransferConfig | None = None
) -> EngineConfig:
    """The engine part of an agent's configuration. What the resource says itself comes last and wins."""
    engine, model = resource.spec.engine, resource.spec.model
    return EngineConfig(
        host=host,
        port=port,
        model=_model_argument(model),
        served_name=model.served_name,
        revision=model.revision,
        data_parallel=engine.parallelism.data,
        tensor_parallel=engine.parallelism.tensor,
        expert_parallel=engine.parallelism.expert,
        redundant_experts=resource.spec.scheduling.expert.redundant_experts,
        nodes=engine.parallelism.nodes,
        args=(*_arguments(model, share), *engine.args),
        env={**_environment(resource, share), **engine.env},
        startup_timeout_s=duration_s(engine.startup_timeout),
        liveness_timeout_s=duration_s(engine.liveness_timeout),
        drain_timeout_s=duration_s(engine.drain_timeout),
        # Where clients need keys, nobody else's requests are answered.
        guarded=resource.spec.gateway.auth is not None,
        kv_transfer=transfer,
        kv_offload_bytes=kv_offload.rank_bytes(resource),
    )


def kv_cache_bytes(resource: MoEServing, memory_bytes: int, ranks: int) -> int | None:
    """KV cache of one of the ranks that share so much memory; None leaves it to vLLM."""
    engine = resource.spec.engine
    if engine.resources.kv_cache_memory is not None:
        return int(quantity_value(engine.resources.kv_cache_memory))
    if engine.runtime is Runtime.VLLM:
        return None
    return int(memory_bytes * CPU_KV_CACHE_PART) // ranks


def _model_argument(model: ModelSection) -> str:
    scheme, _, rest = model.uri.partition("://")
    return model.uri if scheme == "s3" else rest


def _arguments(model: ModelSection, share: Share) -> list[str]:
    arguments = []
    if share.kv_cache_bytes is not None:
        arguments.append(kv_cache_argument(share.kv_cache_bytes))
    if model.uri.startswith("s3://"):
        arguments.append("--load-format=runai_streamer")
    return arguments


def _environment(resource: MoEServing, share: Share) -> dict[str, str]:
    cache = resource.spec.model.cache
    return share_environment(threads=share.threads, gpus=share.gpus, hub_cache=None if cache is None else cache.path)
