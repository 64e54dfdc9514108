"""Kubernetes' strategic merge of a pod template, for the fields of pods whose lists merge by a key. Pure.

Source: the `patchMergeKey` tags of core/v1 (k8s.io/api v0.34, types.go). A list without such a tag is replaced.
"""

from collections.abc import Mapping
from typing import Any

_KEYS = {
    "containers": "name",
    "initContainers": "name",
    "ephemeralContainers": "name",
    "volumes": "name",
    "env": "name",
    "imagePullSecrets": "name",
    "resourceClaims": "name",
    "volumeMounts": "mountPath",
    "volumeDevices": "devicePath",
    "ports": "containerPort",
    "hostAliases": "ip",
    "topologySpreadConstraints": "topologyKey",
}


def merge_template(base: Mapping[str, Any], patch: Mapping[str, Any]) -> dict[str, Any]:
    """The base with the patch laid over: maps merge, null deletes, lists of the table merge by key, the patch wins."""
    merged = dict(base)
    for name, value in patch.items():
        if value is None:
            merged.pop(name, None)
        else:
            merged[name] = _merge_value(name, merged.get(name), value)
    return merged


def _merge_value(name: str, old: Any, new: Any) -> Any:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        # A volume has one source; another one takes the place of the old.
        return merge_template(old, new)
    if isinstance(old, list) and isinstance(new, list) and name in _KEYS:
        return _merge_list(old, new, _KEYS[name], one_source=name == "volumes")
    return new


def _merge_list(old: list[Any], new: list[Any], key: str, *, one_source: bool) -> list[Any]:
    merged = list(old)
    places = {entry[key]: place for place, entry in enumerate(merged) if isinstance(entry, Mapping) and key in entry}
    for entry in new:
        place = places.get(entry.get(key)) if isinstance(entry, Mapping) else None
        if place is None:
            merged.append(entry)
        elif one_source:
            merged[place] = entry
        else:
            merged[place] = merge_template(merged[place], entry)
    return merged
