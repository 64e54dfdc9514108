"""State of the placement search: where the experts lie in all layers, with the derived tables that the search reads.

A swap updates a few cells of the tables; after new replicas are placed all tables are computed again.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from moe_scheduling.expert.placement import Flags, Floats, Ints, Singles, count_copies, mark_hosts

SlotWork = Callable[[Ints], Floats]
"""Work of one of an expert's slots, [layer, expert], by the number of slots that share its tokens."""

# Placement cost of a rank that has the expert already; larger than any real cost.
BLOCKED = np.float32(1e30)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PlacementChange:
    """One change of the placement: `slots[i]` of layer `layers[i]` gets the expert `experts[i]`."""

    layers: Ints
    slots: Ints
    experts: Ints


@dataclass(frozen=True, slots=True)
class Swaps:
    """Swaps by row: place `place_a` of rank `a` with `place_b` of rank `b`; no rank of a layer is in two rows."""

    layer: Ints
    a: Ints
    place_a: Ints
    b: Ints
    place_b: Ints


@dataclass(slots=True)
class SearchState:
    """Mutable state of one search; `search_steps` owns it.

    Tables by slot are [place, layer, rank]: places are few, and numpy is fast where the last index is long. Tables by
    cell are [layer, expert, rank] flattened to one row and read at `rows + rank`, where `rows` holds the row of the
    expert in each slot: several times faster than three indices. Loads and costs are in the unit of `SearchInput`.

    Attributes:
        experts: by slot, the expert in it.
        work: [layer, expert], work of all replicas of an expert.
        mean: [layer], work of the mean rank.
        traffic: [layer, expert, rank], traffic if all tokens went to that rank; None: traffic is not counted.
        slot_work: work of one replica by the number of them; None: replicas divide `work` evenly.
        initial_hosts: by cell, whether the rank had the expert at the start.
        copies: [layer, expert], number of replicas.
        rows: by slot, see above.
        load: by slot, work of that replica.
        in_place: by slot, 1 where the rank had the expert at the start, else 0.
        slot_traffic: by slot, traffic of that replica.
        placement_cost: by cell, traffic of a replica placed there; `BLOCKED` where one is already.
        imbalance: [layer, rank], work above the mean.
        total_traffic: [layer], traffic of all replicas.
        moves: [layer], replicas on a rank that did not have the expert at the start.
        steps: changes made so far.
        peaks: [layer] after each step, imbalance of the busiest rank plus traffic.
        counts: [layer] after each step, moves.
    """

    experts: Ints
    work: Singles
    mean: Singles
    traffic: Singles | None
    slot_work: SlotWork | None = None
    initial_hosts: Flags = field(init=False)
    copies: Ints = field(init=False)
    rows: Ints = field(init=False)
    load: Singles = field(init=False)
    in_place: Singles = field(init=False)
    slot_traffic: Singles = field(init=False)
    placement_cost: Singles = field(init=False)
    imbalance: Singles = field(init=False)
    total_traffic: Singles = field(init=False)
    moves: Ints = field(init=False)
    steps: list[PlacementChange] = field(default_factory=list)
    peaks: list[Floats] = field(default_factory=list)
    counts: list[Ints] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.initial_hosts = mark_hosts(self.table, self.work.shape[1], self.shape[1]).reshape(-1)
        self.placement_cost = np.empty(len(self.initial_hosts), np.float32)
        self.refresh()

    @property
    def shape(self) -> tuple[int, int, int]:
        """Numbers of layers, ranks, and places of a rank."""
        places, layers, ranks = self.experts.shape
        return layers, ranks, places

    @property
    def table(self) -> Ints:
        """The expert in each slot as [layer, slot], as a `Placement` has it."""
        return self.experts.transpose(1, 2, 0).copy().reshape(self.experts.shape[1], -1)

    def welcome(self, first: int) -> None:
        """Counts experts from `first` on, the placeholders, as on each rank from the start: to place one is no move."""
        self.initial_hosts.reshape(len(self.work), -1, self.shape[1])[:, first:] = True
        self.refresh()

    def share(self, copies: Ints) -> Singles:
        """Returns [layer, expert]: work of one replica of an expert that has this many; placeholders have none."""
        if self.slot_work is None:
            return np.asarray(np.divide(self.work, np.maximum(copies, 1), dtype=np.float32))
        return np.asarray(self.slot_work(copies), dtype=np.float32)

    def refresh(self) -> None:
        """Computes all tables from `experts`."""
        layers, ranks, places = self.shape
        experts = self.work.shape[1]
        self.copies = count_copies(self.table, experts)
        part = np.divide(1, np.maximum(self.copies, 1), dtype=np.float32)
        numbers = np.arange(layers)[:, None] * experts + self.experts
        self.rows = numbers * ranks
        here = self.rows + np.arange(ranks)
        self.load = self.share(self.copies).reshape(-1)[numbers]
        self.imbalance = self.load.sum(0) - self.mean[:, None]
        self.in_place = self.initial_hosts[here].astype(np.float32)
        self.moves = np.asarray(ranks * places - self.in_place.sum((0, 2)), dtype=np.int64)
        placement_cost = self.placement_cost.reshape(layers, experts, ranks)
        placement_cost[...] = 0.0 if self.traffic is None else self.traffic
        if self.traffic is not None:
            placement_cost *= part[..., None]
        self.slot_traffic = self.placement_cost[here]
        self.total_traffic = self.slot_traffic.sum((0, 2))
        self.placement_cost[here] = BLOCKED

    def record(self) -> None:
        """Appends the present cost and moves, at the end of a step."""
        self.peaks.append(self.imbalance.max(1) + self.total_traffic.astype(np.float64))
        self.counts.append(self.moves.copy())

    def swap(self, swaps: Swaps) -> None:
        """Makes swaps as one step and updates the tables."""
        count = len(swaps.layer)
        if not count:
            return
        layers, ranks, places = self.shape
        experts, rows, load, in_place, slot_traffic = (
            table.reshape(-1) for table in (self.experts, self.rows, self.load, self.in_place, self.slot_traffic)
        )
        layer = np.concatenate([swaps.layer, swaps.layer])
        rank, place = np.concatenate([swaps.a, swaps.b]), np.concatenate([swaps.place_a, swaps.place_b])
        cell = layer * ranks + rank
        slot = place * (layers * ranks) + cell
        other = np.concatenate([slot[count:], slot[:count]])
        coming, loads, come = experts[other], load[other], rows[other]
        self.imbalance.reshape(-1)[cell] += loads - load[slot]
        to, gone = come + rank, rows[slot] + rank
        now_in_place, now_traffic = self.initial_hosts[to].astype(np.float32), self.placement_cost[to]
        self.moves -= np.bincount(layer, now_in_place - in_place[slot], layers).astype(np.int64)
        if self.traffic is not None:
            self.total_traffic += np.bincount(layer, now_traffic - slot_traffic[slot], layers).astype(np.float32)
        self.placement_cost[gone], self.placement_cost[to] = slot_traffic[slot], BLOCKED
        rows[slot], experts[slot], load[slot], in_place[slot], slot_traffic[slot] = (
            come,
            coming,
            loads,
            now_in_place,
            now_traffic,
        )
        self.steps.append(PlacementChange(layers=layer, slots=rank * places + place, experts=coming))
        self.record()
