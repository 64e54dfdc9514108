"""The memory of the host that offloaded KV blocks take: of one rank, of a pod and of a machine. Pure.

vLLM lays the tier of each data-parallel rank into /dev/shm, at its full size from the start.
"""

from collections.abc import Iterator

from moe_contract.input_errors import InputError

from moe_operator.api.resource import MoEServing
from moe_operator.api.units import canonical_quantity, quantity_value, render_bytes


def rank_bytes(resource: MoEServing) -> int | None:
    """Returns the tier of one data-parallel rank, in bytes; None where nothing is offloaded."""
    engine = resource.spec.engine
    if engine.kv_offload is None:
        return None
    return engine.kv_offload.cpu_bytes * engine.parallelism.nodes // engine.parallelism.data


def shared_memory(resource: MoEServing) -> str:
    """Returns the most that /dev/shm of a pod may take: what the engine itself needs, and the tier."""
    engine = resource.spec.engine
    own = engine.resources.shared_memory
    if engine.kv_offload is None:
        return canonical_quantity(own)
    return canonical_quantity(render_bytes(int(quantity_value(own)) + engine.kv_offload.cpu_bytes))


def memory_request(resource: MoEServing) -> str | None:
    """Returns the memory that a pod requests where `resources.memory` is absent; None: none."""
    offload = resource.spec.engine.kv_offload
    return None if offload is None else canonical_quantity(offload.cpu)


def check_machine_memory(resource: MoEServing, memory_bytes: int) -> Iterator[InputError]:
    """Yields why the tiers of all engines do not fit into the memory of one machine."""
    engine = resource.spec.engine
    if engine.kv_offload is not None and engine.kv_offload.cpu_bytes * engine.count >= memory_bytes:
        needs = f"{engine.count} x {engine.kv_offload.cpu}"
        has = f"{memory_bytes / 2**30:.1f}Gi"
        yield InputError("spec.engine.kvOffload.cpu", f"needs {needs} and more, the machine has {has}")
