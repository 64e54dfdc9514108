"""The forms of names, keys and paths that the API server asks of the texts in a pod. Pure.

Source: k8s.io/kubernetes v1.34, pkg/apis/core/validation, and k8s.io/apimachinery v0.34. Names of structures and fields
are those of the Kubernetes API (`moe_operator.api.pod_schema`).
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from moe_contract.input_errors import unknown_choice

from moe_operator.api.object_names import is_object_name, key_problem, value_problem

Document = Mapping[str, Any]
Mistake = tuple[str, str]
Form = Callable[[str], str]

_PORT_NAME = re.compile(r"(?=.*[a-z])(?!.*--)[a-z0-9]([a-z0-9-]{0,13}[a-z0-9])?")
_PART = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_VARIABLE = re.compile(r"[ -<>-~]+")
_ENTRY = re.compile(r"[-._a-zA-Z0-9]{1,253}")
_HEADER = re.compile(r"[-A-Za-z0-9]+")
_SEARCH = re.compile(r"[.]|(?=.{1,254}$)_?[a-z0-9]([-_a-z0-9]*[a-z0-9])?(\._?[a-z0-9]([-_a-z0-9]*[a-z0-9])?)*\.?")
_SYSCTL = re.compile(r"(?=.{1,253}$)[a-z0-9]([-_a-z0-9]*[a-z0-9])?([./][a-z0-9]([-_a-z0-9]*[a-z0-9])?)*")
_SUBSCRIPT = re.compile(r"metadata\.(annotations|labels)\['(?P<key>[^']*)'\]")


def _matching(pattern: re.Pattern[str], wanted: str) -> Form:
    def check(text: str) -> str:
        return "" if pattern.fullmatch(text) else f"{wanted}, got {text!r:.80}"

    return check


def _domain(text: str) -> str:
    return "" if is_object_name(text) else f"the name of an object is needed, got {text!r:.80}"


def _host(text: str) -> str:
    return "" if is_object_name(text) else f"a host name in small letters is needed, got {text!r:.80}"


def _entry(text: str) -> str:
    is_good = _ENTRY.fullmatch(text) and text != "." and not text.startswith("..")
    return "" if is_good else f"the key of an entry is letters, digits, '.', '_' and '-', got {text!r:.80}"


def _relative(text: str) -> str:
    is_good = not text.startswith("/") and ".." not in text.split("/")
    return (
        "" if is_good else f"a path within the volume is needed, without a '/' first and without '..', got {text!r:.80}"
    )


def _new_file(text: str) -> str:
    """A path that a kubelet writes, whose own folders in a volume begin with two dots."""
    return _relative(text) or (
        f"a path that does not begin with '..' is needed, got {text!r:.80}" * text.startswith("..")
    )


def _straight(text: str) -> str:
    return f"a path without '..' is needed, got {text!r:.80}" if ".." in text.split("/") else ""


def _trimmed(text: str) -> str:
    return f"a name without spaces around it is needed, got {text!r:.80}" if text != text.strip() else ""


_part = _matching(_PART, "at most 63 small letters, digits and dashes are needed")
_port_name = _matching(_PORT_NAME, "at most 15 small letters, digits and dashes are needed, a letter among them")
_variable = _matching(_VARIABLE, "the name of a variable has no '=', and is plain text")
_header = _matching(_HEADER, "the name of a header is letters, digits and dashes")
_search = _matching(_SEARCH, "a domain in small letters is needed")
_sysctl = _matching(_SYSCTL, "the name of a kernel parameter is small letters and digits with '.', '/', '_' and '-'")


def _port(text: str) -> str:
    return f"a number stands without quotes, got {text!r:.80}" if text.isdecimal() else _port_name(text)


# Of texts, of each text of a list, and of port numbers where they are given as a text.
_FORMS: Mapping[str, Mapping[str, Form]] = {
    "ConfigMapEnvSource": {"name": _domain},
    "ConfigMapKeySelector": {"key": _entry, "name": _domain},
    "Container": {"name": _part, "image": _trimmed},
    "ContainerPort": {"name": _port_name},
    "DownwardAPIVolumeFile": {"path": _new_file},
    "EnvFromSource": {"prefix": _variable},
    "EnvVar": {"name": _variable},
    "HTTPGetAction": {"port": _port},
    "HTTPHeader": {"name": _header},
    "HostAlias": {"hostnames": _host},
    "HostPathVolumeSource": {"path": _straight},
    "KeyToPath": {"key": _entry, "path": _new_file},
    "LabelSelectorRequirement": {"key": key_problem, "values": value_problem},
    "NodeSelectorRequirement": {"key": key_problem},
    "PodAffinityTerm": {"topologyKey": key_problem},
    "PodReadinessGate": {"conditionType": key_problem},
    "PodSchedulingGate": {"name": key_problem},
    "PodSpec": {
        "hostname": _part,
        "nodeName": _domain,
        "priorityClassName": _domain,
        "runtimeClassName": _domain,
        "serviceAccountName": _domain,
        "subdomain": _part,
    },
    "PodDNSConfig": {"searches": _search},
    "SecretEnvSource": {"name": _domain},
    "SecretKeySelector": {"key": _entry, "name": _domain},
    "ServiceAccountTokenProjection": {"path": _new_file},
    "Sysctl": {"name": _sysctl},
    "TCPSocketAction": {"port": _port},
    "Toleration": {"key": key_problem, "value": value_problem},
    "TopologySpreadConstraint": {"matchLabelKeys": key_problem, "topologyKey": key_problem},
    "Volume": {"name": _part},
    "VolumeMount": {"subPath": _relative},
}
# Maps whose keys and values are those of labels.
_LABELS: Mapping[str, str] = {"LabelSelector": "matchLabels", "PodSpec": "nodeSelector"}


def find_broken_forms(now: Document, type_name: str) -> Iterator[Mistake]:
    """The texts of a structure that have another form than the API server takes; an empty one stands for none."""
    for name, form in _FORMS.get(type_name, {}).items():
        value = now.get(name)
        for place, text in _texts(value):
            if text and (problem := form(text)):
                yield f".{name}{place}", problem
    if (name := _LABELS.get(type_name, "")) and isinstance(now.get(name), Mapping):
        for key, value in now[name].items():
            if problem := key_problem(key) or value_problem(str(value)):
                yield f".{name}.{key}", problem


# What the downward API knows: of a variable, and of a file.
_OF_ENV = (
    "metadata.name",
    "metadata.namespace",
    "metadata.uid",
    "spec.nodeName",
    "spec.serviceAccountName",
    "status.hostIP",
    "status.hostIPs",
    "status.podIP",
    "status.podIPs",
)
_OF_FILES = ("metadata.annotations", "metadata.labels", "metadata.name", "metadata.namespace", "metadata.uid")
_AMOUNTS = tuple(f"{part}.{name}" for part in ("limits", "requests") for name in ("cpu", "ephemeral-storage", "memory"))


def find_broken_references(now: Document, type_name: str) -> Iterator[Mistake]:
    """What a variable or a file asks of the downward API and that does not have."""
    if type_name not in ("DownwardAPIVolumeFile", "EnvVarSource"):
        return
    field, amount = now.get("fieldRef") or {}, now.get("resourceFieldRef") or {}
    known = _OF_ENV if type_name == "EnvVarSource" else _OF_FILES
    if (path := field.get("fieldPath")) and path not in known:
        subscript = _SUBSCRIPT.fullmatch(path)
        problem = key_problem(subscript["key"].lower()) if subscript else unknown_choice("", path, known).message
        if problem:
            yield ".fieldRef.fieldPath", problem
    name = amount.get("resource")
    if name and name not in _AMOUNTS and not name.startswith(("limits.hugepages-", "requests.hugepages-")):
        yield ".resourceFieldRef.resource", unknown_choice("", name, _AMOUNTS).message
    if amount and type_name == "DownwardAPIVolumeFile" and not amount.get("containerName"):
        yield ".resourceFieldRef", "containerName is needed"


def _texts(value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield "", value
    elif isinstance(value, list):
        yield from ((f"[{index}]", text) for index, text in enumerate(value) if isinstance(text, str))
