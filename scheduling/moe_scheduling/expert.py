"""Layer 3: on which ranks of an expert group the experts of each layer lie, and whether moving them pays.

Called by the node agent's plugin on the group's first rank, by `moeserving experts plan` and by the simulator.
"""

import math
from dataclasses import dataclass
from enum import StrEnum


class ExpertMode(StrEnum):
    """What is done about the experts' placement while an engine runs."""

    OFF = "off"
    OBSERVE = "observe"
    DRY_RUN = "dryRun"
    ACTIVE = "active"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertSettings:
    """When experts are moved, and how many.

    Attributes:
        mode: `off` records nothing; `observe` records load and shows it; `dryRun` decides as well, and shows what it
            would do; `active` does it.
        interval_steps: engine steps between two decisions, at least 1; that of vLLM.
        window_steps: engine steps of load that a decision looks at, the newer ones weighing more; that of vLLM.
        move_budget: most experts moved in a round; 0 sets no bound beside what pays.
        max_stall_s: bound on what moving may add to one engine step, in seconds; sets how many layers move in a step.
        hysteresis: part by which the time won must exceed the cost of moving.

    Raises:
        ValueError: a value is out of its range or not finite.
    """

    mode: ExpertMode = ExpertMode.DRY_RUN
    interval_steps: int = 3000
    window_steps: int = 1000
    move_budget: int = 0
    max_stall_s: float = 0.05
    hysteresis: float = 0.1

    def __post_init__(self) -> None:
        if self.interval_steps < 1:
            raise ValueError("interval_steps must be at least 1")
        if self.window_steps < 1:
            raise ValueError("window_steps must be at least 1")
        if self.move_budget < 0:
            raise ValueError("move_budget must be at least 0")
        if not 0.0 < self.max_stall_s < math.inf:
            raise ValueError("max_stall_s must be greater than 0 and finite")
        if not 0.0 <= self.hysteresis < math.inf:
            raise ValueError("hysteresis must be at least 0 and finite")
