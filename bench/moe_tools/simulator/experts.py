"""How a model's tokens spread over the ranks of an expert group: what the slowest rank has to do, and what it costs.

A traffic is a share of the tokens for each layer and expert. With a placement it says how much more than the mean the
fullest rank of each layer gets: in each layer all ranks wait for that one, so a step takes as long as the sum over the
layers of their fullest ranks.

Pure and seeded. Placements are those of the expert layer (docs/interfaces.md): slots are numbered rank by rank, a
replicated expert shares its tokens evenly. They are made by the product's own `plan_experts`, by vLLM's own balancer,
or are vLLM's at the start.
"""

from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from moe_scheduling.expert.cost import ExpertCosts, ExpertLoad
from moe_scheduling.expert.decision import ExpertSettings, Stay, plan_experts
from moe_scheduling.expert.placement import Placement, initial_placement

# Rounds of decisions until a placement has settled; each moves a part of what a new one would.
_ROUNDS = 20
# Moves cost nothing here: only the placement that the decisions end with is compared.
_COSTS = ExpertCosts(token_s=1e-6)
_TOKENS_PER_STEP = 1000.0


class PlacementPolicy(StrEnum):
    """How experts lie on the ranks."""

    INITIAL = "initial"
    PLANNED = "planned"
    VLLM = "vllm"
    EVEN = "even"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementBalance:
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


def even_balance(ranks: int) -> PlacementBalance:
    """Returns the balance in which every rank has the same expert tokens."""
    return PlacementBalance(slowest=1.0, by_rank=(1.0,) * ranks)


def draw_traffic(*, layers: int, experts: int, spread: float, seed: int) -> np.ndarray:
    """Shares of the tokens by layer and expert, each layer summing to 1.

    Log-normal popularity: a `spread` of 0 is even, 0.6 gives the most popular of 128 experts about four times the mean.
    Uneven popularity is each layer's own, so that no rank is the fullest in all.
    """
    weights = np.random.default_rng(seed).lognormal(0.0, spread, (layers, experts))
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))


def place(shares: np.ndarray, policy: PlacementPolicy, *, ranks: int, nodes: int, redundant: int) -> Placement:
    """The placement that a policy comes to under a traffic `shares[layer, expert]` that lasts; `even` has none.

    Raises:
        ValueError: the slots do not divide among the ranks.
    """
    layers, experts = shares.shape
    placement = initial_placement(layers=layers, experts=experts, redundant=redundant, ranks=ranks, nodes=nodes)
    match policy:
        case PlacementPolicy.PLANNED:
            return _settle(shares, placement)
        case PlacementPolicy.VLLM:
            return _place_as_vllm(shares, placement)
        case _:
            return placement


def _settle(shares: np.ndarray, placement: Placement) -> Placement:
    """Returns the placement after repeated decisions on one load, until nothing moves."""
    load = ExpertLoad(tokens=shares[None] * _TOKENS_PER_STEP)
    history = None
    for _ in range(_ROUNDS):
        decision = plan_experts(load, placement, _COSTS, ExpertSettings(), history)
        if isinstance(decision, Stay):
            break
        placement, history = decision.placement, decision.history
    return placement


def _place_as_vllm(shares: np.ndarray, placement: Placement) -> Placement:
    import torch
    from vllm.distributed.eplb.policy.default import DefaultEplbPolicy

    placed = DefaultEplbPolicy.rebalance_experts(
        torch.from_numpy(shares * _TOKENS_PER_STEP),
        placement.slots,
        placement.nodes,
        placement.nodes,
        placement.ranks,
        torch.from_numpy(placement.physical_to_logical),
    )
    return Placement(physical_to_logical=placed.numpy(), ranks=placement.ranks, nodes=placement.nodes)


def balance_of(shares: np.ndarray, placement: Placement) -> PlacementBalance:
    """The balance of a traffic `shares[layer, expert]` under a placement.

    Raises:
        ValueError: an expert has no slot.
    """
    table, ranks = placement.physical_to_logical, placement.ranks
    layers = len(table)
    loads = np.empty((layers, ranks))
    for layer in range(layers):
        logical = table[layer]
        copies = np.bincount(logical, minlength=shares.shape[1])
        if not copies.all():
            raise ValueError(f"layer {layer}: expert {int(np.argmin(copies))} has no slot")
        loads[layer] = (shares[layer] / copies)[logical].reshape(ranks, -1).sum(axis=1) * ranks
    return PlacementBalance(
        slowest=float(loads.max(axis=1).mean()), by_rank=tuple(float(load) for load in loads.mean(axis=0))
    )
