"""Counts of one rank's routing: tokens for each (layer, expert), and pairs of experts in neighbouring layers.

Used by the worker of each rank, once a forward pass. A router hands over the logical ids of its own tokens, layer by
layer, before they are mapped to slots; the counts are made when the pass has ended, when it is known whether it carried
real tokens and how many. On a CPU the tensors' memory is read where it is.

Invariants: exact; padded tokens and passes without real tokens (dummies that keep ranks in step) count nothing;
switched off it keeps nothing.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.integer[Any]]
Counts = NDArray[np.int64]

# Cells of the pairs that a rank may keep (8 MiB); a larger model records none.
MOST_PAIR_CELLS = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Counted:
    """What was counted since the last time: `tokens[layer, expert]`, `pairs[layer, expert, next]`, and the passes.

    `pairs` has no layer where none are recorded; `pair_passes` are those whose pairs were counted.
    """

    tokens: Counts
    pairs: Counts
    pair_passes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a rank answers to a gather: its counts, and the checksum of the placement that it holds."""

    counted: Counted
    checksum: int


class RoutingRecorder:
    """See the module.

    Args:
        layers: MoE layers.
        experts: logical experts of a layer.
        pairs_every: the pairs of each so many passes are counted.
    """

    def __init__(self, layers: int, experts: int, pairs_every: int = 8) -> None:
        self._layers, self._experts, self._pairs_every = layers, experts, pairs_every
        self.keeps_pairs = layers > 1 and (layers - 1) * experts * experts <= MOST_PAIR_CELLS
        self.on = False
        self._ids: list[Ids | None] = [None] * layers
        self._passes = 0
        self._layer_offsets = (np.arange(layers, dtype=np.int64) * experts)[:, None, None]
        self._pair_offsets = (np.arange(layers - 1, dtype=np.int64) * experts * experts)[:, None, None]
        self._clear()

    def capture(self, layer: int, ids: Ids) -> None:
        """Notes the logical ids `[token, place]` that the router of `layer` chose in the pass under way."""
        if self.on:
            self._ids[layer] = ids

    def end_pass(self, real_tokens: int) -> None:
        """Counts the pass that has ended, of which the first `real_tokens` tokens are real; 0 for a dummy."""
        ids, self._ids = self._ids, [None] * self._layers
        if not self.on or real_tokens == 0 or any(layer is None for layer in ids):
            return
        chosen = np.stack([layer[:real_tokens] for layer in ids if layer is not None]).astype(np.int64)
        cells = (chosen + self._layer_offsets).ravel()
        self._tokens += np.bincount(cells, minlength=self._tokens.size)
        self._passes += 1
        if self.keeps_pairs and self._passes % self._pairs_every == 0:
            self._count_pairs(chosen)

    def _count_pairs(self, chosen: Counts) -> None:
        """Each expert of a token in a layer pairs with each of its experts in the next."""
        pairs = chosen[:-1, :, :, None] * self._experts + chosen[1:, :, None, :]
        cells = (pairs.reshape(self._layers - 1, -1, 1) + self._pair_offsets).ravel()
        self._pairs += np.bincount(cells, minlength=self._pairs.size)
        self._pair_passes += 1

    def take(self) -> Counted:
        """What was counted since the last call, and forgets it."""
        counted = Counted(
            tokens=self._tokens.reshape(self._layers, self._experts),
            pairs=self._pairs.reshape(-1, self._experts, self._experts),
            pair_passes=self._pair_passes,
        )
        self._clear()
        return counted

    def _clear(self) -> None:
        self._tokens = np.zeros(self._layers * self._experts, np.int64)
        cells = (self._layers - 1) * self._experts**2 if self.keeps_pairs else 0
        self._pairs = np.zeros(cells, np.int64)
        self._pair_passes = 0
