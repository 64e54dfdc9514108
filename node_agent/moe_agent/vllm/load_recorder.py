"""The recorder of one rank's expert load: switches vLLM's counters on and off, and takes what they counted.

The counts are made by the kernel that maps experts to slots (`moe_kernels.expert_load`), which runs in each pass anyway
and adds to `expert_load_pass` of vLLM's balancer: [layer, slot], of which the first columns are logical experts here.
Nothing is done on the host in a pass of a GPU engine, also inside a CUDA graph.

Invariants: exact; padded tokens and dummy passes count nothing.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class LoadRecorder:
    """Counters of one rank.

    Args:
        model_state: vLLM's state of the model, with `expert_load_pass`.
        enabled: bool scalar that vLLM's routers read.
        experts: logical experts of a layer.
    """

    def __init__(self, model_state: Any, enabled: Tensor, experts: int) -> None:
        self._model_state, self._enabled, self._experts = model_state, enabled, experts
        self.on = False
        self._passes = 0
        enabled.fill_(False)

    def switch(self, on: bool) -> None:
        """Switches recording; earlier counts are dropped when it is switched on."""
        if on == self.on:
            return
        if on:
            self._counters().zero_()
            self._passes = 0
        self.on = on
        self._enabled.fill_(on)

    def end_pass(self) -> None:
        """Counts a pass of the group, whether this rank had tokens in it or not."""
        self._passes += self.on

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Records nothing within the block: its pass has no real tokens."""
        self._enabled.fill_(False)
        yield
        self._enabled.fill_(self.on)

    def take(self) -> tuple[Tensor, int]:
        """Returns the counts since the last call, and the passes since then.

        The first is int32 [layers, experts] in the host's memory. The copy from a GPU may still be under way; it is
        complete before the next pass ends.
        """
        counters, passes = self._counters(), self._passes
        # A copy in any case: a CPU's own tensor would be zeroed below.
        taken = torch.empty(counters.shape, dtype=counters.dtype, pin_memory=counters.is_cuda)
        taken.copy_(counters, non_blocking=True)
        counters.zero_()
        self._passes = 0
        return taken, passes

    def _counters(self) -> Tensor:
        counters: Tensor = self._model_state.expert_load_pass[:, : self._experts]
        return counters
