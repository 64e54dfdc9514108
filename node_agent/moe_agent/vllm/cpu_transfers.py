"""Two repairs of the KV connector on CPUs, applied in an engine's core and workers; vLLM 0.32, NIXL 1.5.

Without them it works, and takes processors: vLLM pins the thread that computes to the last processor of each NUMA node,
which all engines of a machine then share (and which fails where a cpuset lacks that processor, vLLM #58033), and NIXL's
Python interface has its progress thread poll without a pause, which takes a processor from each engine, idle or not.
"""

from typing import Any

from moe_agent.vllm.version import replace_attribute

# Pause of the progress thread between two looks, in microseconds.
PROGRESS_PAUSE_US = 1000


def repair_cpu_transfers() -> None:
    """Applies both repairs in this process, before the connector is made."""
    from vllm.platforms import current_platform

    replace_attribute(type(current_platform), "discover_numa_topology", classmethod(lambda cls: []))
    import nixl  # type: ignore[import-untyped]

    bindings: Any = nixl._bindings
    replace_attribute(bindings, "nixlAgentConfig", with_pause(bindings.nixlAgentConfig))


def with_pause(config: type) -> type:
    """NIXL's configuration of an agent in which a pause of 0, which its Python interface sets, becomes a short one."""
    plain: Any = config.pthrDelay  # type: ignore[attr-defined]

    class PausingConfig(config):  # type: ignore[misc]
        @property
        def pthrDelay(self) -> int:
            return int(plain.__get__(self))

        @pthrDelay.setter
        def pthrDelay(self, value: int) -> None:
            plain.__set__(self, value or PROGRESS_PAUSE_US)

    return PausingConfig
