"""Who owns the children of a resource, so that no garbage collector ends them out of order. Pure.

A deleted resource drains its gateways first, then its engines, then all else goes (`kubernetes/ending.py`). Deletion in
the foreground, the default of Argo CD, would let the garbage collector delete every child at once. It spares an object
that has another owner which stays, and takes only the reference to the deleted resource away. That owner is the
namespace: it lives as long as the object can. PodDisruptionBudgets have the resource alone: losing one ends no stream,
and what became of them shows which propagation the deletion asked for.
"""

from collections.abc import Mapping
from typing import Any

from moe_operator.api.resource import API_VERSION, KIND
from moe_operator.plan.names import OWNER

Object = dict[str, Any]
# The kind whose references only name the resource; see `is_orphaned`.
SENTINEL = "PodDisruptionBudget"
ORPHAN_FINALIZER = "orphan"


def build_owners(entry: Object, name: str, namespace: str, uid: str | None, namespace_uid: str | None) -> Object:
    """The owner's annotation and the references of a child, as parts of its metadata; empty without an owner.

    Args:
        entry: the child.
        name: of the resource.
        namespace: of both.
        uid: of the resource; None without an owner.
        namespace_uid: of the namespace; None leaves the references out, but for those of the sentinels.
    """
    if uid is None:
        return {}
    resource = {"apiVersion": API_VERSION, "kind": KIND, "name": name, "uid": uid, "controller": True}
    note = {"annotations": {OWNER: uid}}
    if entry["kind"] == SENTINEL:
        return note | {"ownerReferences": [resource]}
    if namespace_uid is None:
        return note
    place = {"apiVersion": "v1", "kind": "Namespace", "name": namespace, "uid": namespace_uid}
    return note | {"ownerReferences": [resource, place]}


def is_owned(live: Mapping[str, Any], uid: str) -> bool:
    """Whether an object belongs to the resource with this uid, or was left by one that is gone and may be adopted."""
    return owner_of(live) in (uid, "") or uid in _uids(live)


def names_owner(live: Mapping[str, Any], uid: str) -> bool:
    """Whether an object says itself that it belongs to the resource with this uid, whatever its labels."""
    return owner_of(live) == uid or uid in _uids(live)


def is_child(live: Mapping[str, Any]) -> bool:
    """Whether an operator made an object; one of our labels alone was made by people."""
    return owner_of(live) is not None or KIND in _kinds(live)


def owner_of(live: Mapping[str, Any]) -> str | None:
    """Uid of the resource that owns an object; empty: released on purpose; None: it names no owner."""
    uid = (live["metadata"].get("annotations") or {}).get(OWNER)
    return None if uid is None else str(uid)


def is_orphaned(resource: Mapping[str, Any], children: list[Object]) -> bool:
    """Whether a deleted resource's children are to stay (`kubectl delete --cascade=orphan`).

    The API server notes it as a finalizer, which the garbage collector removes once it has taken the references to the
    resource away. After that the sentinels show it: deletion in the foreground deletes them, deletion in the background
    leaves their reference.
    """
    metadata = resource["metadata"]
    if ORPHAN_FINALIZER in metadata.get("finalizers", []):
        return True
    uid = metadata["uid"]
    own = (child for child in children if child["kind"] == SENTINEL and owner_of(child) in (uid, ""))
    return any(uid not in _uids(child) for child in own)


def _uids(live: Mapping[str, Any]) -> set[str]:
    return {entry.get("uid", "") for entry in live["metadata"].get("ownerReferences") or ()}


def _kinds(live: Mapping[str, Any]) -> set[str]:
    return {entry.get("kind", "") for entry in live["metadata"].get("ownerReferences") or ()}
