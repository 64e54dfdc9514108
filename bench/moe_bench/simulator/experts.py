"""How a model's tokens spread over the ranks of an expert group: what the slowest rank has to do, and what it costs.

A traffic is a share of the tokens for each layer and expert. With a placement it says how much more than the mean the
fullest rank of each layer gets: in each layer all ranks wait for that one, so a step takes as long as the sum over the
layers of their fullest ranks.

Pure and seeded. `physical_to_logical[layer, slot]` is the placement of the expert layer (docs/interfaces.md): slots are
numbered rank by rank, a replicated expert shares its tokens evenly.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class Balance:
    """What a placement makes of a traffic.

    Attributes:
        slowest: tokens of each layer's fullest rank over the mean, mean over the layers; the expert time's factor.
        by_rank: tokens of each rank over the mean, mean over the layers.
    """

    slowest: float
    by_rank: tuple[float, ...]

    @property
    def worst(self) -> float:
        """Max / mean over ranks, as engines publish it."""
        return max(self.by_rank)


def even_balance(ranks: int) -> Balance:
    """Every rank the same."""
    return Balance(slowest=1.0, by_rank=(1.0,) * ranks)


def draw_traffic(*, layers: int, experts: int, spread: float, seed: int) -> np.ndarray:
    """Shares of the tokens by layer and expert, each layer summing to 1.

    Log-normal popularity: a `spread` of 0 is even, 0.6 gives the most popular of 128 experts about four times the mean.
    Uneven popularity is each layer's own, so that no rank is the fullest in all.
    """
    weights = np.random.default_rng(seed).lognormal(0.0, spread, (layers, experts))
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))


def default_placement(*, layers: int, experts: int) -> np.ndarray:
    """Experts in their own order, as vLLM places them before any balancing."""
    return np.tile(np.arange(experts), (layers, 1))


def balance_of(shares: np.ndarray, physical_to_logical: np.ndarray, ranks: int) -> Balance:
    """The balance of a traffic `shares[layer, expert]` under a placement whose slots divide evenly among the ranks.

    Raises:
        ValueError: they do not, or an expert has no slot.
    """
    layers, slots = physical_to_logical.shape
    if slots % ranks:
        raise ValueError(f"{slots} slots do not divide among {ranks} ranks")
    loads = np.empty((layers, ranks))
    for layer in range(layers):
        logical = physical_to_logical[layer]
        copies = np.bincount(logical, minlength=shares.shape[1])
        if not copies.all():
            raise ValueError(f"layer {layer}: expert {int(np.argmin(copies))} has no slot")
        loads[layer] = (shares[layer] / copies)[logical].reshape(ranks, -1).sum(axis=1) * ranks
    return Balance(slowest=float(loads.max(axis=1).mean()), by_rank=tuple(float(load) for load in loads.mean(axis=0)))
