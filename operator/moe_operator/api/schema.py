"""The structural schema of the resource: what pydantic says of the models, in the part of JSON schema that CRDs use.

A structural schema has a type at every node and no references, unions with null or `additionalProperties: false` (the
API server itself refuses or prunes unknown fields). Read by `crd.py` and `reference.py`.
"""

from collections.abc import Mapping
from typing import Any

from moe_operator.api.section import Section

Schema = dict[str, Any]

_DROPPED = {"title", "$defs"}


def structural_schema(model: type[Section]) -> Schema:
    """The schema of a model, every reference inlined."""
    schema = model.model_json_schema(by_alias=True, mode="validation")
    return _structural(schema, schema.get("$defs", {}))


def _structural(node: Schema, definitions: Schema) -> Schema:
    merged = _resolve(node, definitions)
    result: Schema = {}
    for key, value in merged.items():
        match key:
            case "properties":
                result[key] = {name: _structural(child, definitions) for name, child in value.items()}
            case "items":
                result[key] = _structural(value, definitions)
            case "additionalProperties":
                if isinstance(value, dict):
                    result[key] = _structural(value, definitions)
            case "const":
                result["enum"] = [value]
            case "exclusiveMinimum" | "exclusiveMaximum":
                # OpenAPI 3.0, which a CRD speaks, has the bound and its exclusion in two keys.
                result |= {key.removeprefix("exclusive").lower(): value, key: True}
            case "default":
                if value is not None:
                    result[key] = _without_nulls(value)
            case _ if key not in _DROPPED:
                result[key] = value
    return result


def _resolve(node: Schema, definitions: Schema) -> Schema:
    """Follows a reference and takes null out of a union; keys beside either win."""
    beside = {key: value for key, value in node.items() if key not in ("$ref", "anyOf")}
    if "$ref" in node:
        return _resolve(definitions[node["$ref"].rsplit("/", 1)[-1]], definitions) | beside
    choices = [choice for choice in node.get("anyOf", ()) if choice.get("type") != "null"]
    if len(choices) == 1:
        return _resolve(choices[0], definitions) | beside
    return node


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(entry) for key, entry in value.items() if entry is not None}
    return value
