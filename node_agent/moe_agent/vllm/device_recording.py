"""`RoutingRecorder` for ranks whose routing lies in a device's memory: the same counts, made there by `moe_kernels`.

A captured graph replays what its routers did when it was recorded, so `capture` does one thing alone, which a graph can
replay: it copies the ids to where they always lie. The counts are made after the pass.
"""

import numpy as np
import torch
from moe_kernels.co_activation import add_co_activation
from moe_kernels.expert_load import add_expert_load

from moe_agent.experts.recording import MOST_PAIR_CELLS, Counted


class DeviceRecorder:
    """See the module.

    Args:
        layers: MoE layers.
        experts: logical experts of a layer.
        most_tokens: most tokens of a pass, padded ones included.
        top_k: experts of a token.
        device: where the routing lies.
        pairs_every: the pairs of each so many passes are counted.
    """

    def __init__(
        self, layers: int, experts: int, most_tokens: int, top_k: int, device: torch.device, pairs_every: int = 8
    ) -> None:
        self.on = False
        self._pairs_every = pairs_every
        self._passes = self._pair_passes = 0
        self._ids = torch.zeros((layers, most_tokens, top_k), dtype=torch.int32, device=device)
        self._tokens = torch.zeros((1, layers, experts), dtype=torch.int64, device=device)
        self.keeps_pairs = layers > 1 and (layers - 1) * experts * experts <= MOST_PAIR_CELLS
        pairs = (layers - 1 if self.keeps_pairs else 0, experts, experts)
        self._pairs = torch.zeros(pairs, dtype=torch.int64, device=device)

    def capture(self, layer: int, ids: torch.Tensor) -> None:
        """Copies the logical ids `[token, place]` of a layer, also when switched off: a graph knows no switches."""
        most = self._ids.shape[1]
        self._ids[layer, : ids.shape[0]].copy_(ids[:most])

    def end_pass(self, real_tokens: int) -> None:
        """Counts the pass that has ended, of which the first `real_tokens` tokens are real; 0 for a dummy."""
        if not self.on or real_tokens == 0:
            return
        add_expert_load(self._tokens, self._ids, real_tokens)
        self._passes += 1
        if self.keeps_pairs and self._passes % self._pairs_every == 0:
            add_co_activation(self._pairs, self._ids[:-1], self._ids[1:], real_tokens)
            self._pair_passes += 1

    def take(self) -> Counted:
        """What was counted since the last call, and forgets it."""
        counted = Counted(
            tokens=self._tokens[0].cpu().numpy().astype(np.int64),
            pairs=self._pairs.cpu().numpy().astype(np.int64),
            pair_passes=self._pair_passes,
        )
        self._tokens.zero_()
        self._pairs.zero_()
        self._pair_passes = 0
        return counted
