"""What a placement of experts costs in one engine step, in seconds: the one currency of `expert.py`.

The papers weigh balance, traffic and moves by hand-set factors alpha, beta, gamma (Gimbal, arXiv 2606.15177). Here each
term is a time, from a coefficient that was measured, so nothing is left to weigh.

A layer of an expert group ends when its slowest rank does: its work is `token_s` times the tokens of the busiest rank.
A token's copies share alike, since vLLM picks the copy by the token's position. Each token travels from the rank that
has its request to the rank of its expert and back; the ranks' links work side by side, so the time is that of the mean
rank. Where a token stays with its expert between two layers, only what changes ranks is handed over; vLLM brings every
token home after each layer, hence `handover_token_s` is 0 there.
"""

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from moe_scheduling.expert.placement import Flags, Floats, Placement, Singles, count_copies, mark_hosts

# Size of a product of matrices (m * n * k) up to which numpy's BLAS asks no other threads for help: on a busy machine
# they are waited for many times longer than they save.
_ALONE = 2**18
# A token goes to its expert, and its result comes back.
_DIRECTIONS = 2


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExpertLoad:
    """What the experts had to do.

    Attributes:
        tokens: [source, layer, expert], tokens a step that the data-parallel rank `source` sends to a logical expert.
            The sources divide the ranks of the group evenly among themselves, in order; a single source stands for
            all ranks, and then nothing is known of traffic.
        pairs: [layer, expert, next], tokens a step that go to `expert` in a layer and to `next` in the following one,
            a layer less than `tokens`; None where it was not recorded.
        steps: engine steps that were looked at.
        by_expert: [layer, expert], tokens a step of all sources.

    Raises:
        ValueError: a shape does not fit, or a figure is negative or not finite.
    """

    tokens: Floats
    pairs: Floats | None = None
    steps: int = 1
    by_expert: Floats = field(init=False)

    def __post_init__(self) -> None:
        tokens = _checked(self.tokens, "tokens", 3)
        object.__setattr__(self, "tokens", tokens)
        object.__setattr__(self, "by_expert", tokens.sum(0))
        if self.steps < 1:
            raise ValueError("steps must be at least 1")
        if self.pairs is None:
            return
        pairs = _checked(self.pairs, "pairs", 3)
        if pairs.shape != (tokens.shape[1] - 1, tokens.shape[2], tokens.shape[2]):
            raise ValueError("pairs must be [layer, expert, next] for each layer but the last")
        object.__setattr__(self, "pairs", pairs)

    @property
    def layers(self) -> int:
        """Layers that have experts."""
        return int(self.tokens.shape[1])

    @property
    def experts(self) -> int:
        """Logical experts of a layer."""
        return int(self.tokens.shape[2])


def _checked(values: npt.ArrayLike, name: str, dimensions: int) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != dimensions or (name == "tokens" and not array.size):
        raise ValueError(f"{name} must have {dimensions} dimensions and not be empty")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite")
    if (array < 0).any():
        raise ValueError(f"{name} must not be negative")
    return array


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertCosts:
    """Seconds, each measured or given.

    Attributes:
        token_s: work of a rank on one token of one expert.
        remote_token_s: one token, in one direction, between two ranks of a node.
        internode_token_s: one token, in one direction, between two nodes.
        handover_token_s: one token between the ranks of its experts in two neighbouring layers; 0 in vLLM, see above.
        move_s: one expert brought to a rank, as serving is held up by it.
        horizon_steps: engine steps until the next decision, over which a move has to pay.

    Raises:
        ValueError: a figure is negative or not finite.
    """

    token_s: float
    remote_token_s: float = 0.0
    internode_token_s: float = 0.0
    handover_token_s: float = 0.0
    move_s: float = 0.0
    horizon_steps: int = 3000

    def __post_init__(self) -> None:
        for name in ("token_s", "remote_token_s", "internode_token_s", "handover_token_s", "move_s"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least 0 and finite")
        if self.horizon_steps < 1:
            raise ValueError("horizon_steps must be at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """Seconds a step that the experts take, over all layers.

    Attributes:
        load_s: work of the busiest rank, layer by layer.
        balanced_s: what that would be if all ranks had the same; no placement is below.
        traffic_s: tokens to foreign ranks and back.
        handover_s: tokens between layers.
    """

    load_s: float
    balanced_s: float
    traffic_s: float
    handover_s: float

    @property
    def total_s(self) -> float:
        """What a placement is judged by."""
        return self.load_s + self.traffic_s + self.handover_s


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Balance:
    """How evenly the ranks are loaded, without units; 1 is even.

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


def score_placement(load: ExpertLoad, placement: Placement, costs: ExpertCosts) -> tuple[Terms, Balance]:
    """The seconds of one engine step under a load, and how even it is.

    Raises:
        ValueError: the sources do not divide the ranks evenly.
    """
    ranks, arrivals = load_of_ranks(load, placement), _count_arrivals(load, placement)
    terms = Terms(
        load_s=float(ranks.max(1).sum()) * costs.token_s,
        balanced_s=float(ranks.mean(1).sum()) * costs.token_s,
        traffic_s=arrivals.carried_s(costs) / placement.ranks,
        handover_s=_handover_s(load, placement, costs),
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


def load_of_ranks(load: ExpertLoad, placement: Placement) -> Floats:
    """Tokens a step of each rank: [layer, rank]; an expert's copies share alike."""
    table = placement.physical_to_logical
    share = load.by_expert / count_copies(table, load.experts)
    by_slot = np.take_along_axis(share, table, 1)
    return np.asarray(by_slot.reshape(placement.layers, placement.ranks, -1).sum(2))


def link_costs(load: ExpertLoad, placement: Placement, costs: ExpertCosts) -> Floats:
    """Seconds of one token from a source to a rank, and back: [source, rank].

    Raises:
        ValueError: the sources do not divide the ranks evenly.
    """
    same_rank, same_node = _nearness(load, placement)
    near = np.where(same_rank, 0.0, costs.remote_token_s)
    return np.asarray(_DIRECTIONS * np.where(same_node, near, costs.internode_token_s))


def carry_costs(load: ExpertLoad, links: Floats) -> Singles:
    """Seconds of traffic if all tokens of an expert went to one rank: [layer, expert, rank].

    The links of all ranks work side by side, hence the division by their number.
    """
    sources, ranks = links.shape
    tokens = load.tokens.astype(np.float32).transpose(1, 2, 0)
    weights = (links / ranks).astype(np.float32)
    carried = np.empty((load.layers, load.experts, ranks), np.float32)
    width = max(_ALONE // (sources * ranks), 1)
    for first in range(0, load.experts, width):
        carried[:, first : first + width] = tokens[:, first : first + width] @ weights
    return carried


def handover_costs(load: ExpertLoad, placement: Placement, costs: ExpertCosts) -> Floats | None:
    """As `carry_costs`, for what is handed over to and from the neighbouring layers as they lie now; None if nothing.

    What is saved is negative: tokens whose neighbour has a copy on the rank. An expert counts each of its two sides.
    """
    if load.pairs is None or not costs.handover_token_s:
        return None
    shares = _shares_on_ranks(load, placement)
    saved = np.zeros(shares.shape)
    saved[:-1] += load.pairs @ shares[1:]
    saved[1:] += load.pairs.transpose(0, 2, 1) @ shares[:-1]
    return -costs.handover_token_s / placement.ranks * saved


def _handover_s(load: ExpertLoad, placement: Placement, costs: ExpertCosts) -> float:
    if load.pairs is None or not costs.handover_token_s:
        return 0.0
    shares = _shares_on_ranks(load, placement)
    kept = float(((load.pairs @ shares[1:]) * shares[:-1]).sum())
    return (float(load.pairs.sum()) - kept) * costs.handover_token_s / placement.ranks


@dataclass(frozen=True, slots=True)
class _Arrivals:
    """Tokens a step of all layers, those that stay on their source's ranks, and those that stay on its node."""

    total: float
    in_rank: float
    in_node: float

    def carried_s(self, costs: ExpertCosts) -> float:
        one_way_s = (self.in_node - self.in_rank) * costs.remote_token_s
        return _DIRECTIONS * (one_way_s + (self.total - self.in_node) * costs.internode_token_s)

    def outside(self, inside: float) -> float:
        return max(1 - inside / self.total, 0.0) if self.total else 0.0


def _count_arrivals(load: ExpertLoad, placement: Placement) -> _Arrivals:
    same_rank, same_node = _nearness(load, placement)
    total = float(load.by_expert.sum())
    if len(load.tokens) == 1:
        return _Arrivals(total, total, total)
    table, by_source = placement.physical_to_logical, load.tokens.reshape(len(load.tokens), -1)
    rank = np.arange(placement.slots) // placement.slots_per_rank
    cells = np.arange(placement.layers)[:, None] * load.experts + table
    part = 1 / count_copies(table, load.experts).reshape(-1)[cells]
    own = by_source[same_rank.argmax(0)[rank], cells] * part
    ranks_of_node = placement.ranks // placement.nodes
    near = np.stack([by_source[on_node].sum(0) for on_node in same_node[:, ::ranks_of_node].T])
    by_node = near[rank // ranks_of_node, cells] * part
    return _Arrivals(total, float(own.sum()), float(by_node.sum()))


def _shares_on_ranks(load: ExpertLoad, placement: Placement) -> Floats:
    """Part of an expert's tokens that a rank gets: [layer, expert, rank]."""
    table, experts = placement.physical_to_logical, load.experts
    copies = count_copies(table, experts)
    if copies.max() == 1:
        return mark_hosts(table, experts, placement.ranks).astype(np.float64)
    shape = (placement.layers, experts, placement.ranks)
    rank = np.arange(placement.slots) // placement.slots_per_rank
    cells = (np.arange(placement.layers)[:, None] * experts + table) * placement.ranks + rank
    held = np.bincount(cells.ravel(), minlength=int(np.prod(shape))).reshape(shape)
    return held / copies[..., None]


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
