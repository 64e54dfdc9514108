"""What this machine has: CPUs, memory, GPUs and free ports."""

import os
import shutil
import subprocess
from collections.abc import Iterable
from contextlib import ExitStack

import psutil
from moe_contract.addresses import bind_socket, is_bindable, loopback

HOST = loopback()
_ASK_TIMEOUT_S = 20.0


def count_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0))


def memory_bytes() -> int:
    """Total memory of this machine in bytes."""
    return int(psutil.virtual_memory().total)


def find_gpus() -> tuple[str, ...]:
    """The GPUs that may be used, as CUDA_VISIBLE_DEVICES names them; none where its tool is absent or fails."""
    indices = query_gpus("index")
    return select_gpus(indices, os.environ.get("CUDA_VISIBLE_DEVICES")) if indices else ()


def query_gpus(field: str) -> tuple[str, ...]:
    """What NVIDIA's tool says of each GPU, such as its `index` or its `name`; nothing where it is absent or fails."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ()
    command = [tool, f"--query-gpu={field}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_ASK_TIMEOUT_S)
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(line.strip() for line in answer.stdout.splitlines() if line.strip())


def select_gpus(indices: Iterable[str], visible: str | None) -> tuple[str, ...]:
    """Those of the machine's GPUs that CUDA_VISIBLE_DEVICES leaves; None leaves all."""
    if visible is None:
        return tuple(indices)
    return tuple(name for part in visible.split(",") if (name := part.strip()) and name != "-1")


def is_port_free(port: int) -> bool:
    """Whether a server could listen there now."""
    return is_bindable(HOST, port)


def find_free_ranges(number: int, width: int, without: Iterable[int] = ()) -> tuple[int, ...]:
    """The first of `width` ports in a row on which nobody listens now, `number` times, none of them twice."""
    taken = set(without)
    found: list[int] = []
    while len(found) < number:
        first = find_free_ports(1, taken)[0]
        row = range(first, first + width)
        if taken.isdisjoint(row) and all(map(is_port_free, row)):
            found.append(first)
        taken |= {*row}
    return tuple(found)


def find_free_ports(number: int, without: Iterable[int] = ()) -> tuple[int, ...]:
    """Different ports on which nobody listens now."""
    taken = set(without)
    found: list[int] = []
    with ExitStack() as stack:
        while len(found) < number:
            probe = stack.enter_context(bind_socket(HOST, 0))
            if (port := int(probe.getsockname()[1])) not in taken:
                found.append(port)
    return tuple(found)
