"""The command line of vLLM on one node, from the agent's configuration. Pure."""

import json

from moe_contract.agent_config import EngineConfig
from moe_contract.engine_process import DATA_PARALLEL_PORT, KV_CACHE_OPTION
from moe_scheduling.expert.decision import ExpertSettings

from moe_agent.supervisor.kv_transfer import build_connector_arguments
from moe_agent.supervisor.node import Node

SCHEDULER = "moe_agent.vllm.scheduler.OrderedScheduler"
GUARD = "moe_agent.vllm.peer_guard.PeersOnly"
MIDDLEWARE = "moe_agent.vllm.middleware.ServingRoutesOnly"
SERVER = ("-m", "vllm.entrypoints.openai.api_server")
HEADLESS = ("-m", "moe_agent.vllm.headless", "--headless")
DEFAULT_EXPERT = ExpertSettings()
# vLLM's own default on a CPU takes half of the machine, which several engines on one machine cannot.
CPU_KV_CACHE_BYTES = 1 << 30


def build_command(
    engine: EngineConfig, node: Node, *, cpu_build: bool, expert: ExpertSettings = DEFAULT_EXPERT
) -> list[str]:
    """What Python is to run on this node."""
    module = HEADLESS if node.headless else SERVER
    return [*module, *build_arguments(engine, node, cpu_build=cpu_build, expert=expert)]


def build_arguments(
    engine: EngineConfig, node: Node, *, cpu_build: bool, expert: ExpertSettings = DEFAULT_EXPERT
) -> list[str]:
    """Arguments of vLLM on this node; those of the resource come last, because the last one wins.

    Args:
        engine: the engine.
        node: which of the replica's nodes this is.
        cpu_build: the installed vLLM runs on CPUs.
        expert: the settings of experts at the start.
    """
    arguments = [
        *([] if node.headless else _build_server_arguments(engine)),
        *("--model", engine.model, "--served-model-name", engine.served_name),
        *("--data-parallel-size", str(engine.data_parallel), "--tensor-parallel-size", str(engine.tensor_parallel)),
        *_build_node_arguments(engine, node),
        *("--scheduler-cls", SCHEDULER),
        # Makes a request's `priority` field acceptable; the order is the scheduler class's own.
        *("--scheduling-policy", "priority"),
        *("--shutdown-timeout", str(max(1, round(engine.drain_timeout_s)))),
    ]
    if engine.revision is not None:
        arguments += ["--revision", engine.revision]
    if engine.expert_parallel:
        arguments.append("--enable-expert-parallel")
    if engine.has_expert_group:
        arguments += _build_balancer_arguments(engine, expert, cpu_build=cpu_build)
    arguments += build_connector_arguments(engine, cpu_build=cpu_build)
    if cpu_build:
        arguments += [KV_CACHE_OPTION, str(CPU_KV_CACHE_BYTES)]
        if engine.tensor_parallel == 1:
            arguments += ["--distributed-executor-backend", "uni"]
    return [*arguments, *engine.args]


def _build_server_arguments(engine: EngineConfig) -> list[str]:
    address = ["--host", engine.host, "--port", str(engine.port)]
    guard = ["--middleware", GUARD] if engine.guarded else []
    return [*address, *guard, "--middleware", MIDDLEWARE, "--disable-uvicorn-access-log"]


def _build_balancer_arguments(engine: EngineConfig, expert: ExpertSettings, *, cpu_build: bool) -> list[str]:
    """vLLM's load balancer of experts, always on, so that its mode can be switched while the engine runs.

    The plugin decides in its place (`moe_agent.vllm.expert_group`), by the settings in force; window and interval here
    are those of the start. On a CPU experts can be moved by gloo alone, and within a step alone.
    """
    balancer: dict[str, object] = {
        "num_redundant_experts": engine.redundant_experts,
        "window_size": expert.window_steps,
        "step_interval": expert.interval_steps,
    }
    if cpu_build:
        balancer |= {"use_async": False, "communicator": "torch_gloo"}
    return ["--enable-eplb", "--eplb-config", json.dumps(balancer)]


def _build_node_arguments(engine: EngineConfig, node: Node) -> list[str]:
    """How the nodes of a replica find each other: as many ranks on each, or one rank over all of them."""
    if engine.nodes == 1:
        return []
    if engine.data_parallel == 1:
        place = ["--nnodes", str(engine.nodes), "--node-rank", str(node.index), "--master-addr", node.leader]
        return [*place, "--distributed-executor-backend", "mp"]
    arguments = [
        *("--data-parallel-size-local", str(len(node.ranks)), "--data-parallel-address", node.leader),
        *("--data-parallel-rpc-port", str(DATA_PARALLEL_PORT)),
    ]
    return [*arguments, "--data-parallel-start-rank", str(node.ranks.start)] if node.headless else arguments
