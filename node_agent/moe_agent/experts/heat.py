"""The load of experts and ranks as bytes, for the live page of the gateway. Pure.

The numbers of 58 layers with 256 experts are hundreds of kilobytes as text. A byte says what a picture shows.
"""

import base64

import numpy as np
from moe_contract.experts_state import HeatPart
from moe_scheduling.expert.cost import ExpertLoad, load_of_ranks
from moe_scheduling.expert.placement import Floats, Ints, Placement

# Up to 255 / 32, which is 8 times the mean.
UNIT = 1 / 32


def build_heat(load: Floats, placement: Ints, ranks: int) -> HeatPart | None:
    """The load of the experts, [source, layer, expert], and of the ranks that they lie on.

    Args:
        load: tokens a step.
        placement: [layer, slot], logical experts.
        ranks: of the group.

    Returns:
        The bytes; None where load and placement are of different sizes, as in the moment of a change.
    """
    try:
        recorded = ExpertLoad(tokens=load)
        placed = Placement(physical_to_logical=placement, ranks=ranks)
    except ValueError:
        return None
    if placed.layers != recorded.layers or int(placed.physical_to_logical.max()) >= recorded.experts:
        return None
    by_rank = load_of_ranks(recorded, placed)
    return HeatPart(unit=UNIT, by_expert=_pack(recorded.by_expert), by_rank=_pack(by_rank))


def _pack(values: Floats) -> str:
    mean = values.mean(axis=1, keepdims=True)
    ratios = np.divide(values, mean, out=np.zeros_like(values), where=mean > 0)
    return base64.b64encode(np.minimum(np.round(ratios / UNIT), 255).astype(np.uint8).tobytes()).decode()
