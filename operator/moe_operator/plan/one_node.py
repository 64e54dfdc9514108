"""Pods that share a volume which one node alone can mount. Pure."""

from collections.abc import Mapping
from typing import Any

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
    term = {"topologyKey": _ONE_NODE, "labelSelector": {"matchLabels": dict(labels)}}
    pods = {**pods, _REQUIRED: [*(pods.get(_REQUIRED) or ()), term]}
    return {**template, "spec": {**spec, "affinity": {**affinity, "podAffinity": pods}}}
