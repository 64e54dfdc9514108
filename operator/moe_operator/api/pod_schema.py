"""The types of a pod's fields as the Kubernetes API describes them: names, types, closed sets, and the keys of lists.

The types are those of `pod_schema.json`, which this module itself writes from an OpenAPI document of the API group
`v1`: `kubectl get --raw /openapi/v3/api/v1 | python -m moe_operator.api.pod_schema > pod_schema.json`. The file
`api/openapi-spec/v3/api__v1_openapi.json` of a release of Kubernetes lacks the closed sets. Read by the check of pod
templates and by their merge.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

Document = dict[str, Any]

FILE = Path(__file__).with_name("pod_schema.json")
ROOT = "PodSpec"
# What stands for a type that is no structure of fields.
STRING, INT32, ANYTHING = "string", "int32", "anything"
_PLAIN = {"Quantity": "quantity", "IntOrString": "intOrString", "Time": STRING, "FieldsV1": ANYTHING}
LIST, MAP = "list of ", "map of "
# The API calls them required, and the API server takes a pod without them.
_MAY_LACK = {("HTTPHeader", "value"), ("ISCSIVolumeSource", "lun"), ("Sysctl", "value")}


@dataclass(frozen=True, slots=True, kw_only=True)
class PodField:
    """A field of a pod.

    Attributes:
        type: a plain type, the name of a structure, or one of both behind `list of ` or `map of `.
        merge_key: field by which a strategic merge finds the entry of the list; empty: the list is replaced.
        keys: fields that no two entries of the list may have in common; empty: the API server does not compare them.
        is_set: no value may stand twice in the list.
        is_required: the structure is of no use without it.
        choices: the values that there are; empty: any.
    """

    type: str
    merge_key: str = ""
    keys: tuple[str, ...] = ()
    is_set: bool = False
    is_required: bool = False
    choices: tuple[str, ...] = ()


Structure = Mapping[str, PodField]


@cache
def load_types() -> Mapping[str, Structure]:
    """The fields of each structure below `PodSpec`, by its name and theirs."""
    types = json.loads(FILE.read_text(encoding="utf-8"))
    return {name: {field: _read_field(row) for field, row in rows.items()} for name, rows in types.items()}


@cache
def merge_keys() -> Mapping[str, str]:
    """The merge key of each list that a strategic merge merges, by the name of the field."""
    return {
        name: field.merge_key for fields in load_types().values() for name, field in fields.items() if field.merge_key
    }


def _read_field(row: str | Document) -> PodField:
    if isinstance(row, str):
        return PodField(type=row)
    return PodField(
        type=row["type"],
        merge_key=row.get("mergeKey", ""),
        keys=tuple(row.get("keys", ())),
        is_set="set" in row,
        is_required="required" in row,
        choices=tuple(row.get("choices", ())),
    )


def build_types(openapi: Document) -> Document:
    """The structures that can be reached from `PodSpec` in an OpenAPI document, as they are written to the file."""
    schemas = {
        name.rpartition(".")[2]: schema for name, schema in openapi["components"]["schemas"].items() if _is_ours(name)
    }
    types: Document = {}
    waiting = [ROOT]
    while waiting:
        name = waiting.pop()
        if name in types or name in _PLAIN:
            continue
        required = {field for field in schemas[name].get("required", ()) if (name, field) not in _MAY_LACK}
        types[name] = {
            field: _build_field(node, is_required=field in required)
            for field, node in schemas[name].get("properties", {}).items()
        }
        waiting += [found for node in schemas[name].get("properties", {}).values() for found in _references(node)]
    return dict(sorted(types.items()))


def _is_ours(name: str) -> bool:
    return name.startswith(("io.k8s.api.core.v1.", "io.k8s.apimachinery.pkg."))


def _references(node: Document) -> Iterator[str]:
    below = (node.get("items"), node.get("additionalProperties"), *node.get("allOf", ()))
    for child in below:
        if isinstance(child, dict):
            yield from _references(child)
    if "$ref" in node:
        yield node["$ref"].rpartition(".")[2]


def _build_field(node: Document, *, is_required: bool = False) -> str | Document:
    row: Document = {"type": _type_of(node)}
    if merge_key := node.get("x-kubernetes-patch-merge-key"):
        row["mergeKey"] = merge_key
    if keys := node.get("x-kubernetes-list-map-keys"):
        row["keys"] = keys
    if node.get("x-kubernetes-list-type") == "set":
        row["set"] = True
    if is_required:
        row["required"] = True
    if choices := [choice for choice in node.get("enum", ()) if choice]:
        row["choices"] = choices
    return row if len(row) > 1 else str(row["type"])


def _type_of(node: Document) -> str:
    if references := [*_references({"$ref": node["$ref"]} if "$ref" in node else {"allOf": node.get("allOf", [])})]:
        return _PLAIN.get(references[0], references[0])
    match node.get("type"):
        case "array":
            return LIST + _type_of(node["items"])
        case "object" if "additionalProperties" in node:
            return MAP + _type_of(node["additionalProperties"])
        case "integer":
            return str(node["format"])
        case "string" | "boolean" | "number" as plain:
            return str(plain)
        case _:
            return ANYTHING


def main() -> None:
    """Reads an OpenAPI document from stdin and prints the file."""
    json.dump(build_types(json.load(sys.stdin)), sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
