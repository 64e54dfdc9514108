"""What an engine finds around it in its pod, whoever its user is: own name and address, writable folders, DNS. Pure.

A container may run as any user, with no entry in its passwd file, and on a root file system that is read-only: all that
an engine and its libraries write lies on volumes.
"""

from collections.abc import Mapping
from typing import Any

from moe_contract.engine_process import POD_IP_VARIABLE
from moe_contract.pod_identity import identity_variables

HOME_DIR, TEMPORARY_DIR = "/var/lib/moeserving/home", "/tmp"
HOME_VOLUME, TEMPORARY_VOLUME = "home", "tmp"
USER = "moeserving"
_CACHE_DIR = f"{HOME_DIR}/.cache"
# The variables of programs that follow HOME stand here too, for an image may have set them to folders of its own user.
# HF_HOME does not: an image may have a model there; where it is not set the hub's files are in XDG_CACHE_HOME.
# USER, because torch asks for the user's name, which a user without an entry in the passwd file does not have.
_CACHE_VARIABLES = {
    "HOME": HOME_DIR,
    "USER": USER,
    "XDG_CACHE_HOME": _CACHE_DIR,
    "XDG_CONFIG_HOME": f"{HOME_DIR}/.config",
    "VLLM_CACHE_ROOT": f"{_CACHE_DIR}/vllm",
    "TRITON_CACHE_DIR": f"{_CACHE_DIR}/triton",
    "TORCHINDUCTOR_CACHE_DIR": f"{_CACHE_DIR}/torchinductor",
    "FLASHINFER_WORKSPACE_BASE": HOME_DIR,
}


def build_own_pod_variables() -> list[dict[str, Any]]:
    """Name, uid and address of the pod, which its host name does not tell on the host's network."""
    address = {"name": POD_IP_VARIABLE, "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}
    return [*identity_variables(), address]


def build_cache_variables() -> list[dict[str, Any]]:
    """Home and caches on the volume of `build_writable_volumes`."""
    return [{"name": name, "value": value} for name, value in _CACHE_VARIABLES.items()]


def build_writable_volumes() -> list[dict[str, Any]]:
    """Volumes for home and temporary files, which outlive a restart of the container but not the pod."""
    return [{"name": HOME_VOLUME, "emptyDir": {}}, {"name": TEMPORARY_VOLUME, "emptyDir": {}}]


def build_writable_mounts() -> list[dict[str, Any]]:
    """Where these volumes are in the container."""
    return [
        {"name": HOME_VOLUME, "mountPath": HOME_DIR},
        {"name": TEMPORARY_VOLUME, "mountPath": TEMPORARY_DIR},
    ]


def with_cluster_names(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The pod's spec with the cluster's DNS on the host's network too, where a pod otherwise has the node's."""
    if not spec.get("hostNetwork") or "dnsPolicy" in spec:
        return dict(spec)
    return {**spec, "dnsPolicy": "ClusterFirstWithHostNet"}
