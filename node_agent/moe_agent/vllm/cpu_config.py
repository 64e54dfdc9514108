"""The one repair of the CPU build that the engine's first process needs too: its configuration admits a balancer.

Beside `cpu_experts.py`, which has the others, because that one loads all of vLLM's model runner.
"""

from typing import Any

import vllm.config.parallel

from moe_agent.vllm.version import replace_attribute


class BalancingPlatform:
    """The platform as the parallel configuration sees it: one of those for which it admits a balancer."""

    def __init__(self, platform: Any) -> None:
        self._platform = platform

    def __getattr__(self, name: str) -> Any:
        return getattr(self._platform, name)

    def is_xpu(self) -> bool:
        return True


def allow_balancer() -> None:
    """The check asks for CUDA, ROCm or XPU; what else it asks for stays."""
    seen = BalancingPlatform(vllm.config.parallel.current_platform)  # type: ignore[attr-defined]
    replace_attribute(vllm.config.parallel, "current_platform", seen)
