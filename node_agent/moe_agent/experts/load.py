"""Recorded load of an expert group: what ranks report, the sliding window that decisions read, and affinity on request.

Owned by the controller on the group's first rank. Counts of n steps weigh `exp(-m / window_steps)` after m further
steps, so that a steady load gives exactly its tokens a step, whatever the window.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from moe_contract.experts_state import AffinityPart, PairPart
from moe_scheduling.expert.decision import (
    Balance,
    ExpertCosts,
    ExpertLoad,
    Placement,
    StepSizes,
    count_moves,
    score_placement,
)
from numpy.typing import NDArray

from moe_agent.experts.directive import GroupShape

Floats = NDArray[np.float64]
Slots = NDArray[np.int64]
Counts = NDArray[np.integer[Any]]

# A balance has no unit, so it needs no costs.
_NO_COSTS = ExpertCosts(token_s=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankLoadReport:
    """What a rank reports in a gather.

    Attributes:
        tokens: [layer, expert], tokens recorded since the last gather.
        passes: forward passes that were recorded; the same on all ranks.
        checksum: of the placement that the rank held when it was asked.
    """

    tokens: Counts
    passes: int
    checksum: int


class LoadWindow:
    """Sliding window over the recorded load, exponentially weighted.

    Args:
        sources: ranks that have tokens of their own.
        layers: MoE layers.
        experts: logical experts of a layer.
    """

    def __init__(self, sources: int, layers: int, experts: int) -> None:
        self._tokens: Floats = np.zeros((sources, layers, experts))
        self._steps = 0.0

    def clear(self) -> None:
        """Forgets the load recorded so far."""
        self._tokens[...] = 0.0
        self._steps = 0.0

    @property
    def steps(self) -> float:
        """Weighted number of steps in the window."""
        return self._steps

    def add(self, counted: Sequence[Counts], passes: int, steps: int, window_steps: int) -> None:
        """Adds what each source counted.

        Args:
            counted: [layer, expert] for each source.
            passes: passes that were recorded, at least 1.
            steps: passes since the last gather, recorded or not; older load loses weight by them.
            window_steps: length of the window.
        """
        kept = math.exp(-steps / window_steps)
        self._tokens *= kept
        for source, tokens in enumerate(counted):
            self._tokens[source] += tokens
        self._steps = self._steps * kept + passes

    def tokens_a_step(self) -> Floats:
        """Returns [source, layer, expert], tokens a step, as a new array."""
        return self._tokens / (self._steps or 1.0)


def make_placement(table: Slots, shape: GroupShape, version: int = 0) -> Placement:
    """Returns `table[layer, slot]` of a group as a placement."""
    return Placement(physical_to_logical=table, ranks=shape.ranks, nodes=shape.nodes, version=version)


def make_load(tokens: Floats, steps: float, sizes: StepSizes | None = None) -> ExpertLoad:
    """Returns `tokens[source, layer, expert]` a step, recorded over `steps` of these sizes, as a load."""
    return ExpertLoad(tokens=tokens, steps=max(1, round(steps)), sizes=sizes)


def measure_balance(tokens: Floats, table: Slots, shape: GroupShape) -> Balance:
    """Returns the balance of a placement under `tokens[source, layer, expert]`; without tokens it is 1."""
    _, balance = score_placement(make_load(tokens, 1.0), make_placement(table, shape), _NO_COSTS)
    return balance


def count_moves_by_layer(before: Slots, after: Slots, shape: GroupShape) -> list[int]:
    """Returns the experts of each layer that a change moves to another rank."""
    moves: list[int] = count_moves(make_placement(before, shape), make_placement(after, shape)).tolist()
    return moves


# --- inter-layer affinity, on request

# Recorded passes and the pairs that are shown.
AFFINITY_PASSES = 64
STRONGEST = 20


class Affinity:
    """Which experts of neighbouring layers the same tokens take, counted over `AFFINITY_PASSES` passes of one rank.

    No decision reads it: vLLM returns every token to its own rank after each layer, so that nothing is gained by
    experts of neighbouring layers on one rank. It shows what an engine that left tokens in place could gain.
    """

    def __init__(self, layers: int, experts: int, version: int) -> None:
        self.version, self._experts = version, experts
        self._pairs = np.zeros((max(0, layers - 1), experts, experts), np.int32)
        self.passes = self.tokens = 0

    @property
    def is_due(self) -> bool:
        """Whether a summary is due: after the first pass, and when enough passes were counted."""
        return self.passes in (1, AFFINITY_PASSES)

    def add(self, chosen: Counts) -> None:
        """Counts one pass: `chosen[layer, token, place]`, the logical experts of this rank's real tokens."""
        size = self._experts**2
        for layer, (here, following) in enumerate(pairwise(chosen)):
            cells = here.astype(np.int64)[:, :, None] * self._experts + following[:, None, :]
            self._pairs[layer] += np.bincount(cells.ravel(), minlength=size).reshape(self._experts, -1)
        self.passes += 1
        self.tokens += int(chosen.shape[1])

    def summarise(self) -> AffinityPart:
        """Returns the counts and the pairs that exceed chance by most tokens, as the agent publishes them."""
        total = self._pairs.sum(axis=(1, 2), keepdims=True)
        chance = self._pairs.sum(2, keepdims=True) * self._pairs.sum(1, keepdims=True) / np.maximum(total, 1)
        order = np.argsort((chance - self._pairs).ravel(), kind="stable")[:STRONGEST]
        strongest = tuple(
            PairPart(
                layer=int(layer),
                expert=int(expert),
                next=int(following),
                tokens=int(self._pairs[layer, expert, following]),
                over_chance=float(self._pairs[layer, expert, following] / chance[layer, expert, following]),
            )
            for layer, expert, following in zip(*np.unravel_index(order, self._pairs.shape), strict=True)
            if self._pairs[layer, expert, following]
        )
        return AffinityPart(
            directive=self.version,
            passes=self.passes,
            wanted_passes=AFFINITY_PASSES,
            tokens=self.tokens,
            strongest=strongest,
        )
