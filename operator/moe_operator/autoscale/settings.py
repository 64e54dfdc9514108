"""Converts `spec.autoscaling` to the settings of the core: durations and units become numbers. Pure."""

from moe_scheduling.fleet.scaling import PolicySelection, PolicyType, ScalingPolicy, ScalingRules
from moe_scheduling.fleet.settings import FleetSettings, FleetTargets

from moe_operator.api.autoscaling import Autoscaling, ScaleDown, ScaleUp
from moe_operator.api.units import duration_s

# Age from which a signal changes nothing: this many intervals, at least `_LEAST_STALE_S`.
_STALE_INTERVALS = 6
_LEAST_STALE_S = 15.0


def fleet_settings(section: Autoscaling) -> FleetSettings:
    """The autoscaling section as settings of the fleet's decision."""
    targets = section.targets
    return FleetSettings(
        targets=FleetTargets(
            wait_s=None if targets.queue_wait is None else duration_s(targets.queue_wait),
            kv_usage=targets.kv_usage,
            ttft_s=None if targets.ttft is None else duration_s(targets.ttft),
            tokens_per_s=targets.tokens_per_second,
        ),
        min_replicas=section.min_replicas,
        max_replicas=section.max_replicas,
        idle_s=duration_s(section.idle_after),
        stale_after_s=max(_LEAST_STALE_S, _STALE_INTERVALS * duration_s(section.interval)),
        scale_up=_rules(section.scale_up),
        scale_down=_rules(section.scale_down),
    )


def _rules(section: ScaleUp | ScaleDown) -> ScalingRules:
    return ScalingRules(
        stabilization_window_s=duration_s(section.stabilization_window),
        policies=tuple(
            ScalingPolicy(type=PolicyType(policy.type.value), value=policy.value, period_s=duration_s(policy.period))
            for policy in section.policies
        ),
        select_policy=PolicySelection(section.select_policy.value),
    )
