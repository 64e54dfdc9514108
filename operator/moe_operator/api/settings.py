"""The settings of the core that a resource asks for: camelCase, durations and quantities become plain numbers."""

from moe_scheduling.engine.choice import EngineSettings
from moe_scheduling.expert.decision import ExpertSettings
from moe_scheduling.request.order import RequestSettings

from moe_operator.api.scheduling import EngineScheduling, ExpertScheduling, RequestScheduling
from moe_operator.api.units import duration_s


def request_settings(section: RequestScheduling) -> RequestSettings:
    """Order of requests."""
    return RequestSettings(
        policy=section.policy,
        ageing_rate=section.ageing_rate,
        ageing_horizon_s=duration_s(section.ageing_horizon),
        priority_step_s=duration_s(section.priority_step),
        fairness_horizon_s=duration_s(section.fairness_horizon),
    )


def engine_settings(section: EngineScheduling) -> EngineSettings:
    """Choice of the engine."""
    return EngineSettings(
        policy=section.policy,
        stickiness_s=duration_s(section.stickiness),
        stale_after_s=duration_s(section.stale_after),
        saturation_s=None if section.saturation is None else duration_s(section.saturation),
    )


def expert_settings(section: ExpertScheduling) -> ExpertSettings:
    """Placement of the experts."""
    return ExpertSettings(
        mode=section.mode,
        interval_steps=section.interval,
        window_steps=section.window,
        move_budget=section.move_budget,
        max_stall_s=duration_s(section.max_stall),
        hysteresis=section.hysteresis,
    )
