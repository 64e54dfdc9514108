"""Pods that share a volume which one node alone can mount. Pure."""

from collections.abc import Mapping
from typing import Any

from moe_operator.api.resource import MoEServing
from moe_operator.plan.references import CLAIM, find_references
from moe_operator.plan.role_override import all_templates

Document = dict[str, Any]
_REQUIRED = "requiredDuringSchedulingIgnoredDuringExecution"
_ONE_NODE = "kubernetes.io/hostname"


def on_one_node(template: Document, labels: Mapping[str, str]) -> Document:
    """The pod template with a required affinity to the pods of these labels, added to its own.

    The scheduler lets the first of them go anywhere, since it matches its own affinity.
    """
    spec = template["spec"]
    affinity = spec.get("affinity") or {}
    pods = affinity.get("podAffinity") or {}
    pods = {**pods, _REQUIRED: [*(pods.get(_REQUIRED) or ()), _term(labels)]}
    return {**template, "spec": {**spec, "affinity": {**affinity, "podAffinity": pods}}}


def is_on_one_node(template: Document, labels: Mapping[str, str]) -> bool:
    """Returns whether a pod template has that affinity."""
    pods = (template["spec"].get("affinity") or {}).get("podAffinity") or {}
    return any(row.items() >= _term(labels).items() for row in pods.get(_REQUIRED) or ())


def find_one_node_claims(resource: MoEServing, one_node_claims: frozenset[str]) -> frozenset[str]:
    """Returns the claims that the engines mount, of those that one node alone can mount."""
    model, mounted = resource.spec.model, set[str]()
    if model.cache is not None and model.cache.claim is not None:
        mounted.add(model.cache.claim)
    if model.uri.startswith("pvc://"):
        mounted.add(model.uri.removeprefix("pvc://").partition("/")[0])
    extra = find_references([{"spec": {"template": template}} for template in all_templates(resource)])
    mounted |= {name for kind, name in extra if kind == CLAIM}
    return one_node_claims & mounted


def share_one_node(resource: MoEServing, one_node_claims: frozenset[str]) -> bool:
    """Returns whether all engines of a resource are on one node, for the volume that they mount."""
    return resource.spec.model.keeps_one_node or bool(find_one_node_claims(resource, one_node_claims))


def _term(labels: Mapping[str, str]) -> Document:
    return {"topologyKey": _ONE_NODE, "labelSelector": {"matchLabels": dict(labels)}}
