"""Who sets the number of a workload's replicas: the resource, or another manager such as an autoscaler. Pure.

The number of the resource counts when it is new. Between two changes of that number, another writer of the workload's
scale keeps its own, by the managed fields of server-side apply: the operator then leaves `replicas` out of its apply.
The last number of the resource stands in an annotation of the workload.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from moe_operator.plan.names import GROUP

NOTE = f"{GROUP}/replicas"
# Note of a workload whose number is an autoscaler's from the beginning.
AUTOSCALED = "autoscaled"
Place = tuple[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaled:
    """A workload whose number another manager set last.

    Attributes:
        count: the number.
        note: what the resource said when it was applied last; None before there were notes.
    """

    count: int
    note: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Count:
    """The number of replicas of a workload.

    Attributes:
        replicas: that should be.
        spec: the part of the workload's spec that is applied; empty while the number is another manager's.
        annotations: of the workload.
    """

    replicas: int
    spec: Mapping[str, int] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)


def count_replicas(place: Place, planned: int, scaled: Mapping[Place, Scaled], *, note: str | None = None) -> Count:
    """The number of a workload's replicas, and whether the operator applies it.

    Args:
        place: kind and name of the workload.
        planned: number that the resource asks for.
        scaled: workloads whose number another manager set last.
        note: what the resource says, where that is not the number itself.
    """
    said = str(planned) if note is None else note
    annotations = {NOTE: said}
    other = scaled.get(place)
    if other is not None and other.note in (said, None):
        return Count(replicas=other.count, annotations=annotations)
    return Count(replicas=planned, spec={"replicas": planned}, annotations=annotations)


def keep_for_now(count: Count, replicas: int, other: Scaled | None) -> Count:
    """The number that a workload has until it can have the planned one.

    Where that is the number of another manager, an apply makes the operator its owner too, no more. The old note stays,
    so that the planned number is new until it is applied.

    Args:
        count: the planned number.
        replicas: the number for now.
        other: what another manager set last; None without one.
    """
    annotations = dict(count.annotations)
    if other is not None and other.note is not None and other.count == replicas and NOTE in annotations:
        annotations[NOTE] = other.note
    return replace(count, spec={"replicas": replicas}, annotations=annotations)


def own_replicas(planned: int) -> Count:
    """The number where the operator is the autoscaler: nobody else's counts."""
    return Count(replicas=planned, spec={"replicas": planned})
