"""What an agent says of load and placement as the values that decisions read. Pure."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from moe_contract.experts_state import ExpertsState
from moe_scheduling.expert.cost import load_of_ranks
from moe_scheduling.expert.decision import ExpertCosts, ExpertLoad, Placement, StepSizes
from moe_scheduling.expert.placement import Floats, check_experts


@dataclass(frozen=True, slots=True, kw_only=True)
class HotExpert:
    """An expert with many tokens.

    Attributes:
        layer: its layer.
        expert: its logical number.
        ratio: its tokens over the mean of the layer's experts.
        ranks: where its copies are.
    """

    layer: int
    expert: int
    ratio: float
    ranks: tuple[int, ...]


def read_load(document: ExpertsState) -> ExpertLoad | None:
    """The load; None in the brief form, before a load was recorded, and where it does not fit the group."""
    if document.load.tokens is None or document.load.steps < 1:
        return None
    try:
        load = ExpertLoad(
            tokens=np.asarray(document.load.tokens), steps=int(document.load.steps), sizes=_read_sizes(document)
        )
    except ValueError:
        return None
    fits = (load.layers, load.experts) == (document.layers, document.experts)
    return load if fits and document.ranks % len(load.tokens) == 0 else None


def _read_sizes(document: ExpertsState) -> StepSizes | None:
    rows = document.load.sizes
    if not rows:
        return None
    return StepSizes(tokens=tuple(float(row[0]) for row in rows), parts=tuple(float(row[1]) for row in rows))


def read_placement(rows: Any, document: ExpertsState) -> Placement | None:
    """A placement of this group; None where it is none: every expert has a slot in every layer."""
    try:
        placement = Placement(
            physical_to_logical=np.asarray(rows),
            ranks=document.ranks,
            nodes=document.nodes,
            version=document.placement.version,
        )
        check_experts(placement, layers=document.layers, experts=document.experts)
    except (ValueError, TypeError, OverflowError):
        return None
    return placement if placement.slots_per_rank == document.slots_per_rank else None


def read_costs(document: ExpertsState, horizon_steps: int) -> ExpertCosts | None:
    """The costs that the engine measured; None before it has."""
    measured = {name: value for name, value in (document.costs or {}).items() if value is not None}
    if not measured.get("token_s"):
        return None
    known = ("token_s", "expert_s", "remote_token_s", "internode_token_s", "move_s")
    try:
        return ExpertCosts(**{name: measured[name] for name in known if name in measured}, horizon_steps=horizon_steps)
    except ValueError:
        return None


def over_mean(values: Floats) -> Floats:
    """Each over the mean of its row; 1 in a row that is all zero."""
    mean = values.mean(axis=1, keepdims=True)
    ratios: Floats = np.divide(values, mean, out=np.ones_like(values), where=mean > 0)
    return ratios


def balance_of(load: ExpertLoad, placement: Placement) -> float:
    """Load of the busiest rank over the mean, mean over the layers weighted by their tokens; 1 without tokens."""
    ranks = load_of_ranks(load, placement)
    mean = float(ranks.mean(axis=1).sum())
    return float(ranks.max(axis=1).sum()) / mean if mean > 0 else 1.0


def find_hottest(load: ExpertLoad, placement: Placement, count: int) -> list[HotExpert]:
    """The experts that are furthest above the mean of their layer, the hottest first; none that are not above it."""
    ratios = over_mean(load.tokens.sum(axis=0))
    order = np.argsort(-ratios, axis=None, kind="stable")[:count]
    found = []
    for layer, expert in zip(*np.unravel_index(order[ratios.flat[order] > 1.0], ratios.shape), strict=True):
        places = np.flatnonzero(placement.physical_to_logical[layer] == expert) // placement.slots_per_rank
        ranks = tuple(dict.fromkeys(places.tolist()))
        found.append(HotExpert(layer=int(layer), expert=int(expert), ratio=float(ratios[layer, expert]), ranks=ranks))
    return found
