"""Section `spec.scheduling`: the settings of the three layers; defaults are those of the decisions themselves."""

from typing import Annotated

from moe_scheduling.engine.choice import DispatchPolicy, EngineSettings
from moe_scheduling.expert.decision import ExpertMode, ExpertSettings
from moe_scheduling.request.order import RequestPolicy, RequestSettings
from pydantic import BeforeValidator, Field

from moe_operator.api.section import Count, Number, Section
from moe_operator.api.units import DurationBetween, render_duration

_REQUEST = RequestSettings()
_ENGINE = EngineSettings()
_EXPERT = ExpertSettings()


class RequestScheduling(Section):
    """Order of waiting requests, in each engine and in the gateway's hold queue."""

    policy: RequestPolicy = Field(
        default=_REQUEST.policy,
        description="`sjf` takes the request with the fewest uncached prefill tokens first and lets waiting requests "
        "age, `fcfs` keeps the order of arrival, `priority` the order of the priority field, then of arrival.",
    )
    ageing_rate: Annotated[Number, Field(gt=0, le=1e9, allow_inf_nan=False)] = Field(
        default=_REQUEST.ageing_rate,
        description="Uncached prefill tokens that one second of waiting makes up for (tokens/s), under `sjf`. Greater "
        "is nearer to the order of arrival.",
    )
    ageing_horizon: Annotated[str, DurationBetween("0s")] = Field(
        default=render_duration(_REQUEST.ageing_horizon_s),
        description="Under `sjf`, no request is overtaken by one of its priority that arrived later by more than this.",
    )
    priority_step: Annotated[str, DurationBetween("0s")] = Field(
        default=render_duration(_REQUEST.priority_step_s),
        description="Head start that one level of a request's priority is worth under `sjf` (lower is more urgent).",
    )
    fairness_horizon: Annotated[str, DurationBetween("0s")] = Field(
        default=render_duration(_REQUEST.fairness_horizon_s),
        description="Under `sjf`, requests of a tenant that was served more than another that waits come later by up "
        "to this; `gateway.tenantHeader` names the tenant of a request. 0s: tenants are not distinguished.",
    )


class EngineScheduling(Section):
    """Choice of the engine for a request, in the gateway."""

    policy: DispatchPolicy = Field(
        default=_ENGINE.policy,
        description="`predicted` takes the engine with the least predicted time to first token, `leastRequests` the "
        "one with the fewest requests in flight, `roundRobin` each engine in turn.",
    )
    stickiness: Annotated[str, DurationBetween("0s")] = Field(
        default=render_duration(_ENGINE.stickiness_s),
        description="Under `predicted`, a session stays at its engine while it is worse than the best by at most this.",
    )
    stale_after: Annotated[str, DurationBetween("1ms")] = Field(
        default=render_duration(_ENGINE.stale_after_s),
        description="Age at which the gateway ignores an engine's signal and uses its own in-flight accounting alone.",
    )
    saturation: Annotated[str, DurationBetween("1ms")] | None = Field(
        default=None if _ENGINE.saturation_s is None else render_duration(_ENGINE.saturation_s),
        description="Predicted wait at which an engine is saturated; while all are, the gateway holds requests back. "
        "Absent: it never does.",
    )


def _check_mode(value: object) -> object:
    if value is False:
        raise ValueError('"off" needs quotes: YAML reads a bare off as false')
    return value


class ExpertScheduling(Section):
    """Placement of the experts within an engine. Only with `engine.parallelism.expert`."""

    mode: Annotated[ExpertMode, BeforeValidator(_check_mode)] = Field(
        default=_EXPERT.mode,
        description="`off` (in quotes: YAML reads a bare off as false) records nothing, `observe` records the load of "
        "the experts and shows it, `dryRun` decides as well and shows what it would move, `active` moves experts where "
        "that pays.",
    )
    redundant_experts: Annotated[Count, Field(ge=0, le=4096)] = Field(
        default=0,
        description="Slots for further copies of hot experts, in each layer, over all ranks of a replica; each takes "
        "the memory of one expert a layer. Experts and these must divide by the ranks. A change rolls the engines.",
    )
    interval: Annotated[Count, Field(ge=1, le=1_000_000_000)] = Field(
        default=_EXPERT.interval_steps, description="Engine steps between two decisions."
    )
    window: Annotated[Count, Field(ge=1, le=1_000_000_000)] = Field(
        default=_EXPERT.window_steps,
        description="Engine steps of load that a decision looks at, the newer ones weighing more.",
    )
    move_budget: Annotated[Count, Field(ge=0, le=1_000_000_000)] = Field(
        default=_EXPERT.move_budget,
        description="Most experts moved in one round; 0 sets no bound beside what pays.",
    )
    max_stall: Annotated[str, DurationBetween("1ms", "1m")] = Field(
        default=render_duration(_EXPERT.max_stall_s),
        description="Most that moving may add to one step of the engine; it sets how many layers move in a step.",
    )
    hysteresis: Annotated[Number, Field(ge=0, le=1000, allow_inf_nan=False)] = Field(
        default=_EXPERT.hysteresis,
        description="Part by which the time won until the next decision must exceed the cost of moving (0.1: by 10 %).",
    )


class Scheduling(Section):
    """Settings of the three scheduling layers."""

    request: RequestScheduling = RequestScheduling()
    engine: EngineScheduling = EngineScheduling()
    expert: ExpertScheduling = ExpertScheduling()
