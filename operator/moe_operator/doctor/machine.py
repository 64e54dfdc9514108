"""Whether `moeserving up` can serve on this machine: Python, packages, vLLM with its device, memory."""

import sys
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec

import psutil
from moe_contract.input_errors import InvalidInput

from moe_operator.doctor.check import Check, note, ok, problem
from moe_operator.doctor.installed_vllm import find_describe
from moe_operator.local.machine import count_cpus, find_gpus

# As `requires-python`.
LEAST_PYTHON, BEFORE_PYTHON = (3, 11), (3, 14)
# Below it the smallest models start, and few others.
LITTLE_MEMORY_BYTES = 4 << 30
# Of each extra that `up` needs, beside that of this command, a package.
PACKAGES = {"gateway": "httptools", "agent": "prometheus_client"}


def check_machine() -> list[Check]:
    """All checks of this machine, in order."""
    memory = psutil.virtual_memory()
    return [
        check_python(sys.version_info[:3]),
        check_packages({extra for extra, package in PACKAGES.items() if find_spec(package) is None}),
        check_vllm(find_describe()),
        check_gpus(find_gpus(), count_cpus()),
        check_memory(memory.available, memory.total),
    ]


def check_python(version: Sequence[int]) -> Check:
    """Whether this Python is supported."""
    name, found = "Python", ".".join(map(str, version))
    if LEAST_PYTHON <= tuple(version[:2]) < BEFORE_PYTHON:
        return ok(name, found)
    least, newest = (".".join(map(str, row)) for row in (LEAST_PYTHON, (BEFORE_PYTHON[0], BEFORE_PYTHON[1] - 1)))
    return problem(name, f"{found}; {least} to {newest} are supported", f"install moeserving with Python {newest}")


def check_packages(missing: Iterable[str]) -> Check:
    """Whether the extras are installed with which `up` starts an agent and a gateway."""
    if extras := ",".join(sorted(missing)):
        return problem("packages", f"extras are missing: {extras}", f"pip install 'moeserving[{extras}]'")
    return ok("packages", "those of `moeserving up` are installed")


def check_vllm(describe: Callable[[], str] | None) -> Check:
    """Whether the installed vLLM is a supported one that finds a device here.

    Args:
        describe: returns it in words or raises `InvalidInput`; None where the agent is not installed.
    """
    name, advice = "vLLM", "pip install 'moeserving[agent,gpu]', or 'moeserving[agent,cpu]' on a machine without a GPU"
    if describe is None:
        return problem(name, "the agent, which starts it, is not installed", advice)
    try:
        return ok(name, describe())
    except InvalidInput as error:
        return problem(name, str(error), advice)


def check_gpus(gpus: Sequence[str], cpus: int) -> Check:
    """The devices that engines can have; a build of vLLM that fits none of them is a problem of its own check."""
    if gpus:
        return ok("devices", f"{len(gpus)} GPUs, {cpus} CPUs")
    return ok("devices", f"no GPU that `nvidia-smi` shows, {cpus} CPUs; engines need `engine.runtime: vllm-cpu`")


def check_memory(available: int, total: int) -> Check:
    """Whether engines have memory (bytes)."""
    finding = f"{available / 2**30:.1f} of {total / 2**30:.1f} GiB are free"
    if available < LITTLE_MEMORY_BYTES:
        return note("memory", finding, "end other programs, or set a small `engine.resources.kvCacheMemory`")
    return ok("memory", finding)
