"""Behaviour of a changing number of engines, in HorizontalPodAutoscaler v2's own terms; called by `size.py`.

The rules are those of the Kubernetes documentation ("Configurable scaling behavior") and of its controller
(`pkg/controller/podautoscaler/horizontal.go`, 1.34): a stabilisation window takes the most cautious of the numbers that
were recommended within it; policies bound the change within a period.

Invariants: `stabilise` and `bound_change` never turn a rise into a fall or the other way round; a `ScalingRecord` never
holds a future time, so that a clock that jumps back makes windows longer, but not endless.
"""

from dataclasses import dataclass, replace
from enum import StrEnum

_LONGEST_S = 3600.0


class PolicyType(StrEnum):
    """Unit of a policy's value."""

    PERCENT = "percent"
    PODS = "pods"


class PolicySelection(StrEnum):
    """Which policy counts: the one that allows the greatest change (max), the least (min), or none (disabled)."""

    DISABLED = "disabled"
    MAX = "max"
    MIN = "min"


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingPolicy:
    """The most that may change within a period.

    Attributes:
        type: unit of `value`: engines, or percent of their number at the start of the period.
        value: largest change, at least 1.
        period_s: length of the period, at most 1800 as in Kubernetes.

    Raises:
        ValueError: a value is out of its range.
    """

    type: PolicyType
    value: int
    period_s: float

    def __post_init__(self) -> None:
        if self.value < 1:
            raise ValueError("value must be at least 1")
        if not 0.0 < self.period_s <= 1800.0:
            raise ValueError("period_s must be greater than 0 and at most 1800")


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingRules:
    """Scaling behaviour in one direction.

    Attributes:
        stabilization_window_s: of the numbers recommended within it the most cautious is taken: the least when rising,
            the greatest when falling. At most 3600, as in Kubernetes; 0 takes the newest.
        policies: bounds of the change; none of them bounds nothing.
        select_policy: which of them counts.

    Raises:
        ValueError: the window is out of its range.
    """

    stabilization_window_s: float
    policies: tuple[ScalingPolicy, ...]
    select_policy: PolicySelection = PolicySelection.MAX

    def __post_init__(self) -> None:
        if not 0.0 <= self.stabilization_window_s <= _LONGEST_S:
            raise ValueError(f"stabilization_window_s must be between 0 and {_LONGEST_S:g}")


# The defaults of Kubernetes ("Default Behavior").
_DOUBLE = ScalingPolicy(type=PolicyType.PERCENT, value=100, period_s=15.0)
_FOUR = ScalingPolicy(type=PolicyType.PODS, value=4, period_s=15.0)
SCALE_UP = ScalingRules(stabilization_window_s=0.0, policies=(_DOUBLE, _FOUR))
SCALE_DOWN = ScalingRules(stabilization_window_s=300.0, policies=(_DOUBLE,))


@dataclass(frozen=True, slots=True)
class Dated:
    """A number of engines, or a difference between two, with its time."""

    at_s: float
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingRecord:
    """Past recommendations and changes, as far as windows and periods reach.

    Attributes:
        peaks: recommendations that can still be the greatest of a window: each is greater than all after it.
        valleys: recommendations that can still be the least of a window: each is less than all after it.
        changes: changes that were decided, negative when falling.
    """

    peaks: tuple[Dated, ...] = ()
    valleys: tuple[Dated, ...] = ()
    changes: tuple[Dated, ...] = ()

    def until(self, now_s: float) -> "ScalingRecord":
        """Returns the record within the longest window; times after `now_s` (a clock jumped back) become `now_s`."""
        return ScalingRecord(
            peaks=_recent(self.peaks, now_s), valleys=_recent(self.valleys, now_s), changes=_recent(self.changes, now_s)
        )

    def recommended(self, count: int, now_s: float) -> "ScalingRecord":
        """Returns the record with a recommendation of `count` engines added."""
        newest = Dated(now_s, count)
        peaks = tuple(peak for peak in self.peaks if peak.count > count)
        valleys = tuple(valley for valley in self.valleys if valley.count < count)
        return replace(self, peaks=(*peaks, newest), valleys=(*valleys, newest))

    def changed(self, change: int, now_s: float) -> "ScalingRecord":
        """Returns the record with a change by `change` engines added."""
        return replace(self, changes=(*self.changes, Dated(now_s, change)))

    def change_within(self, period_s: float, now_s: float) -> int:
        """Returns the sum of the changes within the period that ends at `now_s`."""
        return sum(change.count for change in self.changes if change.at_s > now_s - period_s)


def stabilise(
    current: int, wanted: int, record: ScalingRecord, up: ScalingRules, down: ScalingRules, now_s: float
) -> int:
    """Returns the number nearest to `current` between the least of the upward and the greatest of the downward window.

    As `stabilizeRecommendationWithBehaviors` does: the windows include `wanted`, which is not yet in the record.
    """
    up_from_s, down_from_s = now_s - up.stabilization_window_s, now_s - down.stabilization_window_s
    least = min([wanted, *(valley.count for valley in record.valleys if valley.at_s > up_from_s)])
    greatest = max([wanted, *(peak.count for peak in record.peaks if peak.at_s > down_from_s)])
    return min(max(current, least), greatest)


def bound_change(
    current: int, wanted: int, record: ScalingRecord, up: ScalingRules, down: ScalingRules, now_s: float
) -> int:
    """Returns the number nearest to `wanted` that the policies allow."""
    if wanted > current:
        highest = _highest(current, record, up, now_s)
        return wanted if highest is None else min(wanted, max(current, highest))
    if wanted < current:
        return max(wanted, min(current, _lowest(current, record, down, now_s)))
    return current


def _highest(current: int, record: ScalingRecord, rules: ScalingRules, now_s: float) -> int | None:
    """As `calculateScaleUpLimitWithScalingRules`: a percentage is rounded up, so that one engine can become two."""
    if rules.select_policy is PolicySelection.DISABLED:
        return current
    allowed: list[int] = []
    for policy in rules.policies:
        start = current - record.change_within(policy.period_s, now_s)
        if policy.type is PolicyType.PODS:
            allowed.append(start + policy.value)
        else:
            allowed.append(-(-start * (100 + policy.value) // 100))
    select = min if rules.select_policy is PolicySelection.MIN else max
    return select(allowed) if allowed else None


def _lowest(current: int, record: ScalingRecord, rules: ScalingRules, now_s: float) -> int:
    """As `calculateScaleDownLimitWithBehaviors`: a percentage is rounded down."""
    if rules.select_policy is PolicySelection.DISABLED:
        return current
    allowed: list[int] = []
    for policy in rules.policies:
        start = current - record.change_within(policy.period_s, now_s)
        if policy.type is PolicyType.PODS:
            allowed.append(start - policy.value)
        else:
            allowed.append(start * (100 - policy.value) // 100)
    select = max if rules.select_policy is PolicySelection.MIN else min
    return select(allowed) if allowed else 0


def _recent(entries: tuple[Dated, ...], now_s: float) -> tuple[Dated, ...]:
    rebased = (entry if entry.at_s <= now_s else Dated(now_s, entry.count) for entry in entries)
    return tuple(entry for entry in rebased if entry.at_s > now_s - _LONGEST_S)
