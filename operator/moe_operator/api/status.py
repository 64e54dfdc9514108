"""What a deployment reports about itself, in the same form on one machine and in a cluster."""

from enum import StrEnum
from typing import Annotated, Any

from moe_contract.agent_state import AgentState
from moe_scheduling.engine.disaggregation import EngineRole
from pydantic import AwareDatetime, Field

from moe_operator.api.section import Section

MOST_TROUBLED_RANKS = 8

Natural = Annotated[int, Field(ge=0)]


class ConditionStatus(StrEnum):
    """The three values of a condition in Kubernetes."""

    TRUE = "True"
    FALSE = "False"
    UNKNOWN = "Unknown"


class Condition(Section):
    """One thing that holds or does not, in the form that Kubernetes has for it."""

    type: Annotated[str, Field(min_length=1, max_length=316)] = Field(
        description="What is judged; `Ready` is True when the gateway can pass a request to an engine."
    )
    status: ConditionStatus = Field(description="Whether it holds.")
    reason: Annotated[str, Field(pattern=r"^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$", max_length=1024)] = Field(
        description="Why, in one word for programs."
    )
    message: Annotated[str, Field(max_length=32768)] = Field(default="", description="Why, in words for people.")
    last_transition_time: AwareDatetime = Field(description="When `status` last changed.")
    observed_generation: Natural | None = Field(
        default=None, description="Generation of the resource from which this was judged."
    )


class EnginePhase(StrEnum):
    """What an engine is doing, as its agent says; `unknown` when no agent answers."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    STOPPED = "stopped"
    BACKOFF = "backoff"
    UNKNOWN = "unknown"


class TroubledRank(Section):
    """A data-parallel rank that keeps the others of its engine from going on."""

    rank: Natural = Field(description="Number of the rank.")
    trouble: str = Field(description="In one word for programs: `ended`, `suspended`, `behind` or `silent`.")
    message: str = Field(default="", description="In words for people.")


def list_troubled_ranks(state: AgentState) -> tuple[TroubledRank, ...]:
    """The first of an engine's ranks for which the others wait: a status that named hundreds would be too large."""
    return tuple(
        TroubledRank(rank=row.rank, trouble=row.trouble, message=row.trouble_words)
        for row in state.troubled_ranks[:MOST_TROUBLED_RANKS]
    )


class StartStatus(Section):
    """How far an engine's start is, by what vLLM logs."""

    phase: Annotated[str, Field(max_length=256)] = Field(description="What it does, such as `loading weights`.")
    progress: Annotated[str, Field(max_length=256)] = Field(
        default="", description="How far that is, such as `3 of 8 files`; empty where it has no measure."
    )
    since: AwareDatetime = Field(description="When the phase began.")


class EngineStatus(Section):
    """State of one engine, as its agent reports it."""

    name: str = Field(description="Name of the engine.")
    phase: EnginePhase = Field(description="State of the engine as its agent reports it.")
    restarts: Natural = Field(default=0, description="Restarts since its agent began.")
    last_exit: str = Field(default="", description="How it last ended; empty when it never did.")
    running: Natural = Field(default=0, description="Requests in its running set, all ranks together.")
    waiting: Natural = Field(default=0, description="Requests in its waiting queues, all ranks together.")
    kv_usage: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.0, description="Used part of the KV cache of its fullest rank, 0 to 1."
    )
    role: EngineRole | None = Field(
        default=None, description="Its role, as its agent says; absent where KV blocks do not travel."
    )
    transfers: Natural | None = Field(
        default=None, description="Transfers of KV blocks to it since its start; absent where they do not travel."
    )
    start: StartStatus | None = Field(default=None, description="How far its start is; absent while it does not start.")
    troubled_ranks: tuple[TroubledRank, ...] = Field(
        default=(),
        description=f"The first {MOST_TROUBLED_RANKS} of its ranks for which the others wait; empty while all go on.",
    )


class RoleStatus(Section):
    """The engines of one fixed role, without those of a canary."""

    role: EngineRole = Field(description="The role.")
    replicas: Natural = Field(default=0, description="Engines of the role that exist.")
    ready_replicas: Natural = Field(default=0, description="Engines of the role that accept requests.")
    desired_replicas: Natural | None = Field(
        default=None, description="Engines of the role that should exist, by the resource or by its autoscaling."
    )


class PoliciesInForce(Section):
    """The policies that run, which may differ from the wanted ones while a change is under way."""

    request: str | None = Field(default=None, description="Order of requests; absent when the engines differ.")
    engine: str | None = Field(
        default=None, description="Choice of the engine; absent when the gateway gives no answer."
    )


class ExpertDecision(Section):
    """What the engine last decided about its experts."""

    outcome: str = Field(
        description="`moved`, `stayed`, `dryRun` (would have moved), `rolledBack`, `applied` (by hand) or `failed`."
    )
    reason: Annotated[str, Field(max_length=1024)] = Field(default="", description="Why, in words.")
    time: AwareDatetime = Field(description="When it was made.")
    moves: Natural = Field(default=0, description="Experts that were moved, or would have been.")
    balance_before: Annotated[float, Field(ge=1)] | None = Field(
        default=None, description="Load of the busiest rank over the mean, before."
    )
    balance_after: Annotated[float, Field(ge=1)] | None = Field(
        default=None, description="The same after it, as predicted."
    )


class ExpertProblem(Section):
    """What is wrong with the experts of an engine."""

    kind: str = Field(
        description="In one word for programs: `no_decision`, `slow_move`, `version_skew`, `backoff`, `not_supported`."
    )
    message: Annotated[str, Field(max_length=1024)] = Field(default="", description="In words for people.")


class ExpertsStatus(Section):
    """The experts of the engine whose ranks are the least balanced."""

    engine: str = Field(default="", description="Name of that engine; empty while none has an expert group.")
    mode: str | None = Field(default=None, description="The mode in force; absent while no engine reports one.")
    balance: Annotated[float, Field(ge=1)] | None = Field(
        default=None,
        description="Load of the busiest expert-parallel rank over the mean, mean over the layers; absent while "
        "nothing records it.",
    )
    remote_fraction: Annotated[float, Field(ge=0, le=1)] | None = Field(
        default=None, description="Part of the tokens whose expert is on another rank than they are, 0 to 1."
    )
    placement_version: Natural | None = Field(
        default=None, description="Version of the placement; it rises by one at each change."
    )
    last_decision: ExpertDecision | None = Field(default=None, description="What was last decided there.")
    problems: tuple[ExpertProblem, ...] = Field(default=(), description="What is wrong there.")


class Status(Section):
    """Observed state of a deployment."""

    observed_generation: Natural | None = Field(default=None, description="Generation of the spec that this is about.")
    summary: str = Field(
        default="",
        description="The conditions in one line: the first problem, else the change under way, else that it serves.",
    )
    conditions: tuple[Condition, ...] = Field(default=(), description="What holds and what does not.")
    replicas: Natural = Field(default=0, description="Engines that exist.")
    ready_replicas: Natural = Field(default=0, description="Engines that accept requests.")
    desired_replicas: Natural | None = Field(
        default=None, description="Engines that should exist, by the resource or by its autoscaling."
    )
    roles: tuple[RoleStatus, ...] = Field(
        default=(), description="The engines of each fixed role; empty where roles are not fixed."
    )
    selector: str = Field(default="", description="Label selector of the engines' pods, for autoscalers.")
    ttft: str = Field(default="", description="Mean time to first token over the last 30 s with requests.")
    numbers_at: AwareDatetime | None = Field(
        default=None, description="When the numbers of the engines and `ttft` were taken."
    )
    experts: ExpertsStatus = Field(
        default=ExpertsStatus(), description="The experts of the engine whose ranks are the least balanced."
    )
    endpoint: str = Field(default="", description="URL for clients.")
    policies: PoliciesInForce = Field(default=PoliciesInForce(), description="The policies that run.")
    engines: tuple[EngineStatus, ...] = Field(default=(), description="Each engine in brief.")


def status_document(status: Status) -> dict[str, Any]:
    """The status in the form that the resource shows it, defaults included and absent values left out."""
    return status.model_dump(mode="json", by_alias=True, exclude_none=True)
