"""The board that `expert_search.py` moves experts on: where they lie in all layers, and what follows from it.

A swap changes the board by a few cells; copies are laid down at once, after which all is worked out anew.
"""

from dataclasses import dataclass, field

import numpy as np

from moe_scheduling.expert.placement import Flags, Floats, Ints, Singles, count_copies, mark_hosts

# More than anything costs: the fee of a rank that has the expert already.
BLOCKED = np.float32(1e30)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Step:
    """One change in some layers: `slots[i]` of layer `layers[i]` takes the expert `experts[i]`."""

    layers: Ints
    slots: Ints
    experts: Ints


@dataclass(frozen=True, slots=True)
class Swaps:
    """Rows of swaps: the place `place_a` of rank `a` with `place_b` of rank `b`; no rank of a layer is in two rows."""

    layer: Ints
    a: Ints
    place_a: Ints
    b: Ints
    place_b: Ints


@dataclass(slots=True)
class SearchState:
    """The state of the search; `search_steps` owns it.

    Tables by slot are [place, layer, rank]: places are few, and numpy is fast where the last index is long. Tables by
    cell are [layer, expert, rank] as one long row, read by `row + rank`, where `rows` has the row of what lies in each
    slot: several times faster than three indices.

    Attributes:
        experts: by slot, what lies there.
        work: [layer, expert], of all copies of an expert.
        mean: [layer], work of the mean rank.
        carry: [layer, expert, rank], traffic if all tokens went to that rank; None: no traffic.
        home: by cell, whether the rank had the expert at the start.
        copies: [layer, expert].
        rows: by slot, see above.
        load: by slot, work of that copy.
        kept: by slot, 1 where the rank had the expert at the start, else 0.
        paid: by slot, traffic of that copy.
        fees: by cell, traffic of a copy that comes there; `BLOCKED` where one is.
        excess: [layer, rank], work above the mean.
        carried: [layer], traffic.
        moves: [layer], copies on a rank that did not have the expert.
    """

    experts: Ints
    work: Singles
    mean: Singles
    carry: Singles | None
    home: Flags = field(init=False)
    copies: Ints = field(init=False)
    rows: Ints = field(init=False)
    load: Singles = field(init=False)
    kept: Singles = field(init=False)
    paid: Singles = field(init=False)
    fees: Singles = field(init=False)
    excess: Singles = field(init=False)
    carried: Singles = field(init=False)
    moves: Ints = field(init=False)
    steps: list[Step] = field(default_factory=list)
    peaks: list[Floats] = field(default_factory=list)
    counts: list[Ints] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.home = mark_hosts(self.table, self.work.shape[1], self.shape[1]).reshape(-1)
        self.fees = np.empty(len(self.home), np.float32)
        self.settle()

    @property
    def shape(self) -> tuple[int, int, int]:
        """Layers, ranks, places."""
        places, layers, ranks = self.experts.shape
        return layers, ranks, places

    @property
    def table(self) -> Ints:
        """[layer, slot], as in a placement."""
        return self.experts.transpose(1, 2, 0).copy().reshape(self.experts.shape[1], -1)

    def settle(self) -> None:
        """All that follows from where the experts lie, anew."""
        layers, ranks, places = self.shape
        experts = self.work.shape[1]
        self.copies = count_copies(self.table, experts)
        part = np.divide(1, self.copies, dtype=np.float32)
        numbers = np.arange(layers)[:, None] * experts + self.experts
        self.rows = numbers * ranks
        here = self.rows + np.arange(ranks)
        self.load = (self.work * part).reshape(-1)[numbers]
        self.excess = self.load.sum(0) - self.mean[:, None]
        self.kept = self.home[here].astype(np.float32)
        self.moves = np.asarray(ranks * places - self.kept.sum((0, 2)), dtype=np.int64)
        fees = self.fees.reshape(layers, experts, ranks)
        fees[...] = 0.0 if self.carry is None else self.carry
        if self.carry is not None:
            fees *= part[..., None]
        self.paid = self.fees[here]
        self.carried = self.paid.sum((0, 2))
        self.fees[here] = BLOCKED

    def record(self) -> None:
        """Notes the state, as the end of a step."""
        self.peaks.append(self.excess.max(1) + self.carried.astype(np.float64))
        self.counts.append(self.moves.copy())

    def swap(self, swaps: Swaps) -> None:
        """Makes swaps, as one step."""
        count = len(swaps.layer)
        if not count:
            return
        layers, ranks, places = self.shape
        experts, rows, load, kept, paid = (
            table.reshape(-1) for table in (self.experts, self.rows, self.load, self.kept, self.paid)
        )
        layer = np.concatenate([swaps.layer, swaps.layer])
        rank, place = np.concatenate([swaps.a, swaps.b]), np.concatenate([swaps.place_a, swaps.place_b])
        cell = layer * ranks + rank
        slot = place * (layers * ranks) + cell
        other = np.concatenate([slot[count:], slot[:count]])
        coming, loads, come = experts[other], load[other], rows[other]
        self.excess.reshape(-1)[cell] += loads - load[slot]
        to, gone = come + rank, rows[slot] + rank
        now_kept, now_paid = self.home[to].astype(np.float32), self.fees[to]
        self.moves -= np.bincount(layer, now_kept - kept[slot], layers).astype(np.int64)
        if self.carry is not None:
            self.carried += np.bincount(layer, now_paid - paid[slot], layers).astype(np.float32)
        self.fees[gone], self.fees[to] = paid[slot], BLOCKED
        rows[slot], experts[slot], load[slot], kept[slot], paid[slot] = come, coming, loads, now_kept, now_paid
        self.steps.append(Step(layers=layer, slots=rank * places + place, experts=coming))
        self.record()
