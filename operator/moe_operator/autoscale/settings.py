"""Converts `spec.autoscaling` to the settings of the core: durations and units become numbers. Pure."""

from moe_scheduling.engine.disaggregation import EngineRole
from moe_scheduling.fleet.scaling import PolicySelection, PolicyType, ScalingPolicy, ScalingRules
from moe_scheduling.fleet.settings import FleetSettings, FleetTargets

from moe_operator.api.autoscaling import Autoscaling, RoleRange, ScaleDown, ScaleUp
from moe_operator.api.units import duration_s

# Age from which a signal changes nothing: this many intervals, at least `_LEAST_STALE_S`.
_STALE_INTERVALS = 6
_LEAST_STALE_S = 15.0


def fleet_settings(section: Autoscaling) -> FleetSettings:
    """The autoscaling section as settings of the fleet's decision."""
    targets = FleetTargets(
        wait_s=_seconds(section.targets.queue_wait),
        kv_usage=section.targets.kv_usage,
        ttft_s=_seconds(section.targets.ttft),
        tokens_per_s=section.targets.tokens_per_second,
    )
    return _settings(section, targets, section)


def _settings(section: Autoscaling, targets: FleetTargets, limits: Autoscaling | RoleRange) -> FleetSettings:
    return FleetSettings(
        targets=targets,
        min_replicas=limits.min_replicas,
        max_replicas=limits.max_replicas,
        idle_s=duration_s(section.idle_after),
        stale_after_s=max(_LEAST_STALE_S, _STALE_INTERVALS * duration_s(section.interval)),
        scale_up=_rules(section.scale_up),
        scale_down=_rules(section.scale_down),
    )


def role_settings(section: Autoscaling, role: EngineRole) -> FleetSettings:
    """The settings of the decision over the engines of one fixed role.

    Raises:
        ValueError: the section has none for roles, or engines of this role have no number of their own.
    """
    roles = section.roles
    if roles is None or role is EngineRole.UNIFIED:
        raise ValueError("only fixed roles have numbers of their own")
    limits: RoleRange = roles.prefill if role is EngineRole.PREFILL else roles.decode
    wait, ttft = roles.prefill.targets.queue_wait, roles.prefill.targets.ttft
    kv_usage, inter_token = roles.decode.targets.kv_usage, roles.decode.targets.inter_token
    if role is EngineRole.PREFILL:
        targets = FleetTargets(wait_s=_seconds(wait), ttft_s=_seconds(ttft))
    else:
        targets = FleetTargets(kv_usage=kv_usage, inter_token_s=_seconds(inter_token))
    return _settings(section, targets, limits)


def _seconds(text: str | None) -> float | None:
    return None if text is None else duration_s(text)


def _rules(section: ScaleUp | ScaleDown) -> ScalingRules:
    return ScalingRules(
        stabilization_window_s=duration_s(section.stabilization_window),
        policies=tuple(
            ScalingPolicy(type=PolicyType(policy.type.value), value=policy.value, period_s=duration_s(policy.period))
            for policy in section.policies
        ),
        select_policy=PolicySelection(section.select_policy.value),
    )
