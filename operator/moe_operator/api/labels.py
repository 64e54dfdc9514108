"""Labels and annotations that a person gives to generated objects: their types, and the keys that are the operator's.

A section that has both is an `ObjectMetadata`. Keys are checked here and by the API server, with the same words.
"""

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from moe_operator.api.object_names import LABEL_KEYS_RULE, LabelValue, key_problem
from moe_operator.api.section import Section

MANAGED_BY = "app.kubernetes.io/managed-by"
INSTANCE = "app.kubernetes.io/instance"
COMPONENT = "app.kubernetes.io/component"

# The operator, and controllers of Kubernetes, find objects by labels of these prefixes and by these keys.
RESERVED_LABEL_PREFIXES = (
    "moeserving.dev/",
    "kubernetes.io/",
    "endpointslice.kubernetes.io/",
    "leaderworkerset.sigs.k8s.io/",
)
RESERVED_LABELS = (MANAGED_BY, INSTANCE, COMPONENT)
RESERVED_ANNOTATION_PREFIXES = ("moeserving.dev/", "kubectl.kubernetes.io/", "deployment.kubernetes.io/")

MOST_KEYS = 32


def is_reserved_label(key: str) -> bool:
    """Whether a label is the operator's or Kubernetes' own to set on generated objects."""
    return key in RESERVED_LABELS or key.startswith(RESERVED_LABEL_PREFIXES)


def _is_reserved_annotation(key: str) -> bool:
    return key.startswith(RESERVED_ANNOTATION_PREFIXES)


def _check_keys(is_reserved: Callable[[str], bool], reserved: str) -> Callable[[dict[str, str]], dict[str, str]]:
    def check(values: dict[str, str]) -> dict[str, str]:
        for key in values:
            if problem := key_problem(key):
                raise ValueError(problem)
            if is_reserved(key):
                raise ValueError(f"{key!r} is not yours to set; reserved: {reserved}")
        return values

    return check


def _rules(prefixes: tuple[str, ...], keys: tuple[str, ...], reserved: str) -> dict[str, Any]:
    starts = " || ".join(f"key.startsWith('{prefix}')" for prefix in prefixes)
    known = "".join(f" || key == '{key}'" for key in keys)
    return {
        "x-kubernetes-validations": [
            LABEL_KEYS_RULE,
            {"rule": f"!self.exists(key, {starts}{known})", "message": f"a reserved key; reserved: {reserved}"},
        ]
    }


_RESERVED_LABELS_TEXT = ", ".join((*(f"{prefix}*" for prefix in RESERVED_LABEL_PREFIXES), *RESERVED_LABELS))
_RESERVED_ANNOTATIONS_TEXT = ", ".join(f"{prefix}*" for prefix in RESERVED_ANNOTATION_PREFIXES)

Labels = Annotated[
    dict[str, LabelValue],
    Field(
        max_length=MOST_KEYS,
        json_schema_extra=_rules(RESERVED_LABEL_PREFIXES, RESERVED_LABELS, _RESERVED_LABELS_TEXT),
    ),
    AfterValidator(_check_keys(is_reserved_label, _RESERVED_LABELS_TEXT)),
]
Annotations = Annotated[
    dict[str, Annotated[str, Field(pattern=r"^[^\x00]*$", max_length=4096)]],
    Field(max_length=MOST_KEYS, json_schema_extra=_rules(RESERVED_ANNOTATION_PREFIXES, (), _RESERVED_ANNOTATIONS_TEXT)),
    AfterValidator(_check_keys(_is_reserved_annotation, _RESERVED_ANNOTATIONS_TEXT)),
]


class ObjectMetadata(Section):
    """Labels and annotations of generated objects. A change of them restarts no pod."""

    labels: Labels = Field(default={}, description="Further labels; those of the operator cannot be set.")
    annotations: Annotations = Field(default={}, description="Further annotations.")


class CommonMetadata(ObjectMetadata):
    """Labels and annotations of all generated objects. Only in a cluster.

    Labels of the resource itself are on all of them too. Pods have those of `podTemplate.metadata`. A change restarts
    no pod.
    """
