"""Cost model of an expert placement: seconds of one engine step, by term.

The papers weigh balance, traffic and moves by hand-set factors alpha, beta, gamma (Gimbal, arXiv 2606.15177). Here each
term is a time from a measured coefficient, so no weights are needed.

- Load: a layer of an expert group ends with its slowest rank. A rank reads the weights of the experts that its tokens
  meet and computes their tokens (`layer_time.py`); where the time to read an expert is not known it takes `token_s`
  times its tokens. Replicas of an expert share its tokens evenly, because vLLM picks the replica by
  the token's position.
- Traffic: each token travels from the rank that has its request to the rank of its expert and back. The links of all
  ranks work in parallel, so the time is that of the mean rank.

Which experts the same token takes in neighbouring layers has no term: vLLM returns every token to its own rank after
each layer, so that the next layer's traffic does not depend on it.
"""

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from moe_scheduling.expert.idle_slots import serving_copies, serving_slots
from moe_scheduling.expert.layer_time import MEAN_STEP, LayerTime, StepSizes
from moe_scheduling.expert.placement import Flags, Floats, Placement, Singles

# Size of a matrix product (m * n * k) up to which numpy's BLAS uses one thread. On a busy machine waiting for its other
# threads takes many times what they save.
_ONE_THREAD = 2**18
# A token is sent to its expert, and the result is sent back.
_DIRECTIONS = 2


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExpertLoad:
    """Recorded load of the experts, in tokens a step.

    Attributes:
        tokens: [source, layer, expert], tokens a step that the data-parallel rank `source` sends to a logical expert.
            The sources divide the ranks of the group evenly among themselves, in order; a single source stands for
            all ranks, and then the traffic is unknown and counted as 0.
        steps: engine steps in the recorded window.
        sizes: how often steps are small and large; None: all have the mean size.
        by_expert: [layer, expert], tokens a step of all sources.

    Raises:
        ValueError: a shape does not fit, or a value is negative or not finite.
    """

    tokens: Floats
    steps: int = 1
    sizes: StepSizes | None = None
    by_expert: Floats = field(init=False)

    def __post_init__(self) -> None:
        tokens = _check_tokens(self.tokens)
        object.__setattr__(self, "tokens", tokens)
        object.__setattr__(self, "by_expert", tokens.sum(0))
        if self.steps < 1:
            raise ValueError("steps must be at least 1")

    @property
    def layers(self) -> int:
        """Number of layers with experts."""
        return int(self.tokens.shape[1])

    @property
    def experts(self) -> int:
        """Number of logical experts in a layer."""
        return int(self.tokens.shape[2])


def _check_tokens(values: npt.ArrayLike) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 3 or not array.size:
        raise ValueError("tokens must have 3 dimensions and not be empty")
    if not np.isfinite(array).all():
        raise ValueError("tokens must be finite")
    if (array < 0).any():
        raise ValueError("tokens must not be negative")
    return array


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertCosts:
    """Coefficients of the cost model in seconds, measured or given.

    Attributes:
        token_s: work of a rank on one token of one expert.
        expert_s: one expert more that got a token, of which most is reading its weights; 0: not known, and then
            `token_s` alone counts.
        remote_token_s: transfer of one token, in one direction, between two ranks of a node.
        internode_token_s: transfer of one token, in one direction, between two nodes.
        move_s: time that serving stands still for one expert moved to a rank.
        horizon_steps: engine steps until the next decision, over which a move has to pay.

    Raises:
        ValueError: a value is negative or not finite.
    """

    token_s: float
    expert_s: float = 0.0
    remote_token_s: float = 0.0
    internode_token_s: float = 0.0
    move_s: float = 0.0
    horizon_steps: int = 3000

    def __post_init__(self) -> None:
        for name in ("token_s", "expert_s", "remote_token_s", "internode_token_s", "move_s"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least 0 and finite")
        if self.horizon_steps < 1:
            raise ValueError("horizon_steps must be at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class CostTerms:
    """Cost of a placement: seconds of one engine step over all layers.

    Attributes:
        load_s: sum over the layers of the busiest rank's work.
        balanced_s: the same if all ranks had equal work; the lower bound of `load_s`.
        traffic_s: transfer of tokens to other ranks and back.
    """

    load_s: float
    balanced_s: float
    traffic_s: float

    @property
    def total_s(self) -> float:
        """Seconds of one step; placements are compared by it."""
        return self.load_s + self.traffic_s


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Balance:
    """How evenly the ranks are loaded, as ratios; 1 is even.

    Attributes:
        mean: busiest rank over the mean rank, mean over the layers weighted by their tokens.
        worst: that of the worst layer.
        by_layer: [layer], that of each layer; 1 where a layer has no tokens.
        by_rank: [rank], a rank's tokens over all layers, over the mean rank's.
        remote_fraction: part of the tokens that leave their source's ranks.
        internode_fraction: part of the tokens that leave their source's node.
    """

    mean: float
    worst: float
    by_layer: Floats
    by_rank: Floats
    remote_fraction: float
    internode_fraction: float


def score_placement(load: ExpertLoad, placement: Placement, costs: ExpertCosts) -> tuple[CostTerms, Balance]:
    """The cost of one engine step under a load, and the balance of the ranks.

    Raises:
        ValueError: the sources do not divide the ranks evenly.
    """
    ranks, arrivals = load_of_ranks(load, placement), _count_arrivals(load, placement)
    load_s, balanced_s = _load_s(load, placement, costs, ranks)
    terms = CostTerms(
        load_s=load_s,
        balanced_s=balanced_s,
        traffic_s=float(arrivals.traffic_s(costs).sum()) / placement.ranks,
    )
    mean = ranks.mean(1)
    by_layer = np.divide(ranks.max(1), mean, out=np.ones_like(mean), where=mean > 0)
    total, by_rank = float(mean.sum()), ranks.sum(0)
    balance = Balance(
        mean=float((by_layer * mean).sum() / total) if total else 1.0,
        worst=float(by_layer.max()),
        by_layer=by_layer,
        by_rank=by_rank / by_rank.mean() if total else np.ones_like(by_rank),
        remote_fraction=arrivals.outside(arrivals.in_rank),
        internode_fraction=arrivals.outside(arrivals.in_node),
    )
    return terms, balance


def seconds_of_layers(load: ExpertLoad, placement: Placement, costs: ExpertCosts) -> Floats:
    """Returns the seconds of each layer in the mean step, [layer]: its busiest rank and its traffic.

    Raises:
        ValueError: the sources do not divide the ranks evenly.
    """
    traffic_s = _count_arrivals(load, placement).traffic_s(costs) / placement.ranks
    if not costs.expert_s:
        return np.asarray(load_of_ranks(load, placement).max(1) * costs.token_s + traffic_s)
    times = layer_time(load, costs)
    by_rank = times.of_ranks(placement.physical_to_logical, placement.ranks)
    return np.asarray(times.mean_step(by_rank.max(2)) + traffic_s)


def _load_s(load: ExpertLoad, placement: Placement, costs: ExpertCosts, tokens: Floats) -> tuple[float, float]:
    """Returns the seconds of all layers' busiest ranks in the mean step, and those of their mean ranks."""
    if not costs.expert_s:
        return float(tokens.max(1).sum()) * costs.token_s, float(tokens.mean(1).sum()) * costs.token_s
    times = layer_time(load, costs)
    by_rank = times.of_ranks(placement.physical_to_logical, placement.ranks)
    return float(times.mean_step(by_rank.max(2)).sum()), float(times.mean_step(by_rank.mean(2)).sum())


def layer_time(load: ExpertLoad, costs: ExpertCosts) -> LayerTime:
    """The time of a rank in each layer, under a load with these coefficients."""
    return LayerTime(
        by_expert=load.by_expert,
        sizes=load.sizes or MEAN_STEP,
        expert_s=costs.expert_s,
        token_s=costs.token_s,
    )


def load_of_ranks(load: ExpertLoad, placement: Placement) -> Floats:
    """Tokens a step of each rank: [layer, rank]; replicas of an expert on different ranks share its tokens evenly."""
    table = placement.physical_to_logical
    share = load.by_expert / serving_copies(table, load.experts, placement.ranks)
    by_slot = np.take_along_axis(share, table, 1) * serving_slots(table, placement.ranks)
    return np.asarray(by_slot.reshape(placement.layers, placement.ranks, -1).sum(2))


def link_costs(load: ExpertLoad, placement: Placement, costs: ExpertCosts) -> Floats:
    """Seconds of one token from a source to a rank and back: [source, rank].

    Raises:
        ValueError: the sources do not divide the ranks evenly.
    """
    same_rank, same_node = _nearness(load, placement)
    near = np.where(same_rank, 0.0, costs.remote_token_s)
    return np.asarray(_DIRECTIONS * np.where(same_node, near, costs.internode_token_s))


def traffic_costs(load: ExpertLoad, links: Floats) -> Singles:
    """Seconds of traffic a step if all tokens of an expert went to one rank: [layer, expert, rank].

    Args:
        load: recorded load.
        links: seconds of one token from a source to a rank and back, [source, rank], as `link_costs` returns them.
    """
    sources, ranks = links.shape
    tokens = load.tokens.astype(np.float32).transpose(1, 2, 0)
    # The links of all ranks work in parallel.
    weights = (links / ranks).astype(np.float32)
    traffic = np.empty((load.layers, load.experts, ranks), np.float32)
    width = max(_ONE_THREAD // (sources * ranks), 1)
    for first in range(0, load.experts, width):
        traffic[:, first : first + width] = tokens[:, first : first + width] @ weights
    return traffic


@dataclass(frozen=True, slots=True, eq=False)
class _Arrivals:
    """Tokens a step, [layer]: all, those that stay on their source's ranks, and those that stay on its node."""

    total: Floats
    in_rank: Floats
    in_node: Floats

    def traffic_s(self, costs: ExpertCosts) -> Floats:
        # Sums in another order may differ by a rounding, and no time is negative.
        near, far = np.maximum(self.in_node - self.in_rank, 0.0), np.maximum(self.total - self.in_node, 0.0)
        return np.asarray(_DIRECTIONS * (near * costs.remote_token_s + far * costs.internode_token_s))

    def outside(self, inside: Floats) -> float:
        total = float(self.total.sum())
        return max(1 - float(inside.sum()) / total, 0.0) if total else 0.0


def _count_arrivals(load: ExpertLoad, placement: Placement) -> _Arrivals:
    same_rank, same_node = _nearness(load, placement)
    total = load.by_expert.sum(1)
    if len(load.tokens) == 1:
        return _Arrivals(total, total, total)
    table, by_source = placement.physical_to_logical, load.tokens.reshape(len(load.tokens), -1)
    rank = np.arange(placement.slots) // placement.slots_per_rank
    cells = np.arange(placement.layers)[:, None] * load.experts + table
    part = (
        serving_slots(table, placement.ranks) / serving_copies(table, load.experts, placement.ranks).reshape(-1)[cells]
    )
    own = by_source[same_rank.argmax(0)[rank], cells] * part
    ranks_of_node = placement.ranks // placement.nodes
    near = np.stack([by_source[on_node].sum(0) for on_node in same_node[:, ::ranks_of_node].T])
    by_node = near[rank // ranks_of_node, cells] * part
    return _Arrivals(total, own.sum(1), by_node.sum(1))


def _nearness(load: ExpertLoad, placement: Placement) -> tuple[Flags, Flags]:
    """Whether a rank is one of a source's own, and whether it is on the source's node: [source, rank]."""
    sources, ranks = load.tokens.shape[0], placement.ranks
    if ranks % sources:
        raise ValueError(f"{sources} sources do not divide {ranks} ranks evenly")
    owner = np.arange(ranks) // (ranks // sources)
    node = np.arange(ranks) // (ranks // placement.nodes)
    same_rank = owner[None, :] == np.arange(sources)[:, None]
    on_node = same_rank.astype(np.int64) @ (node[:, None] == np.arange(placement.nodes)) > 0
    return same_rank, on_node[:, node]
