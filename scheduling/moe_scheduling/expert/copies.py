"""Which experts of a layer should have copies, and laying them over copies that are not needed: a step of the search.

A share may be as large as leaves the other places of its rank room for the coldest experts. Copies are laid the largest
share first, each on the least loaded rank that can take it.
"""

from dataclasses import dataclass, field

import numpy as np

from moe_scheduling.expert.placement import Flags, Ints, Singles, mark_hosts
from moe_scheduling.expert.search_state import BLOCKED, SearchState, Step

# Part of a rank's mean that a share may take where copies would take most of the moves.
_FILLING = np.float32(0.8)

Change = tuple[Ints, Ints, Ints]
"""Rows of layer, slot and the expert that it takes."""


def wanted_copies(
    work: Singles, spare: int, ranks: int, places: int, part: float = 1.0, cheap: int | None = None
) -> Ints:
    """Copies that each expert should have: [layer, expert] -> [layer, expert], `spare` more than experts at most.

    A share may be as large as leaves the other places of its rank room for the coldest experts: a larger one forces its
    rank above the mean, a smaller one costs moves and wins nothing. `part` of that limit is taken. Where this takes
    more than `cheap` copies, which leave few moves for all else, shares may be as large as fill a rank in part; None:
    copies cost nothing. Where `spare` copies do not reach, the largest share is as small as they make it.
    """
    limit = _largest_share(work, ranks, places) * np.float32(part)
    if cheap is not None:
        filling = np.divide(_FILLING * work.sum(1), ranks, dtype=np.float32)
        limit = _raise_share(work, limit, np.maximum(limit, filling), cheap)
    limit = _raise_share(work, limit, np.maximum(work.max(1), limit) * np.float32(1.001), spare)
    return np.asarray(1 + _extra_copies(work, limit))


def _raise_share(work: Singles, low: Singles, high: Singles, most: int) -> Singles:
    """By layer, the least share from `low` to `high` that needs no more than `most` copies; `high` where none is."""
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


def spread_copies(board: SearchState, wanted: Ints) -> None:
    """Lays copies that are wanted over spare ones, as one state of the path: half of them may make a layer worse."""
    queue = _queue_of_copies(board, wanted)
    if not queue.shape[1]:
        return
    laying = _Laying(board, wanted)
    changes = [change for expert in queue.T for change in laying.lay(expert)]
    layers, slots, experts = (np.concatenate(parts) for parts in zip(*changes, strict=True))
    if len(layers):
        # A slot that changes twice has what it gets last, as numpy assigns.
        board.steps.append(Step(layers=layers, slots=slots, experts=experts))
        board.settle()
        board.record()


def _queue_of_copies(board: SearchState, wanted: Ints) -> Ints:
    """[layer, place in the queue]: the experts that lack copies, the largest share first; -1 behind the last."""
    lacking = np.maximum(wanted - board.copies, 0)
    layer, expert = np.nonzero(lacking)
    times = lacking[layer, expert]
    share = board.work[layer, expert] / wanted[layer, expert]
    order = np.lexsort((expert, -share, layer))
    layer, expert = np.repeat(layer[order], times[order]), np.repeat(expert[order], times[order])
    lengths = lacking.sum(1)
    queue = np.full((len(lacking), int(lengths.max())), -1)
    queue[layer, np.arange(len(layer)) - np.repeat(np.cumsum(lengths) - lengths, lengths)] = expert
    return queue


@dataclass(slots=True)
class _Laying:
    """Copies on their way: what is spare, and how full the ranks are by now.

    Attributes:
        board: whose `experts` are changed; the rest of it is settled afterwards.
        wanted: [layer, expert], copies.
        share: [layer, expert], work of a copy once all are laid.
        load: [layer, rank], work above the mean by now.
        hosts: [layer, expert, rank], by now.
        spare: [layer, expert], copies that are not needed, by now.
        slots: [layer, n], those of experts that had copies to spare, padded.
        ranks: of these slots.
        held: what lay in them.
        freed: what their rank gets rid of when a new expert comes, less than nothing; `BLOCKED` where none can.
    """

    board: SearchState
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
        board, table = self.board, self.board.table
        _, ranks, places = board.shape
        self.share = np.divide(board.work, self.wanted, dtype=np.float32)
        self.load, self.hosts = board.excess.copy(), mark_hosts(table, board.work.shape[1], ranks)
        self.spare = board.copies - self.wanted
        is_spare = np.take_along_axis(self.spare > 0, table, 1)
        self.slots = np.argsort(~is_spare, axis=1, kind="stable")[:, : int(is_spare.sum(1).max())]
        self.ranks, self.held = self.slots // places, np.take_along_axis(table, self.slots, 1)
        self.freed = -np.take_along_axis(self.share, self.held, 1)
        self.freed[~np.take_along_axis(is_spare, self.slots, 1)] = BLOCKED

    def lay(self, expert: Ints) -> list[Change]:
        """One expert for each layer, where it is not -1."""
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
        return changes + self._lay_elsewhere(layer, room[layer], expert[layer]) if len(layer) else changes

    def _lay_elsewhere(self, layer: Ints, room: Singles, expert: Ints) -> list[Change]:
        """Where each rank with a spare copy has the expert: another takes it, and gives one of its own for the copy."""
        places, row = self.board.shape[2], np.arange(len(layer))
        pick = room.argmin(1)
        giver = np.where(self.hosts[layer, expert], BLOCKED, self.load[layer]).argmin(1)
        theirs, to = self.board.experts[:, layer, giver], self.ranks[layer, pick]
        given = self.share[layer, theirs]
        after = np.maximum(self.load[layer, giver] + self.share[layer, expert] - given, room[row, pick] + given)
        after[self.hosts[layer, theirs, to] | self.hosts[layer, expert, giver]] = BLOCKED
        place = after.argmin(0)
        good = after[place, row] < BLOCKED / 2
        layer, pick, expert, giver, place = layer[good], pick[good], expert[good], giver[good], place[good]
        given_expert = self.board.experts[place, layer, giver]
        return [self._put(layer, giver * places + place, expert), self._take(layer, pick, given_expert)]

    def _take(self, layer: Ints, pick: Ints, expert: Ints) -> Change:
        """A spare slot gets an expert."""
        held = self.held[layer, pick]
        self.freed[layer, pick] = BLOCKED
        self.spare[layer, held] -= 1
        # What has no copy to spare any more gives none.
        last = self.spare[layer, held] == 0
        none, held = layer[last], held[last]
        freed = self.freed[none]
        freed[self.held[none] == held[:, None]] = BLOCKED
        self.freed[none] = freed
        return self._put(layer, self.slots[layer, pick], expert)

    def _put(self, layer: Ints, slot: Ints, expert: Ints) -> Change:
        rank, place = np.divmod(slot, self.board.shape[2])
        old = self.board.experts[place, layer, rank]
        self.load[layer, rank] += self.share[layer, expert] - self.share[layer, old]
        self.board.experts[place, layer, rank] = expert
        self.hosts[layer, old, rank] = (self.board.experts[:, layer, rank] == old).any(0)
        self.hosts[layer, expert, rank] = True
        return layer, slot, expert
