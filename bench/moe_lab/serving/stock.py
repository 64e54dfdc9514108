"""A of the comparison: stock vLLM behind vllm-router, planned from the same resource as MoEServing. Pure.

The engines get the arguments and the environment that our agent would give them, without all that is ours: so model,
precision, batch limits, KV cache and threads are equal by construction. What remains equal beyond that favours A: it
has our choice of the executor for CPUs, too, which vLLM does not make by itself.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_agent.supervisor.engine_command import MIDDLEWARE, SCHEDULER, SERVER, build_arguments
from moe_agent.supervisor.node import build_node
from moe_contract.agent_config import AgentConfig
from moe_contract.engine_process import RUN_DIR_VARIABLE, engine_environment
from moe_contract.input_errors import InputError, InvalidInput
from moe_operator.api import MoEServing
from moe_operator.api.engine import Runtime
from moe_operator.api.units import duration_s

from moe_lab.gateway.processes import vllm_router_command

OURS = (("--scheduler-cls", SCHEDULER), ("--scheduling-policy", "priority"), ("--middleware", MIDDLEWARE))
"""The arguments that carry our layers into vLLM."""
MOST_GPU_MEMORY = 0.48
"""Of a GPU that an engine of each side may take; the rest is for memory that vLLM does not count."""
SUSPENDED_PART = 0.75
"""Of the liveness timeout; the rest is for the answers that come after a piece's last arrival."""
# An empty list of plugins: vLLM loads none, ours neither.
NO_PLUGINS = {"VLLM_PLUGINS": ""}


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """A process to start, and the URL that answers when it serves."""

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str]
    url: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StockRouter:
    """vllm-router: the program and its policy; without the program clients reach the one engine itself."""

    program: Path | None
    policy: str

    def __str__(self) -> str:
        return f"stock vLLM behind vllm-router, {self.policy}" if self.program else "stock vLLM, reached directly"


def check_comparable(resource: MoEServing, rival: StockRouter) -> None:
    """Refuses what stock vLLM could not serve in the same way beside it.

    Raises:
        InvalidInput: engines that leave no room on their GPU for one of the other side, or ranks that vllm-router does
            not see, or several engines and no router.
    """
    engine = resource.spec.engine
    errors = []
    if rival.program is None and engine.count != 1:
        errors.append(InputError("spec.engine.replicas", "must be 1 without --vllm-router: nothing else would choose"))
    if engine.runtime is Runtime.VLLM:
        if engine.resources.kv_cache_memory is None:
            message = "must be given: with engines of both sides on one GPU, vLLM cannot find the free memory"
            errors.append(InputError("spec.engine.resources.kvCacheMemory", message))
        if not 0 < find_gpu_memory(engine.args) <= MOST_GPU_MEMORY:
            message = f"must have --gpu-memory-utilization=PART, at most {MOST_GPU_MEMORY}: both sides share each GPU"
            errors.append(InputError("spec.engine.args", message))
    if engine.parallelism.ranks > 1:
        message = "must leave each engine one rank: vllm-router chooses engines, and stock vLLM on a CPU has no groups"
        errors.append(InputError("spec.engine.parallelism", message))
    if errors:
        raise InvalidInput(errors)


def find_gpu_memory(arguments: Sequence[str]) -> float:
    """The part of a GPU's memory that an engine may take, by its arguments; 0 where they have none or no number."""
    known = argparse.ArgumentParser(add_help=False, exit_on_error=False, allow_abbrev=False)
    known.add_argument("--gpu-memory-utilization", type=float, default=0.0)
    try:
        return float(known.parse_known_args(list(arguments))[0].gpu_memory_utilization)
    except argparse.ArgumentError:
        return 0.0


def check_piece(resource: MoEServing, piece_s: float) -> None:
    """Refuses pieces so long that an agent, suspended meanwhile, could take its engine for dead.

    Raises:
        InvalidInput: they are longer than a part of the time that an agent waits for a sign of life.
    """
    longest_s = SUSPENDED_PART * duration_s(resource.spec.engine.liveness_timeout)
    if piece_s > longest_s:
        message = (
            f"must be {longest_s:.0f} at most: B is suspended while A is measured, and its engines must answer within "
            f"spec.engine.livenessTimeout ({resource.spec.engine.liveness_timeout}); raise --pairs instead"
        )
        raise InvalidInput([InputError("--piece-s", message)])


def plan_engines(
    agents: Sequence[AgentConfig], *, python: str, inherited: Mapping[str, str], cpus: int, cpu_build: bool
) -> tuple[Program, ...]:
    """The engines.

    Args:
        agents: our agents' configuration on this machine, with free ports for the engines.
        python: the interpreter that has vLLM.
        inherited: this process's environment.
        cpus: CPUs that it may use.
        cpu_build: the installed vLLM runs on CPUs.
    """
    return tuple(_plan_engine(agent, index, python, inherited, cpus, cpu_build) for index, agent in enumerate(agents))


def plan_router(
    rival: StockRouter, engines: Sequence[Program], *, port: int, metrics_port: int, inherited: Mapping[str, str]
) -> Program:
    """The router in front of them; there is one."""
    assert rival.program is not None
    ports = [int(engine.url.rpartition(":")[2]) for engine in engines]
    return Program(
        name="vllm-router",
        command=tuple(vllm_router_command(rival.program, rival.policy, port, metrics_port, ports)),
        environment=dict(inherited),
        url=f"http://127.0.0.1:{port}",
    )


def _plan_engine(
    agent: AgentConfig, index: int, python: str, inherited: Mapping[str, str], cpus: int, cpu_build: bool
) -> Program:
    engine = agent.engine
    arguments = remove_ours(build_arguments(engine, build_node(engine, inherited), cpu_build=cpu_build))
    environment = engine_environment(agent, inherited, cpu_build=cpu_build, cpus=cpus)
    environment.pop(RUN_DIR_VARIABLE)
    return Program(
        name=f"stock-engine-{index}",
        command=(python, *SERVER, *arguments),
        environment=environment | NO_PLUGINS,
        url=f"http://{engine.host}:{engine.port}",
    )


def remove_ours(arguments: Sequence[str]) -> list[str]:
    """The arguments without those that carry our layers.

    Raises:
        ValueError: one of them is not there: the agent starts its engines in another way than this module knows.
    """
    left = list(arguments)
    for option, value in OURS:
        at = left.index(option)
        if left[at + 1] != value:
            raise ValueError(f"{option} is {left[at + 1]}, not {value}")
        del left[at : at + 2]
    return left
