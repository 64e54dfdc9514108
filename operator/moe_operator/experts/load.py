"""Where the tokens of experts are computed under a placement. Pure; numpy arrays in and out."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_operator.experts.document import ExpertsDocument

Numbers = NDArray[np.float64]
Slots = NDArray[np.int64]


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


def read_tokens(document: ExpertsDocument) -> Numbers | None:
    """Tokens a step of each expert, `[layer, expert]`, of all sources; None in the brief form and before a load."""
    if document.load.tokens is None or not document.load.steps:
        return None
    tokens = np.asarray(document.load.tokens, dtype=np.float64)
    shape = (document.layers, document.experts)
    return tokens.sum(axis=0) if tokens.ndim == 3 and tokens.shape[1:] == shape else None


def read_placement(rows: Any, document: ExpertsDocument) -> Slots | None:
    """A placement of this group, `[layer, slot]`; None where it is none: every expert has a slot in every layer."""
    try:
        slots = np.asarray(rows, dtype=np.int64)
    except (ValueError, TypeError, OverflowError):
        return None
    if slots.shape != (document.layers, document.ranks * document.slots_per_rank):
        return None
    known = np.arange(document.experts)
    return slots if all(np.array_equal(np.unique(row), known) for row in slots) else None


def spread(tokens: Numbers, slots: Slots, ranks: int) -> Numbers:
    """Tokens a step of each rank, `[layer, rank]`: the copies of an expert share its tokens evenly, as vLLM has it."""
    layers = np.arange(len(slots))[:, None]
    copies = np.zeros(tokens.shape)
    np.add.at(copies, (layers, slots), 1.0)
    share: Numbers = (tokens / np.maximum(copies, 1.0))[layers, slots]
    loads: Numbers = share.reshape(len(slots), ranks, -1).sum(axis=2)
    return loads


def over_mean(loads: Numbers) -> Numbers:
    """Each over the mean of its row; 1 in a row without tokens."""
    mean = loads.mean(axis=1, keepdims=True)
    ratios: Numbers = np.divide(loads, mean, out=np.ones_like(loads), where=mean > 0)
    return ratios


def balance(loads: Numbers) -> float:
    """Load of the busiest rank over the mean: mean over the layers, weighted by their tokens; at least 1."""
    mean = loads.mean(axis=1).sum()
    return float(loads.max(axis=1).sum() / mean) if mean > 0 else 1.0


def count_moves(before: Slots, after: Slots, ranks: int) -> int:
    """Slots that have to be filled from another rank: their expert is not on their rank yet."""
    old, new = (slots.reshape(len(slots), ranks, -1) for slots in (before, after))
    return int((new[..., None] != old[..., None, :]).all(axis=-1).sum())


def find_hottest(tokens: Numbers, slots: Slots, ranks: int, count: int) -> list[HotExpert]:
    """The experts that are furthest above the mean of their layer, the hottest first; none that are not above it."""
    ratios = over_mean(tokens)
    order = np.argsort(-ratios, axis=None, kind="stable")[:count]
    per_rank = slots.shape[1] // ranks
    found = []
    for layer, expert in zip(*np.unravel_index(order[ratios.flat[order] > 1.0], ratios.shape), strict=True):
        places = sorted({int(slot) // per_rank for slot in np.flatnonzero(slots[layer] == expert)})
        hot = HotExpert(layer=int(layer), expert=int(expert), ratio=float(ratios[layer, expert]), ranks=tuple(places))
        found.append(hot)
    return found
