"""Whether an object has to be applied: is what the plan says already there? Pure.

The operator makes no write when nothing changed, so this question is answered here and not by the API server. An object
carries a digest of what was last applied, which shows fields that the plan no longer has; the comparison of the plan
with the object shows changes by others to our fields. Fields that the plan does not have belong to others.

Source of the keys: `listType`, `listMapKey` and `mapType` of the types in k8s.io/api v0.34. A list without a key is one
value, and so is all that stands in it; so are selectors.
"""

import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any

from moe_operator.api.units import quantity_value
from moe_operator.plan.names import APPLIED

Document = dict[str, Any]

_NAME = ("name",)
_KEYS = {
    "containers": _NAME,
    "initContainers": _NAME,
    "ephemeralContainers": _NAME,
    "volumes": _NAME,
    "env": _NAME,
    "imagePullSecrets": _NAME,
    "resourceClaims": _NAME,
    "claims": _NAME,
    "volumeMounts": ("mountPath",),
    "volumeDevices": ("devicePath",),
    "ports": ("containerPort", "port", "protocol"),
    "hostAliases": ("ip",),
    "topologySpreadConstraints": ("topologyKey", "whenUnsatisfiable"),
    "ownerReferences": ("uid",),
}
_KEY_DEFAULTS = {"protocol": "TCP"}
_WHOLE_MAPS = {"selector", "nodeSelector", "podSelector", "namespaceSelector", "matchLabels"}
_QUANTITY_MAPS, _QUANTITIES = {"limits", "requests"}, {"sizeLimit", "divisor"}


def with_digest(wanted: Document) -> Document:
    """The object with the digest of itself, as it is applied."""
    digest = sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:16]
    annotations = {**wanted["metadata"].get("annotations", {}), APPLIED: digest}
    return {**wanted, "metadata": {**wanted["metadata"], "annotations": annotations}}


def needs_apply(wanted: Document, live: Document | None) -> bool:
    """Whether the object has to be applied; `wanted` carries its digest."""
    return live is None or not is_covered(wanted, live)


def was_applied(wanted: Document, live: Document) -> bool:
    """Whether this very object was the last to be applied, whatever others made of it since."""
    return bool(_digest(wanted) == _digest(live))


def _digest(document: Document) -> str | None:
    digest: str | None = document["metadata"].get("annotations", {}).get(APPLIED)
    return digest


def is_covered(wanted: Any, live: Any, *, field: str = "", is_value: bool = False) -> bool:
    """Whether all that is wanted is there; more may be there, as defaults and what others set.

    Args:
        wanted: a document or a part of it.
        live: the same part of the object.
        field: the name of the part.
        is_value: it stands in a list that is one value.
    """
    if live is None and not wanted:
        # The API server leaves out what is empty, false or zero.
        return True
    if isinstance(wanted, Mapping):
        return isinstance(live, Mapping) and _is_map_covered(wanted, live, field, is_value=is_value)
    if isinstance(wanted, list | tuple):
        return isinstance(live, list) and _is_list_covered(wanted, live, field, is_value=is_value)
    return _is_same_quantity(wanted, live) if field in _QUANTITIES else bool(wanted == live)


def _is_map_covered(wanted: Mapping[str, Any], live: Mapping[str, Any], field: str, *, is_value: bool) -> bool:
    if field in _WHOLE_MAPS and wanted.keys() != live.keys():
        return False
    if field in _QUANTITY_MAPS:
        return all(
            value == live.get(name) or _is_same_quantity(value, live.get(name)) for name, value in wanted.items()
        )
    return all(is_covered(value, live.get(name), field=name, is_value=is_value) for name, value in wanted.items())


def _is_list_covered(wanted: Sequence[Any], live: Sequence[Any], field: str, *, is_value: bool) -> bool:
    keys = None if is_value else _KEYS.get(field)
    if keys is None or not all(isinstance(entry, Mapping) for entry in (*wanted, *live)):
        whole = len(wanted) == len(live)
        return whole and all(is_covered(old, new, is_value=True) for old, new in zip(wanted, live, strict=True))
    found = {_key(entry, keys): entry for entry in live}
    return all(_key(entry, keys) in found and is_covered(entry, found[_key(entry, keys)]) for entry in wanted)


def _key(entry: Mapping[str, Any], keys: tuple[str, ...]) -> tuple[Any, ...]:
    return tuple(entry.get(key, _KEY_DEFAULTS.get(key)) for key in keys)


def _is_same_quantity(wanted: Any, live: Any) -> bool:
    try:
        return bool(wanted == live) or quantity_value(str(wanted)) == quantity_value(str(live))
    except ValueError:
        return False
