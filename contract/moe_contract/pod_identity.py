"""Which pod a process runs in, as the pod's own environment says it.

The operator's plan sets the variables in the pods of engines and gateways (downward API), their states repeat the
values, and the operator compares them with the pod that it meant to ask: an address may belong to another pod by now.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

NAME_VARIABLE, UID_VARIABLE = "MOESERVING_POD_NAME", "MOESERVING_POD_UID"
_FIELDS = {NAME_VARIABLE: "metadata.name", UID_VARIABLE: "metadata.uid"}


@dataclass(frozen=True, slots=True, kw_only=True)
class PodIdentity:
    """The pod of an agent or a gateway; empty outside of a cluster and in builds that do not report it.

    Attributes:
        name: of the pod.
        uid: of the pod, which no other pod ever has.
    """

    name: str = ""
    uid: str = ""


NO_POD = PodIdentity()


def read_identity(environment: Mapping[str, str]) -> PodIdentity:
    """The identity in a process's environment; empty values where a variable is not set."""
    return PodIdentity(name=environment.get(NAME_VARIABLE, ""), uid=environment.get(UID_VARIABLE, ""))


def identity_variables() -> list[dict[str, Any]]:
    """The entries of a container's `env` from which `read_identity` reads."""
    return [{"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}} for name, path in _FIELDS.items()]
