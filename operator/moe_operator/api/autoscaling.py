"""The section `autoscaling`: how many engines run. Only in a cluster.

Its words are those of HorizontalPodAutoscaler v2.
"""

from dataclasses import replace
from enum import StrEnum
from typing import Annotated, ClassVar

from pydantic import Field, Strict

from moe_operator.api.section import Rule, Section
from moe_operator.api.units import DurationBetween

Count = Annotated[int, Strict()]
Number = Annotated[float, Strict()]


class AutoscalingMode(StrEnum):
    """Owner of the number of engines: the operator or another autoscaler."""

    INTERNAL = "internal"
    EXTERNAL = "external"


class Targets(Section):
    """What to keep; the metric that asks for the most engines wins. One that is absent is not looked at."""

    queue_wait: Annotated[str, DurationBetween("1ms")] | None = Field(
        default="1s", description="Predicted wait of a new request at the best engine, before its own prefill."
    )
    kv_usage: Annotated[Number, Field(gt=0, le=1)] | None = Field(
        default=0.8, description="Used part of the KV caches, mean over the engines."
    )
    ttft: Annotated[str, DurationBetween("1ms")] | None = Field(
        default=None, description="Time to first token at the gateway, mean over the last 30 s."
    )
    tokens_per_second: Annotated[Number, Field(gt=0, le=1e9)] | None = Field(
        default=None, description="Prompt and output tokens computed by one engine (tokens/s)."
    )


class ScalingPolicyType(StrEnum):
    """Unit of a scaling step: engines or percent."""

    PODS = "pods"
    PERCENT = "percent"


class ScalingPolicy(Section):
    """The most that may change within a period."""

    type: ScalingPolicyType = Field(description="Unit of `value`: engines, or percent of the present number.")
    value: Annotated[Count, Field(ge=1, le=10_000)] = Field(description="Largest change within the period.")
    period: Annotated[str, DurationBetween("1s", "30m")] = Field(description="Length of the period.")


class SelectPolicy(StrEnum):
    """Which of several scaling policies applies."""

    MAX = "max"
    MIN = "min"
    DISABLED = "disabled"


class ScaleUp(Section):
    """How fast the number may rise."""

    stabilization_window: Annotated[str, DurationBetween("0s", "1h")] = Field(
        default="0s", description="The least of the numbers recommended within this window is taken."
    )
    policies: Annotated[tuple[ScalingPolicy, ...], Field(max_length=8)] = Field(
        default=(
            ScalingPolicy(type=ScalingPolicyType.PERCENT, value=100, period="15s"),
            ScalingPolicy(type=ScalingPolicyType.PODS, value=4, period="15s"),
        ),
        description="Bounds of the change.",
    )
    select_policy: SelectPolicy = Field(
        default=SelectPolicy.MAX, description="`max` allows the largest of the policies, `min` the smallest."
    )


class ScaleDown(Section):
    """How fast the number may fall."""

    stabilization_window: Annotated[str, DurationBetween("0s", "1h")] = Field(
        default="5m", description="The greatest of the numbers recommended within this window is taken."
    )
    policies: Annotated[tuple[ScalingPolicy, ...], Field(max_length=8)] = Field(
        default=(ScalingPolicy(type=ScalingPolicyType.PERCENT, value=100, period="15s"),),
        description="Bounds of the change.",
    )
    select_policy: SelectPolicy = Field(
        default=SelectPolicy.MAX, description="`max` allows the largest of the policies, `min` the smallest."
    )


class PrefillTargets(Section):
    """What to keep with the number of prefill engines; as `autoscaling.targets`."""

    queue_wait: Annotated[str, DurationBetween("1ms")] | None = Field(
        default="1s",
        description="Time that the prompts at the least busy prefill engine take to compute, by its step-time model.",
    )
    ttft: Annotated[str, DurationBetween("1ms")] | None = Field(
        default=None, description="Time to first token at the gateway, mean over the last 30 s."
    )


class DecodeTargets(Section):
    """What to keep with the number of decode engines; as `autoscaling.targets`."""

    kv_usage: Annotated[Number, Field(gt=0, le=1)] | None = Field(
        default=0.8, description="Used part of the KV caches, mean over the decode engines."
    )
    inter_token: Annotated[str, DurationBetween("1ms")] | None = Field(
        default=None,
        description="Time of a step with the requests that decode in it, by the engines' step-time models, mean load "
        "of the decode engines.",
    )


_RANGE_RULE = Rule(
    field="maxReplicas",
    message="maxReplicas must be at least minReplicas",
    cel="self.maxReplicas >= self.minReplicas",
    holds=lambda section: section.max_replicas >= section.min_replicas,
)


class RoleRange(Section):
    """How many engines of a role may run."""

    min_replicas: Annotated[Count, Field(ge=1, le=255)] = Field(default=1, description="Fewest engines of the role.")
    max_replicas: Annotated[Count, Field(ge=1, le=255)] = Field(default=4, description="Most engines of the role.")

    rules: ClassVar[tuple[Rule, ...]] = (_RANGE_RULE,)


class PrefillAutoscaling(RoleRange):
    """How many prefill engines run."""

    targets: PrefillTargets = PrefillTargets()


class DecodeAutoscaling(RoleRange):
    """How many decode engines run."""

    targets: DecodeTargets = DecodeTargets()


class RoleAutoscaling(Section):
    """How many engines of each fixed role run. `engine.roles.prefill` and `decode` are the numbers to begin with."""

    prefill: PrefillAutoscaling = PrefillAutoscaling()
    decode: DecodeAutoscaling = DecodeAutoscaling()


class Autoscaling(Section):
    """How many engines run, by load. Absent: `engine.replicas`."""

    mode: AutoscalingMode = Field(
        default=AutoscalingMode.INTERNAL,
        description="`internal`: the operator decides by `targets`. `external`: a HorizontalPodAutoscaler or KEDA sets "
        "`engine.replicas` through the scale subresource.",
    )
    min_replicas: Annotated[Count, Field(ge=0, le=256)] = Field(
        default=1, description="Fewest engines. 0: none runs while no request comes; the gateway holds what wakes one."
    )
    max_replicas: Annotated[Count, Field(ge=1, le=256)] = Field(default=4, description="Most engines.")
    targets: Targets = Targets()
    roles: RoleAutoscaling | None = Field(
        default=None,
        description="Ranges and targets of each role, in place of `minReplicas`, `maxReplicas` and `targets`, which "
        "then mean nothing. Only with fixed roles, which need it.",
    )
    scale_up: ScaleUp = ScaleUp()
    scale_down: ScaleDown = ScaleDown()
    idle_after: Annotated[str, DurationBetween("1s")] = Field(
        default="10m",
        description="Time without a request after which the last engine is let go, with `minReplicas: 0`.",
    )
    interval: Annotated[str, DurationBetween("500ms", "10m")] = Field(
        default="5s", description="Time between two decisions."
    )

    rules: ClassVar[tuple[Rule, ...]] = (
        replace(
            _RANGE_RULE,
            cel=f"has(self.roles) || {_RANGE_RULE.cel}",
            holds=lambda section: section.roles is not None or _RANGE_RULE.holds(section),
        ),
        Rule(
            field="roles",
            message="each role is scaled by the operator; without autoscaling others may scale the Deployments of the "
            "roles, NAME-engine-prefill and NAME-engine-decode",
            cel="self.mode == 'internal' || !has(self.roles)",
            holds=lambda section: section.mode is AutoscalingMode.INTERNAL or section.roles is None,
        ),
        Rule(
            field="targets",
            message="at least one target is needed",
            cel="self.mode == 'external' || has(self.targets.queueWait) || has(self.targets.kvUsage) || "
            "has(self.targets.ttft) || has(self.targets.tokensPerSecond)",
            holds=lambda section: (
                section.mode is AutoscalingMode.EXTERNAL or any(value is not None for _, value in section.targets)
            ),
        ),
    )
