"""What the end of a resource waits for, and for how long. Pure.

Pods end by their kubelet and the garbage collector, objects by the controllers whose finalizers they carry. On a lost
node, or without its controller, neither happens. So each wait has an end: the moment by which a pod should have been
killed (its `deletionTimestamp`) and a margin.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

Document = dict[str, Any]
# Killed, taken down, its volumes unmounted, its object removed: seconds where all is well.
POD_MARGIN = timedelta(seconds=60)
# For a pod whose workload is gone and that no garbage collector has marked yet.
UNMARKED = timedelta(seconds=120)
# For an object that is marked for deletion and that another controller's finalizer holds, such as a used claim.
HELD = timedelta(seconds=30)
_NAMED = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait:
    """One thing that should go.

    Attributes:
        text: the thing in words, with where it is and what holds it.
        until: when the wait for it ends.
    """

    text: str
    until: datetime

    def is_over(self, now: datetime) -> bool:
        """Whether it should have gone by now."""
        return now >= self.until


def wait_for_pod(pod: Mapping[str, Any], since: datetime) -> Wait:
    """The wait for a pod whose workload was deleted.

    Args:
        pod: the object.
        since: when it was first waited for, for a pod that is not marked for deletion.
    """
    marked = _parse_time(pod["metadata"].get("deletionTimestamp"))
    node = pod.get("spec", {}).get("nodeName")
    place = f" on node {node}" if node else ""
    return Wait(
        text=f"pod {pod['metadata']['name']}{place}",
        until=since + UNMARKED if marked is None else marked + POD_MARGIN,
    )


def wait_for_object(live: Mapping[str, Any], since: datetime) -> Wait:
    """The wait for an object that was deleted, and that finalizers may hold."""
    marked = _parse_time(live["metadata"].get("deletionTimestamp"))
    held = ", ".join(live["metadata"].get("finalizers") or ())
    return Wait(
        text=f"{live['kind']} {live['metadata']['name']}" + (f" (held by {held})" if held else ""),
        until=(since if marked is None else marked) + HELD,
    )


def find_remains(children: Iterable[Mapping[str, Any]]) -> list[str]:
    """The objects that are being deleted and whose place another is to take, in words, sorted."""
    rows = (wait_for_object(live, datetime.min).text for live in children if "deletionTimestamp" in live["metadata"])
    return [f"waits for {text}, which is being deleted" for text in sorted(rows)]


def split_waits(waits: Iterable[Wait], now: datetime) -> tuple[list[Wait], list[Wait]]:
    """Those that still run, and those that are over."""
    rows = [*waits]
    return [wait for wait in rows if not wait.is_over(now)], [wait for wait in rows if wait.is_over(now)]


def render_waits(waits: Iterable[Wait]) -> str:
    """Some of the waits by name, sorted, and the number of the others; stable while none of them changes."""
    rows = sorted(waits, key=lambda wait: wait.text)
    shown = [f"{wait.text}, until {_render_time(wait.until)} at the latest" for wait in rows[:_NAMED]]
    more = len(rows) - _NAMED
    return "; ".join(shown) + (f"; and {more} more" if more > 0 else "")


def render_overdue(waits: Iterable[Wait]) -> str:
    """Some of the things that should have gone, by name."""
    rows = sorted(waits, key=lambda wait: wait.text)
    more = len(rows) - _NAMED
    return ", ".join(wait.text for wait in rows[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def _parse_time(text: Any) -> datetime | None:
    if not isinstance(text, str):
        return None
    moment = datetime.fromisoformat(text)
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _render_time(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
