"""Pods that Kubernetes takes away, and pods whose node does not answer. Pure.

What is read here is written by the node lifecycle controller, the taint manager and the eviction API (Kubernetes 1.37):

- A node that does not answer makes `Ready` of its pods false, and leaves `ContainersReady` as the kubelet wrote it.
- Some minutes later the pods are deleted with the condition `DisruptionTarget`; without a kubelet they never go.
- An evicted or preempted pod carries `DisruptionTarget`, whose reason says by whom.
"""

from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from typing import Any

from moe_operator.api.reasons import Reason
from moe_operator.kubernetes.diagnosis import parse_time
from moe_operator.kubernetes.finding import Finding, build_finding
from moe_operator.kubernetes.groups import whole_replicas
from moe_operator.kubernetes.waits import POD_MARGIN
from moe_operator.plan.names import COMPONENT, REVISION, ROLE
from moe_operator.plan.pod_status import component_of, condition_of, is_live, is_over, label_of

Document = dict[str, Any]
DISRUPTION = "DisruptionTarget"
BY_TAINT = "DeletionByTaintManager"


def find_lost(pods: Sequence[Document], workloads: Iterable[Document], nodes: int, now: datetime) -> list[Finding]:
    """The first pod of each workload whose node does not answer, while the workload lacks ready engines or gateways.

    Args:
        pods: of the resource.
        workloads: of the resource.
        nodes: that one engine spans.
        now: the time, for pods that should have ended.
    """
    whole = whole_replicas(pods, nodes)
    return [finding for workload in workloads for finding in _find_lost(pods, workload, whole, now)]


def _find_lost(pods: Sequence[Document], workload: Document, whole: set[str], now: datetime) -> Iterator[Finding]:
    labels = workload["metadata"].get("labels") or {}
    own = sorted((pod for pod in pods if _is_of(pod, labels)), key=_name)
    ready = sum(_name(pod) in whole for pod in own) if labels.get(COMPONENT) == "engine" else _count_ready(own)
    if ready >= workload.get("spec", {}).get("replicas", 1):
        return
    for pod in own:
        if signs := _signs_of_loss(pod, now):
            node = pod["spec"].get("nodeName", "")
            advice = (
                f"node {node} does not answer; Kubernetes replaces its pods after some minutes. If it is lost, delete "
                "the Node: until then what its pods had counts as taken"
            )
            where = f"pod {_name(pod)}"
            component = component_of(pod)
            yield build_finding(
                Reason.NODE_NOT_READY, advice, where=where, detail=signs, component=component, pod=_name(pod)
            )
            return


def _signs_of_loss(pod: Document, now: datetime) -> str:
    """What shows that the node of a pod does not answer, in words; empty where nothing does."""
    if is_over(pod) or not pod["spec"].get("nodeName"):
        return ""
    if is_live(pod):
        return "it is not ready, though its containers were" if _is_left_alone(pod) else ""
    # A taint that a person or a spot handler sets takes pods from a node that answers: they are ready until they end.
    if _disruption(pod) == BY_TAINT and not _says_ready(pod):
        return f"{DISRUPTION}: {BY_TAINT}"
    until = parse_time(pod["metadata"]["deletionTimestamp"])
    overdue = until is not None and now > until + POD_MARGIN
    return f"it should have ended by {pod['metadata']['deletionTimestamp']}" if overdue else ""


def _is_left_alone(pod: Document) -> bool:
    """Whether somebody else than the kubelet says that the pod is not ready: the kubelet derives it from containers."""
    ready, containers = (condition_of(pod, kind) or {} for kind in ("Ready", "ContainersReady"))
    gated = pod["spec"].get("readinessGates")
    return ready.get("status") == "False" and containers.get("status") == "True" and not gated


def find_disrupted(pods: Iterable[Document]) -> list[str]:
    """The pods that are on their way out because Kubernetes takes them away, each with the reason, in words."""
    rows = ((pod, _disruption(pod)) for pod in pods if not is_over(pod))
    return sorted(f"pod {_name(pod)} is taken away ({reason})" for pod, reason in rows if reason)


def _disruption(pod: Document) -> str:
    row = condition_of(pod, DISRUPTION) or {}
    return str(row.get("reason") or DISRUPTION) if row.get("status") == "True" else ""


def _count_ready(pods: Iterable[Document]) -> int:
    return sum(_says_ready(pod) and is_live(pod) for pod in pods)


def _says_ready(pod: Document) -> bool:
    return bool((condition_of(pod, "Ready") or {}).get("status") == "True")


def _is_of(pod: Document, labels: Document) -> bool:
    """Whether a pod is of a workload; workers of a group have no revision."""
    same_revision = label_of(pod, REVISION) in ("", labels.get(REVISION, ""))
    same = all(label_of(pod, name) == labels.get(name, "") for name in (COMPONENT, ROLE))
    return same and same_revision


def _name(pod: Document) -> str:
    return str(pod["metadata"]["name"])
