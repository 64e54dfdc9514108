"""Reads the state of a pod from its document, for status and autoscaler: pods are distinguished here alone. Pure.

A pod that is over (evicted, refused by its kubelet, run to its end) stays an object until somebody deletes it. It has
no process and its address may be another pod's, so it counts nowhere.
"""

from typing import Any

from moe_operator.plan.names import COMPONENT, is_replica

Document = dict[str, Any]
ENGINE, GATEWAY = "engine", "gateway"
# Reason of a pod's condition `PodScheduled` while a queueing system such as Kueue holds it back.
GATED = "SchedulingGated"
# Phases that a pod never leaves: its containers have ended and are not started again.
_OVER = ("Failed", "Succeeded")


def component_of(pod: Document) -> str:
    """`engine` or `gateway`; empty for a pod that is neither."""
    return str(label_of(pod, COMPONENT))


def label_of(pod: Document, name: str) -> str:
    """Value of a label; empty without it."""
    return str((pod["metadata"].get("labels") or {}).get(name, ""))


def is_over(pod: Document) -> bool:
    """Whether the pod has ended for good, though its object is still there."""
    return pod.get("status", {}).get("phase") in _OVER


def is_live(pod: Document) -> bool:
    """Whether the pod is neither over nor being deleted."""
    return not is_over(pod) and "deletionTimestamp" not in pod["metadata"]


def is_ready(pod: Document) -> bool:
    """Whether the pod is live and its kubelet says that it is ready."""
    row = condition_of(pod, "Ready")
    return row is not None and row.get("status") == "True" and is_live(pod)


def is_engine(pod: Document) -> bool:
    """Whether the pod stands for an engine: with several nodes the leader's does."""
    return component_of(pod) == ENGINE and is_replica(pod["metadata"].get("labels") or {})


def condition_of(pod: Document, kind: str) -> Document | None:
    """The condition of this type; None without one."""
    rows = pod.get("status", {}).get("conditions") or ()
    return next((row for row in rows if row.get("type") == kind), None)
