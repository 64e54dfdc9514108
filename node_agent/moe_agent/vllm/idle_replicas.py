"""Idle slots in vLLM's tables of replicas: no token goes to a second slot of an expert on one rank."""

import numpy as np
import torch
from moe_scheduling.expert.idle_slots import serving_slots
from torch import Tensor


def leave_out_idle(slots: Tensor, replicas: Tensor, row: Tensor, ranks: int) -> None:
    """Takes idle slots out of a layer's tables, so that no token goes to a second slot of an expert on one rank.

    Args:
        slots: [expert, width], the slots of each expert, -1 behind the last; changed in place.
        replicas: [expert], number of slots of each expert; changed in place.
        row: [slot], the expert in each slot.
        ranks: ranks of the group.
    """
    serving = serving_slots(row.numpy()[None], ranks)[0]
    if serving.all():
        return
    for expert in set(row[~torch.from_numpy(serving)].tolist()):
        kept = torch.from_numpy(np.flatnonzero(serving & (row.numpy() == expert)))
        slots[expert].fill_(-1)
        slots[expert, : len(kept)] = kept.to(slots.device, slots.dtype)
        replicas[expert] = len(kept)
