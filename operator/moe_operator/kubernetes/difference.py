"""Whether an object has to be applied: is what the plan says already there? Pure.

The operator makes no write when nothing changed, so this question is answered here and not by the API server. An object
carries a digest of what was last applied, which tells of fields that the plan no longer has; the comparison of the plan
with the object tells of changes by others to fields that are ours. Fields that the plan does not have are others'.
"""

import json
from collections.abc import Mapping
from decimal import Decimal
from hashlib import sha256
from typing import Any

from moe_operator.api.units import quantity_value
from moe_operator.plan.names import APPLIED

Document = dict[str, Any]
_KEYS = ("name", "containerPort", "port", "mountPath", "type", "uid", "ip")


def with_digest(wanted: Document) -> Document:
    """The object with the digest of itself, as it is applied."""
    digest = sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:16]
    annotations = {**wanted["metadata"].get("annotations", {}), APPLIED: digest}
    return {**wanted, "metadata": {**wanted["metadata"], "annotations": annotations}}


def needs_apply(wanted: Document, live: Document | None) -> bool:
    """Whether the object has to be applied; `wanted` carries its digest."""
    return live is None or not is_covered(wanted, live)


def is_covered(wanted: Any, live: Any) -> bool:
    """Whether all that is wanted is there; more may be there, as defaults and what others set."""
    if isinstance(wanted, Mapping):
        if not isinstance(live, Mapping):
            return not wanted and live is None
        return all(is_covered(value, live.get(name)) for name, value in wanted.items())
    if isinstance(wanted, list | tuple):
        return _is_list_covered(wanted, live)
    return bool(wanted == live) or _is_same_quantity(wanted, live)


def _is_list_covered(wanted: Any, live: Any) -> bool:
    if not isinstance(live, list):
        return not wanted and live is None
    key = _key_of(wanted)
    if key is None:
        return len(wanted) == len(live) and all(map(is_covered, wanted, live))
    found = {entry.get(key): entry for entry in live if isinstance(entry, Mapping)}
    return all(entry[key] in found and is_covered(entry, found[entry[key]]) for entry in wanted)


def _key_of(entries: Any) -> str | None:
    """The key by which the entries of a list are told apart; None for a list of values."""
    if not entries or not all(isinstance(entry, Mapping) for entry in entries):
        return None
    return next((key for key in _KEYS if len({entry.get(key) for entry in entries} - {None}) == len(entries)), None)


def _is_same_quantity(wanted: Any, live: Any) -> bool:
    values = [_quantity(value) for value in (wanted, live)]
    return None not in values and values[0] == values[1]


def _quantity(value: Any) -> Decimal | None:
    if isinstance(value, bool) or not isinstance(value, str | int):
        return None
    try:
        return quantity_value(str(value))
    except ValueError:
        return None
