"""The workloads of the comparison: those of the experiments, one that changes its kind half-way, and agents' sessions.

Each is a function of a seed: other requests of the same kind for each seed.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from moe_contract.input_errors import InvalidInput, unknown_choice
from moe_tools.shapes import Shape, ShapeSettings, build_shape
from moe_tools.simulator.arrivals import ArrivalShape, arrange
from moe_tools.traces import TraceRequest

from moe_lab.experiments.clients import SESSION_TOKENS, build_agents
from moe_lab.experiments.workloads import CONTEXT_TOKENS, WORKLOADS

CHANGE = "change"
AGENTS = "agents"
NAMES = (*WORKLOADS, CHANGE, AGENTS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Folders:
    """Where the public data are; None: their workloads cannot be run.

    Attributes:
        traces: the traces of the experiments.
        sessions: `agent_sessions.csv.gz`.
    """

    traces: Path | None = None
    sessions: Path | None = None


def max_model_len(workload: str) -> int:
    """Returns the longest prompt with its answer that engines take for a workload."""
    return SESSION_TOKENS if workload == AGENTS else CONTEXT_TOKENS


def build_workload(name: str, count: int, rate: float, seed: int, folders: Folders) -> tuple[TraceRequest, ...]:
    """The requests of one seed, arriving at a mean rate.

    Args:
        name: one of `NAMES`.
        count: requests.
        rate: arrivals a second.
        seed: draws requests and gaps.
        folders: of public data.

    Raises:
        InvalidInput: an unknown name, or its data are not there.
    """
    if name == CHANGE:
        return arrange(_changing(count, seed), ArrivalShape.POISSON, rate, seed)
    if name == AGENTS:
        return arrange(build_agents(count, seed, folders.sessions, "--sessions"), ArrivalShape.POISSON, rate, seed)
    if name not in WORKLOADS:
        raise InvalidInput([unknown_choice("--workload", name, NAMES)])
    kind = WORKLOADS[name]
    return arrange(kind.build(count, seed, folders.traces), kind.arrivals, rate, seed)


def _changing(count: int, seed: int) -> tuple[TraceRequest, ...]:
    """Long prompts with short answers, and then short prompts with long answers."""
    first = ShapeSettings(
        count=count // 2, seed=seed, longest_tokens=8192, median_output_tokens=32, longest_output_tokens=512
    )
    then = ShapeSettings(
        count=count - count // 2, seed=seed, longest_tokens=2048, median_output_tokens=256, longest_output_tokens=2048
    )
    rows = (*build_shape(Shape.TWO_END, first), *build_shape(Shape.RANDOM, then))
    return tuple(replace(row, arrival_s=float(number)) for number, row in enumerate(rows))
