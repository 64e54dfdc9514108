"""Kubernetes' strategic merge of a pod template, for the fields of pods whose lists merge by a key. Pure.

The keys are those of the Kubernetes API (`moe_operator.api.pod_schema`). A list without one is replaced. Of the
directives `$patch` is known. The patch is one that `moe_operator.api.pod_template` has found to be valid.
"""

from collections.abc import Mapping
from typing import Any

from moe_operator.api.pod_schema import merge_keys
from moe_operator.api.pod_template import DELETE, PATCH, REPLACE

# A volume has one source and a variable one value: another one takes the place of the old.
_OF_ONE_SOURCE = ("volumes", "env")


def merge_template(base: Mapping[str, Any], patch: Mapping[str, Any]) -> dict[str, Any]:
    """The base with the patch laid over.

    Maps merge, null and `$patch: delete` remove, `$patch: replace` takes the place of the base, lists of the table
    merge by key, the patch wins.
    """
    merged = {} if patch.get(PATCH) == REPLACE else dict(base)
    for name, value in patch.items():
        if name == PATCH:
            continue
        if _removes(value):
            merged.pop(name, None)
        else:
            merged[name] = _merge_value(name, merged.get(name), value)
    return merged


def _removes(value: Any) -> bool:
    return value is None or (isinstance(value, Mapping) and value.get(PATCH) == DELETE)


def _merge_value(name: str, old: Any, new: Any) -> Any:
    if isinstance(new, Mapping):
        return merge_template(old if isinstance(old, Mapping) else {}, new)
    if not isinstance(new, list | tuple):
        return new
    key = merge_keys().get(name, "")
    if not key:
        return [_merge_value("", None, entry) for entry in new]
    if any(isinstance(entry, Mapping) and entry.get(PATCH) == REPLACE for entry in new):
        old = []
    return _merge_list(old if isinstance(old, list) else [], new, key, one_source=name in _OF_ONE_SOURCE)


def _merge_list(old: list[Any], new: list[Any] | tuple[Any, ...], key: str, *, one_source: bool) -> list[Any]:
    gone = [entry for entry in new if _removes(entry)]
    kept = [known for known in old if not any(_has_key(known, entry, key) for entry in gone)]
    added = []
    for entry in new:
        place = next((place for place, known in enumerate(kept) if _has_key(known, entry, key)), None)
        if _removes(entry) or entry.keys() <= {PATCH}:
            continue
        if place is None:
            added.append(merge_template({}, entry))
        elif not one_source:
            kept[place] = merge_template(kept[place], entry)
        elif entry.keys() - {key, PATCH}:
            kept[place] = merge_template({}, entry)
    return kept + added


def _has_key(known: Mapping[str, Any], entry: Mapping[str, Any], key: str) -> bool:
    return bool(known.get(key) == entry.get(key))
