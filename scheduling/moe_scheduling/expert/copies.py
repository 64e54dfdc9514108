"""Replicas of hot experts: how many each expert should have, and placing them in slots of replicas that are not needed.

A share (the tokens of one replica) may be so large that the other places of its rank still have room for the coldest
experts. Replicas are placed by decreasing share, each on the least loaded rank that can take it.
"""

from dataclasses import dataclass, field

import numpy as np

from moe_scheduling.expert.placement import Flags, Ints, Singles, mark_hosts
from moe_scheduling.expert.search_state import BLOCKED, PlacementChange, SearchState

# Largest share, as part of a rank's mean, where replicas would take most of the moves.
_FILLING = np.float32(0.8)

Change = tuple[Ints, Ints, Ints]
"""Rows of layer, slot and the expert that it takes."""


def wanted_copies(
    work: Singles, spare: int, ranks: int, places: int, part: float = 1.0, cheap: int | None = None
) -> Ints:
    """Returns the replicas that each expert should have, [layer, expert], at most `spare` more than experts in a layer.

    The largest share leaves the other places of its rank room for the coldest experts: a larger one puts its rank above
    the mean, a smaller one costs moves and gains nothing.

    Args:
        work: [layer, expert], work of all replicas of an expert.
        spare: slots of a layer in addition to one for each expert.
        ranks: ranks of the group.
        places: slots of a rank.
        part: factor on the largest share.
        cheap: replicas beyond which a share may fill most of a rank, so that moves are left for swaps; None: no such
            limit. Where `spare` replicas are too few, the largest share is as small as they allow.
    """
    limit = _largest_share(work, ranks, places) * np.float32(part)
    if cheap is not None:
        filling = np.divide(_FILLING * work.sum(1), ranks, dtype=np.float32)
        limit = _raise_share(work, limit, np.maximum(limit, filling), cheap)
    limit = _raise_share(work, limit, np.maximum(work.max(1), limit) * np.float32(1.001), spare)
    return np.asarray(1 + _extra_copies(work, limit))


def _raise_share(work: Singles, low: Singles, high: Singles, most: int) -> Singles:
    """Returns by layer the least share from `low` to `high` that needs at most `most` replicas, else `high`."""
    short = _extra_copies(work, low).sum(1) > most
    start = low
    for _ in range(16):
        if not short.any():
            break
        middle = np.divide(low + high, 2, dtype=np.float32)
        fails = _extra_copies(work, middle).sum(1) > most
        low, high = np.where(fails, middle, low), np.where(fails, high, middle)
    return np.asarray(np.where(short, high, start), dtype=np.float32)


def _extra_copies(work: Singles, limit: Singles) -> Ints:
    ratio = np.divide(work, limit[:, None], out=np.ones_like(work), where=limit[:, None] > 0)
    return np.asarray(np.maximum(np.ceil(ratio) - 1, 0), dtype=np.int64)


def _largest_share(work: Singles, ranks: int, places: int) -> Singles:
    mean = np.divide(work.sum(1), ranks, dtype=np.float32)
    coldest = np.cumsum(np.sort(work, 1), 1)
    share = np.float32(0.65) * mean
    for _ in range(3):
        hot = np.minimum((work > share[:, None] / 2).sum(1), ranks)
        filling = np.clip(hot * (places - 1), 1, work.shape[1])
        room = mean - (places - 1) * coldest[np.arange(len(work)), filling - 1] / filling
        share = np.clip(room, np.float32(0.45) * mean, np.float32(0.95) * mean).astype(np.float32)
    return np.asarray(share, dtype=np.float32)


def spread_copies(state: SearchState, wanted: Ints) -> None:
    """Places the wanted replicas in spare slots, as one step of the path: a half of them may make a layer worse."""
    queue = _queue_of_copies(state, wanted)
    if not queue.shape[1]:
        return
    placing = _ReplicaPlacement(state, wanted)
    changes = [change for expert in queue.T for change in placing.place(expert)]
    layers, slots, experts = (np.concatenate(parts) for parts in zip(*changes, strict=True))
    if len(layers):
        # A slot that changes twice gets its last value, as numpy assigns in order.
        state.steps.append(PlacementChange(layers=layers, slots=slots, experts=experts))
        state.refresh()
        state.record()


def _queue_of_copies(state: SearchState, wanted: Ints) -> Ints:
    """Returns [layer, position]: experts that lack replicas by decreasing share; -1 behind the last."""
    lacking = np.maximum(wanted - state.copies, 0)
    layer, expert = np.nonzero(lacking)
    times = lacking[layer, expert]
    share = state.work[layer, expert] / wanted[layer, expert]
    order = np.lexsort((expert, -share, layer))
    layer, expert = np.repeat(layer[order], times[order]), np.repeat(expert[order], times[order])
    lengths = lacking.sum(1)
    queue = np.full((len(lacking), int(lengths.max())), -1)
    queue[layer, np.arange(len(layer)) - np.repeat(np.cumsum(lengths) - lengths, lengths)] = expert
    return queue


@dataclass(slots=True)
class _ReplicaPlacement:
    """Mutable tables while replicas are placed one by one.

    Attributes:
        state: the search state; its `experts` are changed here, its other tables are refreshed afterwards.
        wanted: [layer, expert], replicas.
        share: [layer, expert], work of one replica once all are placed.
        load: [layer, rank], present work above the mean.
        hosts: [layer, expert, rank], whether a rank has the expert at present.
        spare: [layer, expert], replicas not needed at present.
        slots: [layer, n], slots of experts that had replicas to spare, padded.
        ranks: [layer, n], the ranks of these slots.
        held: [layer, n], the experts that were in these slots.
        freed: [layer, n], work removed from the rank when the slot gets another expert, as a negative number;
            `BLOCKED` where the slot is taken.
    """

    state: SearchState
    wanted: Ints
    share: Singles = field(init=False)
    load: Singles = field(init=False)
    hosts: Flags = field(init=False)
    spare: Ints = field(init=False)
    slots: Ints = field(init=False)
    ranks: Ints = field(init=False)
    held: Ints = field(init=False)
    freed: Singles = field(init=False)

    def __post_init__(self) -> None:
        state, table = self.state, self.state.table
        _, ranks, places = state.shape
        self.share = state.share(self.wanted)
        self.load, self.hosts = state.imbalance.copy(), mark_hosts(table, state.work.shape[1], ranks)
        self.spare = state.copies - self.wanted
        is_spare = np.take_along_axis(self.spare > 0, table, 1)
        self.slots = np.argsort(~is_spare, axis=1, kind="stable")[:, : int(is_spare.sum(1).max())]
        self.ranks, self.held = self.slots // places, np.take_along_axis(table, self.slots, 1)
        self.freed = -np.take_along_axis(self.share, self.held, 1)
        self.freed[~np.take_along_axis(is_spare, self.slots, 1)] = BLOCKED

    def place(self, expert: Ints) -> list[Change]:
        """Places one replica of `expert[layer]` in each layer where it is not -1, and returns the changes."""
        layers, experts, ranks = self.hosts.shape
        row = np.arange(layers)
        room = self.load.take(row[:, None] * ranks + self.ranks)
        room += self.freed
        has_it = self.hosts.take(((row * experts + expert) * ranks)[:, None] + self.ranks)
        direct = np.where(has_it, BLOCKED, room)
        pick = direct.argmin(1)
        due, found = expert >= 0, direct[row, pick] < BLOCKED / 2
        layer = np.nonzero(due & found)[0]
        changes = [self._take(layer, pick[layer], expert[layer])]
        layer = np.nonzero(due & ~found)[0]
        return changes + self._place_elsewhere(layer, room[layer], expert[layer]) if len(layer) else changes

    def _place_elsewhere(self, layer: Ints, room: Singles, expert: Ints) -> list[Change]:
        """Places replicas whose spare slots are all on ranks that have the expert.

        Another rank takes the replica and gives one of its own experts for the spare slot.
        """
        places, row = self.state.shape[2], np.arange(len(layer))
        pick = room.argmin(1)
        giver = np.where(self.hosts[layer, expert], BLOCKED, self.load[layer]).argmin(1)
        theirs, to = self.state.experts[:, layer, giver], self.ranks[layer, pick]
        given = self.share[layer, theirs]
        after = np.maximum(self.load[layer, giver] + self.share[layer, expert] - given, room[row, pick] + given)
        after[self.hosts[layer, theirs, to] | self.hosts[layer, expert, giver]] = BLOCKED
        place = after.argmin(0)
        good = after[place, row] < BLOCKED / 2
        layer, pick, expert, giver, place = layer[good], pick[good], expert[good], giver[good], place[good]
        given_expert = self.state.experts[place, layer, giver]
        return [self._put(layer, giver * places + place, expert), self._take(layer, pick, given_expert)]

    def _take(self, layer: Ints, pick: Ints, expert: Ints) -> Change:
        """Puts an expert into a spare slot and updates the list of spare slots."""
        held = self.held[layer, pick]
        self.freed[layer, pick] = BLOCKED
        self.spare[layer, held] -= 1
        # Experts without a spare replica left give up no further slot.
        last = self.spare[layer, held] == 0
        none, held = layer[last], held[last]
        freed = self.freed[none]
        freed[self.held[none] == held[:, None]] = BLOCKED
        self.freed[none] = freed
        return self._put(layer, self.slots[layer, pick], expert)

    def _put(self, layer: Ints, slot: Ints, expert: Ints) -> Change:
        rank, place = np.divmod(slot, self.state.shape[2])
        old = self.state.experts[place, layer, rank]
        self.load[layer, rank] += self.share[layer, expert] - self.share[layer, old]
        self.state.experts[place, layer, rank] = expert
        self.hosts[layer, old, rank] = (self.state.experts[:, layer, rank] == old).any(0)
        self.hosts[layer, expert, rank] = True
        return layer, slot, expert
