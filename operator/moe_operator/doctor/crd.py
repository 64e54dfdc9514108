"""The CustomResourceDefinition of the cluster beside that of this version."""

from collections.abc import Mapping
from typing import Any

from moe_contract.api_server import NOT_FOUND, ApiError, Document, Kind

from moe_operator.api.crd import VERSION, build_crd
from moe_operator.doctor.check import Check, note, ok, problem

CRD = Kind("apiextensions.k8s.io", "v1", "CustomResourceDefinition", "customresourcedefinitions", namespaced=False)
NAME = build_crd()["metadata"]["name"]
_CHECK = "CRD"
_INSTALL = (
    "install the chart: `helm install moeserving charts/moeserving --namespace moeserving-system --create-namespace` "
    "(docs/install.md); the CRD alone: `moeserving crd | kubectl apply --server-side -f -`"
)
_UPGRADE = (
    "upgrade the chart: `helm upgrade moeserving charts/moeserving --namespace moeserving-system`; where the chart "
    "does not install it: `moeserving crd | kubectl apply --server-side -f -`"
)
_MOST_FIELDS = 3


def check_crd(crd: Document | ApiError, served: bool | ApiError) -> Check:
    """Whether the cluster has the kind MoEServing, in the form that this version has.

    Args:
        crd: the cluster's definition.
        served: whether the API server serves the kind; every user may know that.
    """
    if isinstance(crd, ApiError):
        if crd.status == NOT_FOUND or served is False:
            return problem(_CHECK, f"the cluster has no {NAME}", _INSTALL)
        if served is True:
            return note(_CHECK, f"{NAME} is there; not compared with this version's: {crd}")
        return problem(_CHECK, f"not known: {crd}", _INSTALL)
    schema = find_schema(crd)
    if schema is None:
        return problem(_CHECK, f"{NAME} has no version {VERSION}", _UPGRADE)
    own = find_schema(build_crd())
    assert own is not None
    return _compare(schema, own, f"{NAME}{_version_of(crd)}")


def _compare(schema: Document, own: Document, name: str) -> Check:
    here, there = field_paths(own), field_paths(schema)
    missing, more = sorted(here - there), sorted(there - here)
    if missing:
        both = f", and has {_few(more)} that this version does not have" if more else ""
        finding = f"{name} is {'another' if more else 'older'} than this version's: it lacks {_few(missing)}{both}"
        return problem(_CHECK, finding, _UPGRADE)
    if more:
        advice = "`moeserving validate` and `plan` of this machine refuse these fields: upgrade moeserving here"
        return note(_CHECK, f"{name} is newer than this version's: it has {_few(more)}", advice)
    if without_descriptions(schema) != without_descriptions(own):
        return note(_CHECK, f"{name} has the fields of this version with other bounds or defaults", _UPGRADE)
    return ok(_CHECK, f"{name} is that of this version")


def find_schema(crd: Document) -> Document | None:
    """The schema of the version that this release serves; None where the definition has no such version."""
    for version in crd.get("spec", {}).get("versions", []):
        if version.get("name") == VERSION and version.get("served"):
            schema: Document = version.get("schema", {}).get("openAPIV3Schema", {})
            return schema
    return None


def field_paths(schema: Mapping[str, Any], path: str = "") -> set[str]:
    """The paths of all fields below a schema, such as `spec.model.uri`; items of lists and maps have `[]`."""
    found: set[str] = set()
    for name, child in schema.get("properties", {}).items():
        below = f"{path}.{name}" if path else name
        found |= {below} | field_paths(child, below)
    for word in ("items", "additionalProperties"):
        if isinstance(child := schema.get(word), Mapping):
            found |= field_paths(child, f"{path}[]")
    return found


def without_descriptions(schema: Any) -> Any:
    """The schema without its texts for people; a field of the name `description` stays."""
    if isinstance(schema, list):
        return [without_descriptions(row) for row in schema]
    if not isinstance(schema, Mapping):
        return schema
    found = {}
    for word, value in schema.items():
        if word == "properties":
            found[word] = {name: without_descriptions(child) for name, child in value.items()}
        elif word != "description":
            found[word] = without_descriptions(value)
    return found


def _few(paths: list[str]) -> str:
    """The highest of these paths, the first few by name."""
    tops = [path for path in paths if not any(path.startswith((f"{other}.", f"{other}[")) for other in paths)]
    more = f" and {len(tops) - _MOST_FIELDS} more" if len(tops) > _MOST_FIELDS else ""
    return ", ".join(tops[:_MOST_FIELDS]) + more


def _version_of(crd: Document) -> str:
    label = (crd["metadata"].get("labels") or {}).get("app.kubernetes.io/version", "")
    return f" of {label}" if label else ""
