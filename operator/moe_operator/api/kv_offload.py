"""Section `spec.engine.kvOffload`: where an engine keeps KV blocks that its GPUs have no room for."""

from collections.abc import Iterable
from typing import Annotated

from pydantic import Field

from moe_operator.api.section import Section
from moe_operator.api.units import QuantityBetween, quantity_value

_LEAST, _MOST = "64Mi", "100Ti"


class KvOffload(Section):
    """A second tier of the KV cache: prefixes that the GPUs dropped are read back instead of computed anew."""

    cpu: Annotated[str, QuantityBetween(_LEAST, _MOST, "64Gi")] = Field(
        description="Memory of the host that KV blocks take in one pod of a replica (bytes); the data-parallel ranks "
        "of the pod have equal parts. It lies in /dev/shm, beside `resources.sharedMemory`, and is a part of "
        "`resources.memory`; where that is absent the pod requests this much.",
    )

    @property
    def cpu_bytes(self) -> int:
        """Memory of the host in one pod, in bytes."""
        return int(quantity_value(self.cpu))

    def fits(self, memories: Iterable[str | None]) -> bool:
        """Whether each of these memories of a pod has room for more than the tier; None is no limit."""
        return all(memory is None or self.cpu_bytes < quantity_value(memory) for memory in memories)
