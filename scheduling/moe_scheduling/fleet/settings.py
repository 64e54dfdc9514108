"""Settings of the size of a fleet; built by the operator from `spec.autoscaling`, read by `size.py`."""

import math
from dataclasses import dataclass

from moe_scheduling.fleet.scaling import SCALE_DOWN, SCALE_UP, ScalingRules


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetTargets:
    """Targets of the metrics that size the fleet; a metric whose target is None does not count.

    Attributes:
        wait_s: wait of a new request at the best engine, or in the gateway's queue (seconds).
        kv_usage: used part of the KV caches, mean over the engines, above 0, at most 1.
        ttft_s: mean time to first token (seconds).
        tokens_per_s: prompt and output tokens computed by one engine per second.
        inter_token_s: longest step of an engine that decodes (seconds).

    Raises:
        ValueError: none is set, or one is not greater than 0 and finite.
    """

    wait_s: float | None = None
    kv_usage: float | None = None
    ttft_s: float | None = None
    tokens_per_s: float | None = None
    inter_token_s: float | None = None

    def __post_init__(self) -> None:
        named = {name: getattr(self, name) for name in self.__slots__}
        if all(value is None for value in named.values()):
            raise ValueError("at least one target is needed")
        for name, value in named.items():
            if value is not None and not 0.0 < value < math.inf:
                raise ValueError(f"{name} must be greater than 0 and finite, or absent")
        if self.kv_usage is not None and self.kv_usage > 1.0:
            raise ValueError("kv_usage must be at most 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetSettings:
    """Bounds, targets and scaling behaviour of a fleet.

    Attributes:
        targets: the metrics that count, and their targets.
        min_replicas: fewest engines; 0 ends the last one when no request comes.
        max_replicas: most engines, at least 1.
        idle_s: seconds without any request after which no engine runs, with `min_replicas` 0.
        tolerance: part of a target by which its metric may be off without a change; the default of Kubernetes.
        stale_after_s: age of a signal, in seconds, from which it changes nothing.
        scale_up: behaviour when the number rises.
        scale_down: behaviour when the number falls.

    Raises:
        ValueError: a value is out of its range or not finite.
    """

    targets: FleetTargets
    min_replicas: int = 1
    max_replicas: int = 1
    idle_s: float = 600.0
    tolerance: float = 0.1
    stale_after_s: float = 30.0
    scale_up: ScalingRules = SCALE_UP
    scale_down: ScalingRules = SCALE_DOWN

    def __post_init__(self) -> None:
        if self.min_replicas < 0:
            raise ValueError("min_replicas must be at least 0")
        if self.max_replicas < max(1, self.min_replicas):
            raise ValueError("max_replicas must be at least 1 and at least min_replicas")
        if not 0.0 < self.idle_s < math.inf:
            raise ValueError("idle_s must be greater than 0 and finite")
        if not 0.0 <= self.tolerance < 1.0:
            raise ValueError("tolerance must be at least 0 and less than 1")
        if not 0.0 < self.stale_after_s < math.inf:
            raise ValueError("stale_after_s must be greater than 0 and finite")
