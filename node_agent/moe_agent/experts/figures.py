"""The controller's arrays as the values of `moe_scheduling.expert.decision`, which counts and scores for everyone
alike.
"""

import numpy as np
from moe_scheduling.expert.decision import Balance, ExpertCosts, ExpertLoad, Placement, count_moves, score_placement
from numpy.typing import NDArray

from moe_agent.experts.directive import GroupShape
from moe_agent.experts.window import Floats

Slots = NDArray[np.int64]

# The balance asks for none.
_NO_COSTS = ExpertCosts(token_s=0.0)


def make_placement(table: Slots, shape: GroupShape, version: int = 0) -> Placement:
    """`table[layer, slot]` of a group."""
    return Placement(physical_to_logical=table, ranks=shape.ranks, nodes=shape.nodes, version=version)


def make_load(tokens: Floats, pairs: Floats | None, steps: float) -> ExpertLoad:
    """`tokens[source, layer, expert]` and `pairs[layer, expert, next]` a step."""
    return ExpertLoad(tokens=tokens, pairs=pairs, steps=max(1, round(steps)))


def measure_balance(tokens: Floats, table: Slots, shape: GroupShape) -> Balance:
    """Of a placement under `tokens[source, layer, expert]`; without tokens all is balanced."""
    _, balance = score_placement(make_load(tokens, None, 1.0), make_placement(table, shape), _NO_COSTS)
    return balance


def count_moves_by_layer(before: Slots, after: Slots, shape: GroupShape) -> list[int]:
    """Experts that have to be brought to another rank."""
    moves: list[int] = count_moves(make_placement(before, shape), make_placement(after, shape)).tolist()
    return moves
