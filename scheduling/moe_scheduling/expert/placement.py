"""The placement of experts in an expert group, with functions that count its replicas and the moves of a change.

Used by the decision, the node agent, `moeserving experts` and the benchmarks, so that all count moves the same way.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
# Half the memory of float64, which is what a search spends its time on.
Singles = npt.NDArray[np.float32]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Placement:
    """Which logical expert each slot holds.

    Attributes:
        physical_to_logical: [layer, slot], the logical expert; slots are numbered rank by rank.
        ranks: ranks of the group; each has as many slots as the others.
        nodes: machines that the ranks lie on, as many ranks on each, in their order.
        version: number of the placement; rises by one with each change carried out.

    Raises:
        ValueError: the shape is not that of whole ranks on whole nodes, or a slot holds no expert's number.
    """

    physical_to_logical: Ints
    ranks: int
    nodes: int = 1
    version: int = 0

    def __post_init__(self) -> None:
        table = np.asarray(self.physical_to_logical)
        if table.ndim != 2 or not table.size or not np.issubdtype(table.dtype, np.integer):
            raise ValueError("physical_to_logical must be a table [layer, slot] of whole numbers")
        if table.min() < 0:
            raise ValueError("physical_to_logical must hold experts' numbers, 0 and up")
        if self.ranks < 1 or table.shape[1] % self.ranks:
            raise ValueError(f"the {table.shape[1]} slots of a layer must divide evenly by ranks ({self.ranks})")
        if self.nodes < 1 or self.ranks % self.nodes:
            raise ValueError(f"ranks ({self.ranks}) must divide evenly by nodes ({self.nodes})")
        object.__setattr__(self, "physical_to_logical", table.astype(np.int64))

    @property
    def layers(self) -> int:
        """Number of layers with experts."""
        return int(self.physical_to_logical.shape[0])

    @property
    def slots(self) -> int:
        """Number of slots in a layer, over all ranks."""
        return int(self.physical_to_logical.shape[1])

    @property
    def slots_per_rank(self) -> int:
        """Number of slots in a layer on one rank."""
        return self.slots // self.ranks


def initial_placement(*, layers: int, experts: int, redundant: int, ranks: int, nodes: int = 1) -> Placement:
    """Returns vLLM's placement at the start: the experts in order, then the first `redundant` of them again.

    Raises:
        ValueError: experts and redundant do not fill whole ranks, or a number is out of range.
    """
    if min(layers, experts) < 1 or redundant < 0:
        raise ValueError("layers and experts must be at least 1, redundant at least 0")
    row = np.concatenate([np.arange(experts), np.arange(redundant) % experts])
    return Placement(physical_to_logical=np.tile(row, (layers, 1)), ranks=ranks, nodes=nodes)


def check_experts(placement: Placement, *, layers: int, experts: int) -> None:
    """Checks that a placement fits a model.

    Raises:
        ValueError: the number of layers differs, the model lacks an expert of the placement, or an expert has no slot.
    """
    table = placement.physical_to_logical
    if table.shape[0] != layers:
        raise ValueError(f"the placement has {table.shape[0]} layers, the load {layers}")
    if table.max() >= experts:
        layer, slot = np.argwhere(table >= experts)[0]
        raise ValueError(f"layer {layer}, slot {slot}: no expert {table[layer, slot]}; the load has {experts}")
    missing = np.argwhere(count_copies(table, experts) == 0)
    if len(missing):
        raise ValueError(f"layer {missing[0][0]}: expert {missing[0][1]} has no slot")


def count_copies(table: Ints, experts: int) -> Ints:
    """Returns the number of slots of each expert: [layer, slot] -> [layer, expert]."""
    layers = table.shape[0]
    flat = (np.arange(layers)[:, None] * experts + table).ravel()
    return np.bincount(flat, minlength=layers * experts).reshape(layers, experts)


def mark_hosts(table: Ints, experts: int, ranks: int) -> Flags:
    """Returns whether a rank has an expert: [layer, slot] -> [layer, expert, rank]."""
    layers, slots = table.shape
    hosts = np.zeros((layers, experts, ranks), dtype=np.bool_)
    hosts[np.arange(layers)[:, None], table, np.arange(slots) // (slots // ranks)] = True
    return hosts


def count_moves(before: Placement, after: Placement) -> Ints:
    """Returns the moves by layer: slots whose expert was in no slot of that rank before.

    An expert that changes its slot within a rank is copied there and is no move, as in vLLM.
    """
    table = after.physical_to_logical
    experts = max(int(table.max()), int(before.physical_to_logical.max())) + 1
    had = mark_hosts(before.physical_to_logical, experts, before.ranks)
    rank = np.arange(after.slots) // after.slots_per_rank
    stays = had[np.arange(after.layers)[:, None], table, rank]
    return np.asarray((~stays).sum(1), dtype=np.int64)


def count_charged(before: Placement, after: Placement) -> Ints:
    """Returns by layer what a change counts for where time is paid: its moves, and at least one where slots change.

    Which slots are idle changes without a move, but the layer takes part in a round all the same.
    """
    changed = (before.physical_to_logical != after.physical_to_logical).any(1)
    return np.asarray(np.maximum(count_moves(before, after), changed))


def keep_slots(before: Ints, after: Ints, ranks: int) -> Ints:
    """Returns `after` [layer, slot] with each expert that stays on its rank in the slot that it has in `before`."""
    shape = (before.shape[0], ranks, -1)
    old, new = before.reshape(shape), after.reshape(shape).copy()
    for slot in range(old.shape[2]):
        wanted = old[:, :, slot]
        elsewhere = (new == wanted[..., None]) & (new != old)
        layer, rank = np.nonzero((new[:, :, slot] != wanted) & elsewhere.any(-1))
        source = elsewhere[layer, rank].argmax(-1)
        new[layer, rank, source] = new[layer, rank, slot]
        new[layer, rank, slot] = wanted[layer, rank]
    return new.reshape(after.shape)
