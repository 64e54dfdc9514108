"""Labels and annotations that a person gives to generated objects. Pure.

From the weakest to the strongest: labels of the resource itself, `spec.commonMetadata`, the section of the object
(`gateway.service`, `metrics`), the operator's own. Pod templates have none of them: a change restarts no pod.
"""

from collections.abc import Mapping
from typing import Any

from moe_contract.input_errors import InputError, InvalidInput

from moe_operator.api.labels import ObjectMetadata, is_reserved_label
from moe_operator.api.object_names import MOST_ANNOTATIONS, count_bytes
from moe_operator.api.resource import MoEServing
from moe_operator.plan.names import COMPONENT

Object = dict[str, Any]
# Tools mark by these what they made themselves: on a generated object they would take it for theirs and remove it.
_MARKS_OF_TOOLS = (
    "argocd.argoproj.io/",
    "helm.sh/",
    "helm.toolkit.fluxcd.io/",
    "kustomize.toolkit.fluxcd.io/",
    "meta.helm.sh/",
)
# Kueue admits what asks for quota. A gateway asks for none, and must run while engines wait for theirs.
_KUEUE = "kueue.x-k8s.io/"
# What the operator's own annotations, such as the digest of what was applied, take at most (bytes).
_OWN_ANNOTATIONS = 4096
_MONITORS = ("ServiceMonitor", "PodMonitor")
_WORKLOADS = ("Deployment", "LeaderWorkerSet")


def with_metadata(entry: Object, resource: MoEServing) -> Object:
    """The object with the labels and annotations that the resource asks for; those that it has already win.

    Raises:
        InvalidInput: they are more than an object can have.
    """
    metadata, section = entry["metadata"], _section_of(entry, resource)
    common = resource.spec.common_metadata
    labels = {**_inherited(entry, resource), **common.labels, **section.labels, **metadata.get("labels", {})}
    annotations = {**common.annotations, **section.annotations, **metadata.get("annotations", {})}
    if (count := count_bytes(annotations)) > MOST_ANNOTATIONS - _OWN_ANNOTATIONS:
        message = f"annotations of {count} bytes are more than the {MOST_ANNOTATIONS} that an object can have"
        raise InvalidInput([InputError("spec.commonMetadata.annotations", message)])
    given = ({"labels": labels} if labels else {}) | ({"annotations": annotations} if annotations else {})
    return {**entry, "metadata": {**metadata, **given}}


def _section_of(entry: Object, resource: MoEServing) -> ObjectMetadata:
    if entry["kind"] in _MONITORS:
        return resource.spec.metrics
    if entry["kind"] == "Service" and _component(entry) == "gateway":
        return resource.spec.gateway.service
    return ObjectMetadata()


def _inherited(entry: Object, resource: MoEServing) -> Mapping[str, str]:
    """Labels of the resource itself, without those by which the operator, Kubernetes or a tool finds its own."""
    return {
        key: value
        for key, value in resource.metadata.labels.items()
        if not is_reserved_label(key)
        and not key.startswith(_MARKS_OF_TOOLS)
        and (not key.startswith(_KUEUE) or _is_engines(entry))
    }


def _is_engines(entry: Object) -> bool:
    return entry["kind"] in _WORKLOADS and _component(entry) == "engine"


def _component(entry: Object) -> str:
    return str(entry["metadata"].get("labels", {}).get(COMPONENT, ""))
