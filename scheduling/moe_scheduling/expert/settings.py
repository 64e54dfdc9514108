"""Settings of the expert layer; apart from the decision, whose tables of numbers most readers do not need."""

from dataclasses import dataclass
from enum import StrEnum

from moe_scheduling.settings import check_settings, setting


class ExpertMode(StrEnum):
    """Operating mode of the expert layer in a running engine."""

    OFF = "off"
    OBSERVE = "observe"
    DRY_RUN = "dryRun"
    ACTIVE = "active"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertSettings:
    """Placement of the experts: when they are moved, and how many.

    Raises:
        ValueError: a value is out of its range or not finite.
    """

    mode: ExpertMode = setting(
        ExpertMode.DRY_RUN,
        "`off` (in quotes: YAML reads a bare off as false) records nothing, `observe` records the load of the experts "
        "and shows it, `dryRun` decides as well and shows what it would move, `active` moves experts where that pays.",
    )
    # Interval and window are vLLM's defaults.
    interval_steps: int = setting(3000, "Engine steps between two decisions.", least=1)
    window_steps: int = setting(
        1000, "Engine steps of load that a decision looks at, the newer ones weighing more.", least=1
    )
    move_budget: int = setting(
        0,
        "Most experts moved in one round; 0 sets no bound beside what pays, which is at most about a quarter of the "
        "moves of a new placement.",
        least=0,
    )
    max_stall_s: float = setting(
        0.05,
        "Most that moving may add to one step of the engine; it sets how many layers move in a step.",
        above=0,
        most=60,
    )
    hysteresis: float = setting(
        0.1,
        "Part by which the time won until the next decision must exceed the cost of moving (0.1: by 10 %).",
        least=0,
        most=1000,
    )

    def __post_init__(self) -> None:
        check_settings(self)
