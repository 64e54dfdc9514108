"""The engine's process and its pod: environment variables, ports and the times of an orderly end.

The operator's plan and the node agent both depend on them. The plan knows an engine's share of the machine
(`share_environment`); the agent knows the installed build of vLLM and its own folder (`engine_environment`). No
variable is computed by both.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from moe_contract.agent_config import AgentConfig, EngineConfig
from moe_contract.peer_tokens import TOKENS_VARIABLE
from moe_contract.proxies import with_direct_hosts
from moe_contract.service_links import without_service_links

# Ports of the pods in a cluster; on one machine the plan takes free ones. The names are those of the containers' ports
# and of the Services', by which gateways and the operator find them.
ENGINE_PORT_NAME, AGENT_PORT_NAME = "engine", "agent"
ENGINE_PORT, AGENT_PORT = 8000, 8080
HTTP_PORT_NAME, ADMIN_PORT_NAME = "http", "admin"
HTTP_PORT, ADMIN_PORT = 8000, 8081
# vLLM's coordination of data-parallel ranks over several nodes.
DATA_PARALLEL_PORT = 13345
# Side channel for KV blocks that travel, of the first data-parallel rank; rank r listens on the port plus r.
KV_TRANSFER_PORT = 13400

RUN_DIR_VARIABLE = "MOESERVING_RUN_DIR"
# Name and address of the pod, which the plan takes from the downward API.
POD_IP_VARIABLE = "MOESERVING_POD_IP"
# Set where the engine's ranks are an expert group.
EXPERT_GROUP_VARIABLE = "MOESERVING_EXPERT_GROUP"
# Set where the engine exchanges KV blocks with others.
KV_TRANSFER_VARIABLE = "MOESERVING_KV_TRANSFER"
KV_CACHE_OPTION = "--kv-cache-memory-bytes"
KV_TRANSFER_OPTION = "--kv-transfer-config"
# The beginning of what an agent says of an engine that it does not start, because the connector is not installed.
NO_CONNECTOR = "KV transfer needs the package nixl"

# Gateways and kube-proxy notice within this time that a pod ends; until then it serves as before.
ENGINE_NOTICE_S, GATEWAY_NOTICE_S = 2, 5
# Between `accepting` turning false and the engine's SIGTERM, in which gateways stop sending.
SETTLE_S = 0.5
# For the engine to end after its streams are over, before it is killed.
END_GRACE_S = 10.0
MARGIN_S = 10
# A worker of a replica over several nodes may get its signal so much earlier than its leader.
LEADER_NOTICE_S = 5


def engine_grace_s(drain_timeout_s: float) -> int:
    """Seconds from a pod's deletion to its kill: notice, drain, the agent's pause, the engine's end, a margin."""
    return ENGINE_NOTICE_S + math.ceil(drain_timeout_s) + math.ceil(SETTLE_S + END_GRACE_S) + MARGIN_S


def leader_end_s(drain_timeout_s: float) -> float:
    """Most seconds that a worker waits for the end of its leader, which drains: the leader's notice, drain and end."""
    return LEADER_NOTICE_S + ENGINE_NOTICE_S + drain_timeout_s + SETTLE_S + END_GRACE_S


def worker_grace_s(drain_timeout_s: float) -> int:
    """Seconds from the deletion of a worker's pod to its kill: the wait for its leader's end, then its own."""
    return ENGINE_NOTICE_S + math.ceil(leader_end_s(drain_timeout_s) + END_GRACE_S) + MARGIN_S


def gateway_grace_s(drain_timeout_s: float) -> int:
    """Seconds that a gateway has to end: as long as the longest stream of an engine that drains."""
    return GATEWAY_NOTICE_S + math.ceil(drain_timeout_s) + MARGIN_S


def kv_cache_argument(count: int) -> str:
    """vLLM's option for the size of one rank's KV cache, in bytes."""
    return f"{KV_CACHE_OPTION}={count}"


def share_environment(*, threads: int | None, gpus: Sequence[str], hub_cache: str | None) -> dict[str, str]:
    """Environment of an engine that has this share of a machine.

    Args:
        threads: OpenMP threads of each rank; None leaves them to the agent.
        gpus: devices as CUDA_VISIBLE_DEVICES takes them; empty leaves all visible.
        hub_cache: folder for downloads from the hub; None: the hub's own default.
    """
    environment = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    if gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    if hub_cache is not None:
        environment["HF_HUB_CACHE"] = hub_cache
    return environment


def engine_environment(
    config: AgentConfig, inherited: Mapping[str, str], *, cpu_build: bool, cpus: int
) -> dict[str, str]:
    """Environment of the engine's process: defaults, then the inherited one, then the configuration's.

    Variables that Kubernetes derives from the names of Services are not inherited. Where a proxy is set, it is for
    downloads: this machine, Services and the pod's own address are reached without it.

    Args:
        config: the agent's configuration.
        inherited: the agent's own environment.
        cpu_build: the installed vLLM runs on CPUs.
        cpus: CPUs that this process may use.
    """
    environment = {**_defaults(config.engine, cpu_build=cpu_build, cpus=cpus), **without_service_links(inherited)}
    if config.engine.nodes > 1 and POD_IP_VARIABLE in inherited:
        # vLLM's own guess is the address of the default route, which need not be the one that the other nodes know.
        environment.setdefault("VLLM_HOST_IP", inherited[POD_IP_VARIABLE])
    environment[RUN_DIR_VARIABLE] = str(config.run_dir.absolute())
    if config.engine.guarded:
        environment[TOKENS_VARIABLE] = str(config.token_file.absolute())
    if config.engine.has_expert_group:
        environment[EXPERT_GROUP_VARIABLE] = "1"
    if any(argument.startswith(KV_CACHE_OPTION) for argument in config.engine.args):
        # vLLM lets this variable win over the argument that the resource asked for.
        environment.pop("VLLM_CPU_KVCACHE_SPACE", None)
    own = [inherited.get(name, "") for name in (POD_IP_VARIABLE, "KUBERNETES_SERVICE_HOST")]
    return with_direct_hosts({**environment, **config.engine.env}, own)


def _defaults(engine: EngineConfig, *, cpu_build: bool, cpus: int) -> dict[str, str]:
    defaults = {"VLLM_NO_USAGE_STATS": "1"}
    if cpu_build:
        # Binding by NUMA node would put every engine of the machine on the same cores.
        defaults |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(cpus)}
        if engine.tensor_parallel == 1:
            # Allows `uni` on the CPU, which vLLM would turn into `mp` because it binds threads from a parent process;
            # here they are not bound. The engine core keeps a process of its own; its worker needs none, which saves a
            # third of the start and of the memory, and a message each way at every step.
            defaults["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        if engine.data_parallel > 1:
            # vLLM 0.33 gives each rank a NUMA node of its own, and a rank for which none is left dies.
            defaults["VLLM_CPU_SIM_MULTI_NUMA"] = "1"
    if not is_on_hub(engine.model):
        defaults["HF_HUB_OFFLINE"] = "1"
    return defaults


def is_on_hub(model: str) -> bool:
    """Whether a model argument is an id on the hub: no `s3://` address, no absolute path, no existing folder."""
    return not model.startswith(("s3://", "/")) and not Path(model).is_dir()
