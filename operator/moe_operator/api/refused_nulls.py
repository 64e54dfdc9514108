"""Nulls of a document that the API server refuses, and reads as "absent" where the field has a default.

A client-side `kubectl apply` and `kubectl create` leave all nulls out; a server-side apply sends them. Those in pod
templates, which have no schema, are another matter (`moe_operator.plan.ignored`).
"""

from collections.abc import Iterator, Mapping
from typing import Any

from moe_operator.api.resource import MoEServing
from moe_operator.api.schema import structural_schema


def find_refused_nulls(document: object) -> list[str]:
    """Paths of the nulls in the spec of a valid document that a server-side apply refuses."""
    spec = document.get("spec") if isinstance(document, Mapping) else None
    return [f"spec{path}" for path in _find(spec, structural_schema(MoEServing)["properties"]["spec"])]


def _find(value: Any, schema: Mapping[str, Any]) -> Iterator[str]:
    if value is None and "default" not in schema:
        yield ""
    elif isinstance(value, Mapping) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        known = schema.get("properties", {})
        yield from (f".{name}{rest}" for name, part in value.items() for rest in _find(part, known.get(name, schema)))
    elif isinstance(value, list | tuple):
        yield from (
            f"[{index}]{rest}" for index, part in enumerate(value) for rest in _find(part, schema.get("items", {}))
        )
