"""Fixed roles whose engines are replaced in place roll one role after the other, prefill first. Pure.

Each role that rolls has an engine less meanwhile. The Deployment of the decode engines is paused, as Kubernetes has it,
until the prefill engines are all of the new template and available: it takes the new template and starts no engine of
it, and its number can still change.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from moe_scheduling.engine.disaggregation import EngineRole

from moe_operator.kubernetes.difference import is_covered, was_applied, with_digest
from moe_operator.plan import ClusterPlan
from moe_operator.plan.names import CANARY, COMPONENT, REVISION, ROLE
from moe_operator.plan.pod_status import ENGINE, GATED, condition_of, is_live, label_of

Document = dict[str, Any]


def roll_in_turn(plan: ClusterPlan, workloads: Iterable[Document]) -> ClusterPlan:
    """Returns the plan with the second role paused while the first one rolls; `workloads` are the live ones."""
    planned = {role: found for found in plan.objects if (role := _stable_role(found)) is not None}
    live = {role: found for found in workloads if (role := _stable_role(found)) is not None}
    first, second = EngineRole.PREFILL.value, EngineRole.DECODE.value
    if not {first, second} <= planned.keys() & live.keys() or _surges(planned[second]):
        return plan
    held = planned[second] | {"spec": {**planned[second]["spec"], "paused": True}}
    waits = live[second]["spec"].get("paused", False) or not _has_template(live[second], planned[second], held)
    if not waits or (_has_template(live[first], planned[first]) and _has_rolled(live[first])):
        return plan
    return replace(plan, objects=tuple(held if found is planned[second] else found for found in plan.objects))


def describe_wait(workload: Document, pods: Iterable[Document]) -> str:
    """Returns, after its name and numbers, for what a paused Deployment of engines waits; empty where it is not one.

    Args:
        workload: a live workload of the resource.
        pods: of the resource.
    """
    if _stable_role(workload) != EngineRole.DECODE.value or not workload["spec"].get("paused", False):
        return ""
    words = ", and it is paused until the prefill engines are new and ready"
    if unplaced := sorted(str(pod["metadata"]["name"]) for pod in pods if _is_unplaced_prefill(pod)):
        words += (
            f", but no node takes {', '.join(unplaced)}: add room for prefill engines or ask for less, or put the "
            "change back, or set engine.update to surge, and the decode engines wait no longer"
        )
    return words


def _is_unplaced_prefill(pod: Document) -> bool:
    """Whether no node can take a pod of a stable prefill engine; one that a queueing system holds back is not meant."""
    if label_of(pod, ROLE) != EngineRole.PREFILL.value or label_of(pod, REVISION) == CANARY or not is_live(pod):
        return False
    scheduled = condition_of(pod, "PodScheduled") or {}
    return scheduled.get("status") == "False" and scheduled.get("reason") != GATED


def _stable_role(document: Document) -> str | None:
    """The role of a Deployment of engines; None of any other object, and of a canary."""
    if document["kind"] != "Deployment" or label_of(document, COMPONENT) != ENGINE:
        return None
    return None if label_of(document, REVISION) == CANARY else label_of(document, ROLE) or None


def _surges(deployment: Mapping[str, Any]) -> bool:
    return bool(deployment["spec"]["strategy"]["rollingUpdate"]["maxSurge"])


def _has_template(live: Document, *forms: Document) -> bool:
    """Whether the newest template is there, in one of the forms in which its Deployment is applied.

    The API server, or a webhook of the cluster, may have written it in other words: then what was applied last counts.
    """
    template = live["spec"].get("template")
    return is_covered(forms[0]["spec"]["template"], template) or any(
        was_applied(with_digest(form), live) for form in forms
    )


def _has_rolled(live: Mapping[str, Any]) -> bool:
    """Whether all its engines are of its template and available, as the Deployment's controller last said."""
    status, wanted = live.get("status", {}), live["spec"].get("replicas", 1)
    if status.get("observedGeneration", 0) < live["metadata"].get("generation", 0):
        return False
    return all(status.get(name, 0) == wanted for name in ("replicas", "updatedReplicas", "availableReplicas"))
