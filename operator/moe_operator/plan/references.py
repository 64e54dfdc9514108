"""Objects that the pods of a plan refer to by name: claims, Secrets and ConfigMaps. Pure.

They may be a user's own, or what an earlier plan made; nothing that a pod needs is deleted under it.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

Document = dict[str, Any]
Reference = tuple[str, str]

CLAIM, SECRET, CONFIG_MAP = "PersistentVolumeClaim", "Secret", "ConfigMap"
# Field of a reference, and the kind that it names. `name` counts only below one of the second kind.
_NAMED = {"claimName": CLAIM, "secretName": SECRET}
_HOLDERS = {
    "secret": SECRET,
    "secretRef": SECRET,
    "secretKeyRef": SECRET,
    "nodePublishSecretRef": SECRET,
    "imagePullSecrets": SECRET,
    "configMap": CONFIG_MAP,
    "configMapRef": CONFIG_MAP,
    "configMapKeyRef": CONFIG_MAP,
}


def find_references(objects: Iterable[Document]) -> set[Reference]:
    """Kind and name of each object that the pod templates in these objects refer to."""
    return {found for entry in objects for found in _walk(entry.get("spec", {}), "")}


def _walk(value: Any, field: str) -> Iterator[Reference]:
    if isinstance(value, Mapping):
        for name, below in value.items():
            kind = _NAMED.get(name) or (_HOLDERS.get(field) if name == "name" else None)
            if kind and isinstance(below, str):
                yield kind, below
            yield from _walk(below, name)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _walk(entry, field)
