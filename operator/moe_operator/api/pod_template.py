"""The check of a `podTemplate`: part of a pod template, merged into the operator's own by a strategic merge. Pure.

It finds what the API server would refuse or the merge would misread: unknown fields, values of another type or out of a
closed set, entries of a list that stand twice, and directives of the merge that are not supported. What needs the
merged pod (fields that are missing or exclude each other, ranges) is in `moe_operator.plan.pod_rules`.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from moe_contract.input_errors import Location, unknown_choice, unknown_field

from moe_operator.api.object_names import annotation_key_problem, key_problem, value_problem
from moe_operator.api.pod_schema import (
    ANYTHING,
    INT32,
    LIST,
    MAP,
    ROOT,
    STRING,
    PodField,
    load_types,
)

TEMPLATE_PARTS = ("metadata", "spec")
METADATA_PARTS = ("annotations", "labels")
PATCH = "$patch"
DELETE, REPLACE, MERGE = "delete", "replace", "merge"

Mistake = tuple[Location, str]

# Source: k8s.io/apimachinery, resource.Quantity.
_QUANTITY = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)(n|u|m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei|[eE][+-]?[0-9]+)?")
_BYTES = re.compile(r"([0-9.]+) ?([kKMGTPE])(i?)[bB]?")
_KEY_DEFAULTS = {"protocol": "TCP"}


def find_mistakes(template: Mapping[str, Any]) -> Iterator[Mistake]:
    """The problems of a template, each with its place below the template."""
    for name, part in template.items():
        if name not in TEMPLATE_PARTS:
            yield (name,), unknown_field("", name, TEMPLATE_PARTS).message
        elif part is not None and not isinstance(part, Mapping):
            yield (name,), _needed("a mapping of fields", part)
    yield from _check_metadata(template.get("metadata"))
    if isinstance(template.get("spec"), Mapping):
        yield from _check_structure(template["spec"], ROOT, ("spec",))


def _check_metadata(metadata: Any) -> Iterator[Mistake]:
    for name, part in metadata.items() if isinstance(metadata, Mapping) else ():
        if name not in METADATA_PARTS:
            yield ("metadata", name), unknown_field("", name, METADATA_PARTS).message
        else:
            yield from _check(part, PodField(type=MAP + STRING), ("metadata", name))
            yield from _check_metadata_forms(name, part)


def _check_metadata_forms(name: str, part: Any) -> Iterator[Mistake]:
    """Keys and values that no label, or no annotation, can have."""
    rows = part.items() if isinstance(part, Mapping) else ()
    texts = {key: value for key, value in rows if isinstance(value, str) and not key.startswith("$")}
    for key, value in texts.items():
        problem = (key_problem(key) or value_problem(value)) if name == "labels" else annotation_key_problem(key)
        if problem:
            yield ("metadata", name, key), problem


def _check(value: Any, field: PodField, place: Location) -> Iterator[Mistake]:
    """Problems of one value; null removes what the operator has there."""
    if value is None or field.type == ANYTHING:
        return
    if field.type.startswith(LIST):
        yield from _check_list(value, field, place)
    elif field.type.startswith(MAP):
        yield from _check_map(value, field.type.removeprefix(MAP), place)
    elif field.type in load_types():
        yield from _check_structure(value, field.type, place)
    elif problem := _plain_problem(value, field.type):
        yield place, problem
    elif value and field.choices and value not in field.choices:
        # An empty one stands for the default.
        yield place, unknown_choice("", value, field.choices).message


def _check_structure(value: Any, type_name: str, place: Location) -> Iterator[Mistake]:
    if not isinstance(value, Mapping):
        yield place, _needed("a mapping of fields", value)
        return
    fields = load_types()[type_name]
    for name, entry in value.items():
        if name.startswith("$"):
            yield from _check_directive(name, entry, place)
        elif name not in fields:
            yield (*place, name), unknown_field("", name, fields).message
        else:
            yield from _check(entry, fields[name], (*place, name))


def _check_map(value: Any, of: str, place: Location) -> Iterator[Mistake]:
    if not isinstance(value, Mapping):
        yield place, _needed("a mapping", value)
        return
    for name, entry in value.items():
        if name.startswith("$"):
            yield from _check_directive(name, entry, place)
        else:
            yield from _check(entry, PodField(type=of), (*place, name))


def _check_directive(name: str, value: Any, place: Location) -> Iterator[Mistake]:
    """Directives of a strategic merge begin with a dollar; no field does."""
    if name != PATCH:
        yield (*place, name), f"this directive of a strategic merge is not supported; known: {PATCH}"
    elif value not in (DELETE, REPLACE, MERGE):
        yield (*place, name), unknown_choice("", value, (DELETE, REPLACE, MERGE)).message


def _check_list(value: Any, field: PodField, place: Location) -> Iterator[Mistake]:
    if not isinstance(value, list | tuple):
        yield place, _needed("a list", value)
        return
    entry_field = PodField(type=field.type.removeprefix(LIST))
    for index, entry in enumerate(value):
        if entry is None:
            yield (*place, index), "null is no entry of a list"
        elif problem := _entry_problem(entry, field):
            yield (*place, index), problem
        else:
            yield from _check(entry, entry_field, (*place, index))
    yield from _find_repeated(value, field, place)


def _entry_problem(entry: Any, field: PodField) -> str:
    """Why an entry cannot be merged into its list; empty when it can."""
    if not isinstance(entry, Mapping):
        return ""
    directive = entry.get(PATCH)
    if PATCH in entry and not field.merge_key:
        return f"{PATCH} has no effect here: this list is replaced as a whole"
    if directive == REPLACE and len(entry) == 1:
        return ""
    if field.merge_key and entry.get(field.merge_key) is None:
        return f"{field.merge_key} is needed, by which this list is merged"
    return ""


def _find_repeated(entries: Any, field: PodField, place: Location) -> Iterator[Mistake]:
    seen: dict[Any, int] = {}
    for index, entry in enumerate(entries):
        key = _identity(entry, field)
        if key is None:
            continue
        if key in seen:
            yield (*place, index), f"{_shown(entry, field)} stands twice, first at [{seen[key]}]"
        seen.setdefault(key, index)


def _identity(entry: Any, field: PodField) -> str | None:
    """What tells an entry from others of its list; None where that does not matter or cannot be said."""
    if field.is_set:
        return repr(entry)
    if not field.keys or not isinstance(entry, Mapping) or not entry.keys() & set(field.keys):
        return None
    return repr([entry.get(key, _KEY_DEFAULTS.get(key)) for key in field.keys])


def _shown(entry: Any, field: PodField) -> str:
    if isinstance(entry, Mapping) and field.keys:
        return ", ".join(f"{key} {entry[key]!r:.80}" for key in field.keys if key in entry)
    return f"{entry!r:.80}"


def _plain_problem(value: Any, of: str) -> str:
    """Why a value is not of a plain type; empty when it is."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    match of:
        case "string":
            hint = "; put it in quotes" if isinstance(value, bool | int | float) else ""
            return "" if isinstance(value, str) else _needed("a string", value) + hint
        case "boolean":
            return "" if isinstance(value, bool) else _needed("true or false", value)
        case "number":
            return "" if is_number else _needed("a number", value)
        case "int32" | "int64":
            return "" if _is_integer(value, 31 if of == INT32 else 63) else _needed("a whole number", value)
        case "intOrString":
            is_one = isinstance(value, str) or _is_integer(value, 31)
            return "" if is_one else _needed("a whole number or a string", value)
        case _:
            return _quantity_problem(value, is_number=is_number)


def _is_integer(value: Any, bits: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -(2**bits) <= value < 2**bits


def _quantity_problem(value: Any, *, is_number: bool) -> str:
    if (isinstance(value, str) or is_number) and _QUANTITY.fullmatch(str(value)):
        return ""
    near = _BYTES.fullmatch(value) if isinstance(value, str) else None
    example = f"{near[1]}{'k' if near[2] == 'K' and not near[3] else near[2]}{near[3]}" if near else "64Gi or 500m"
    return _needed(f"a quantity such as {example}", value)


def _needed(what: str, value: Any) -> str:
    return f"{what} is needed, got {value!r:.80}"
