"""Local search for better placements, in all layers at once: `search_steps` gives a path of small changes.

Three kinds of step, each a row of numpy work over many layers: a copy of a hot expert over a spare copy of a cold one,
a swap that takes load off a hot rank, a swap that brings an expert nearer to its tokens. The path is a log: `expert.py`
cuts it, layer by layer, where going on no longer pays. A layer's steps never depend on another layer.

Invariants: each expert keeps a slot, no rank gets a slot more; a step that goes on from a state never makes the busiest
rank of its layer busier, the copies aside; the same arguments give the same path.
"""

from dataclasses import dataclass, field

import numpy as np

from moe_scheduling.placement import Flags, Floats, Ints, Placement, Singles, count_copies, mark_hosts

# A rank that is busier than the mean by less is left alone.
_EVEN_ENOUGH = np.float32(5e-4)
# A hot rank waits for its turn until the hottest of its layer is not more than so many times above the mean.
_HOT_PART = np.float32(0.6)
# Part of a hot rank's excess that one move has to be worth; without it, once nothing is found with it.
_MOVE_PRICE = np.float32(0.3)
_BLOCKED = np.float32(1e30)
_LEAST_GAIN = np.float32(1e-4)
# Where swaps leave the busiest rank so far above the mean, copies are made once more, of experts with this part of the
# share that was to be borne at first.
_STUCK = np.float32(0.01)
_SECOND_SHARE = 0.6
# Rounds in which hot ranks get rid of load, beside four for each rank.
_LEAST_ROUNDS = 8


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Step:
    """One change in some layers: `slots[i]` of layer `layers[i]` takes the expert `experts[i]`."""

    layers: Ints
    slots: Ints
    experts: Ints


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Path:
    """What the search did.

    Attributes:
        steps: the changes, in order.
        won_s: [state, layer], seconds a step won since the start; the first state is the start.
        moves: [state, layer], experts that are on a rank where they were not at the start.
    """

    steps: tuple[Step, ...]
    won_s: Floats
    moves: Ints


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Problem:
    """What is searched for a placement.

    Attributes:
        work_s: [layer, expert], seconds a step that all tokens of an expert take one rank.
        carry_s: [layer, expert, rank], seconds a step of traffic if all of them went to that rank; None: no traffic.
        move_price_s: seconds a step that a move has to win.
        most_moves: moves of a layer beyond which the search does not go.
    """

    work_s: Floats
    carry_s: Singles | None
    move_price_s: float
    most_moves: int


@dataclass(slots=True)
class _Board:
    """The state of the search; `search_steps` owns it.

    Tables are [layer, rank, place], with `slot = rank * places + place`, or [layer, expert, rank], of which a cell is
    read by its flat number: that is several times faster than three indices.
    """

    experts: Ints
    work: Singles
    mean: Singles
    carry: Singles | None
    home: Flags
    hosts: Flags = field(init=False)
    copies: Ints = field(init=False)
    # Part and work of one copy of an expert, [layer, expert]; traffic of what lies in each slot.
    part: Singles = field(init=False)
    share: Singles = field(init=False)
    paid: Singles = field(init=False)
    excess: Singles = field(init=False)
    carried: Singles = field(init=False)
    moves: Ints = field(init=False)
    steps: list[Step] = field(default_factory=list)
    peaks: list[Floats] = field(default_factory=list)
    counts: list[Ints] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.settle()

    @property
    def shape(self) -> tuple[int, int, int]:
        """Layers, ranks, places."""
        layers, ranks, places = self.experts.shape
        return layers, ranks, places

    def cells(self, layer: Ints, expert: Ints, rank: Ints) -> Ints:
        """Flat numbers in tables [layer, expert, rank]."""
        return np.asarray((layer * self.work.shape[1] + expert) * self.experts.shape[1] + rank)

    def settle(self) -> None:
        """All that follows from where the experts lie, anew."""
        layers, ranks, _ = self.shape
        table = self.experts.reshape(layers, -1)
        self.copies = count_copies(table, self.work.shape[1])
        self.hosts = mark_hosts(table, self.work.shape[1], ranks)
        self.part = np.divide(1, self.copies, dtype=np.float32)
        self.share = self.work * self.part
        layer, rank = np.arange(layers)[:, None, None], np.arange(ranks)[:, None]
        here = self.cells(layer, self.experts, rank)
        self.excess = self.share[layer, self.experts].sum(2) - self.mean[:, None]
        self.moves = np.asarray((~self.home.reshape(-1)[here]).sum((1, 2)), dtype=np.int64)
        self.paid = np.zeros(self.experts.shape, np.float32)
        if self.carry is not None:
            self.paid = self.carry.reshape(-1)[here] * self.part[layer, self.experts]
        self.carried = self.paid.sum((1, 2))

    def record(self) -> None:
        """Notes the state."""
        self.peaks.append(self.excess.max(1) + self.carried.astype(np.float64))
        self.counts.append(self.moves.copy())


def search_steps(problem: Problem, placement: Placement) -> Path:
    """The path from a placement to better ones.

    Args:
        problem: loads and prices.
        placement: where the experts lie; each has a slot.
    """
    board = _lay_out(problem, placement)
    board.record()
    every = np.ones(len(board.mean), np.bool_)
    _spread_copies(board, _wanted(board, 1.0))
    _level_ranks(board, problem, every)
    stuck = (board.excess.max(1) > _STUCK * board.mean) & (board.moves < problem.most_moves)
    if stuck.any():
        _spread_copies(board, np.where(stuck[:, None], _wanted(board, _SECOND_SHARE), board.copies))
        _level_ranks(board, problem, stuck)
    _bring_near(board, problem)
    peaks = np.array(board.peaks)
    return Path(steps=tuple(board.steps), won_s=peaks[0] - peaks, moves=np.array(board.counts))


def apply_steps(path: Path, table: Ints, states: Ints) -> Ints:
    """The placement [layer, slot] after the first `states[layer]` steps in each layer."""
    table = table.copy()
    for number, step in enumerate(path.steps):
        taken = states[step.layers] > number
        table[step.layers[taken], step.slots[taken]] = step.experts[taken]
    return table


def _lay_out(problem: Problem, placement: Placement) -> _Board:
    table = placement.physical_to_logical
    layers, experts = problem.work_s.shape
    work = problem.work_s.astype(np.float32)
    return _Board(
        experts=table.reshape(layers, placement.ranks, -1).copy(),
        work=work,
        mean=np.divide(work.sum(1), placement.ranks, dtype=np.float32),
        carry=problem.carry_s,
        home=mark_hosts(table, experts, placement.ranks),
    )


# --- copies of the hottest experts


def _wanted(board: _Board, part: float) -> Ints:
    _, ranks, places = board.shape
    return wanted_copies(board.work, ranks * places - board.work.shape[1], ranks, places, part)


def wanted_copies(work: Singles, spare: int, ranks: int, places: int, part: float = 1.0) -> Ints:
    """Copies that each expert should have: [layer, expert] -> [layer, expert], `spare` more than experts at most.

    A share may be as large as leaves the other places of its rank room for the coldest experts: a larger one forces its
    rank above the mean, a smaller one costs moves and wins nothing. Where `spare` copies do not reach for that, the
    largest share is as small as they make it. `part` of that limit is taken.
    """
    limit = _largest_share(work, ranks, places) * np.float32(part)
    low, high = limit, np.maximum(work.max(1), limit) * np.float32(1.001)
    short = _extra_copies(work, limit).sum(1) > spare
    for _ in range(16):
        if not short.any():
            break
        middle = (low + high) / 2
        fails = _extra_copies(work, middle).sum(1) > spare
        low, high = np.where(fails, middle, low), np.where(fails, high, middle)
    return np.asarray(1 + _extra_copies(work, np.where(short, high, limit)))


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


def _spread_copies(board: _Board, wanted: Ints) -> None:
    """Lays copies that are wanted over spare ones, the largest share first, each on the least loaded rank that can."""
    layers, ranks, places = board.shape
    experts, before = board.work.shape[1], len(board.steps)
    queue = _queue_of_copies(board, wanted)
    slots, open_ = _spare_slots(board, wanted)
    if not queue.shape[1] or not slots.shape[1]:
        return
    column = np.arange(layers)[:, None]
    share = np.divide(board.work, wanted, dtype=np.float32)
    rank, held = slots // places, board.experts.reshape(layers, -1)[column, slots]
    released, ours, where = board.share[column, held], column * experts + held, column * ranks + rank
    load, hosts = board.excess.copy(), board.hosts.copy()
    spare = (board.copies - wanted).reshape(-1)
    for expert in queue.T:
        closed = hosts.reshape(-1)[board.cells(column, expert[:, None], rank)]
        closed |= ~open_ | (spare[ours] <= 0)
        room = load.reshape(-1)[where] - released
        room[closed] = _BLOCKED
        pick = room.argmin(1)
        layer = np.nonzero((expert >= 0) & ~closed[column[:, 0], pick])[0]
        pick, new = pick[layer], expert[layer]
        slot, on = slots[layer, pick], rank[layer, pick]
        load[layer, on] += share[layer, new] - released[layer, pick]
        open_[layer, pick] = False
        spare[ours[layer, pick]] -= 1
        hosts[layer, new, on] = True
        board.experts[layer, on, slot % places] = new
        board.steps.append(Step(layers=layer, slots=slot, experts=new))
    # The copies are one state of the path: half of them may make a layer worse.
    for _ in board.steps[before + 1 :]:
        board.record()
    board.settle()
    board.record()


def _queue_of_copies(board: _Board, wanted: Ints) -> Ints:
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


def _spare_slots(board: _Board, wanted: Ints) -> tuple[Ints, Flags]:
    """Slots of experts that have more copies than they should, [layer, n], and which of these are no padding."""
    table = board.experts.reshape(len(wanted), -1)
    spare = np.take_along_axis(board.copies > wanted, table, 1)
    slots = np.argsort(~spare, axis=1, kind="stable")[:, : int(spare.sum(1).max())]
    return slots, np.take_along_axis(spare, slots, 1)


# --- swaps that take load off hot ranks


def _level_ranks(board: _Board, problem: Problem, allowed: Flags) -> None:
    """Swaps an expert of a hot rank for a lighter one of a cold rank, the hottest ranks of all layers at once."""
    layers, ranks, _ = board.shape
    hot_ranks = max(1, ranks // 8)
    partners = min(4, ranks // 2 // hot_ranks)
    if not partners:
        return
    price = np.full(layers, _MOVE_PRICE)
    alive = allowed & (board.mean > 0)
    for _ in range(_LEAST_ROUNDS + 4 * ranks):
        order = np.argsort(board.excess, axis=1, kind="stable")
        hot = order[:, : -hot_ranks - 1 : -1]
        cold = order[:, : hot_ranks * partners].reshape(layers, partners, hot_ranks)
        above = np.take_along_axis(board.excess, hot, 1)
        alive &= (above[:, 0] > _EVEN_ENOUGH * board.mean) & (board.moves < problem.most_moves)
        due = alive[:, None] & (above > _HOT_PART * above[:, :1]) & (above > _EVEN_ENOUGH * board.mean[:, None])
        layer, turn = np.nonzero(due)
        if not len(layer):
            return
        swap = _best_swaps(board, layer, hot[layer, turn], cold[layer, :, turn], price[layer])
        _swap(board, swap)
        # What found nothing tries once more without a price, and then no more.
        found = np.zeros(layers, np.bool_)
        found[swap.layer] = True
        stuck = alive & ~found
        alive &= found | (price > 0)
        price[stuck] = 0.0


@dataclass(frozen=True, slots=True)
class _Swaps:
    """Rows of swaps: the place `place_a` of rank `a` with `place_b` of rank `b`; no rank of a layer is in two rows."""

    layer: Ints
    a: Ints
    place_a: Ints
    b: Ints
    place_b: Ints


def _best_swaps(board: _Board, layer: Ints, a: Ints, cold: Ints, price: Singles) -> _Swaps:
    """For each row, the best swap of an expert of rank `a` with one of the ranks `cold[row]`, where one is good."""
    partners, places = cold.shape[1], board.shape[2]
    layer2, layer3 = layer[:, None], layer[:, None, None]
    ours, theirs = board.experts[layer, a], board.experts[layer2, cold]
    above, below = board.excess[layer, a], board.excess[layer2, cold]
    our_share, their_share = board.share[layer2, ours], board.share[layer3, theirs]
    toll = (price * above)[:, None, None]
    # What depends on one side of the swap alone: [row, place, partner] and [row, partner, place].
    our_home = board.home.reshape(-1)[board.cells(layer2, ours, a[:, None])]
    to_them = board.cells(layer3, ours[..., None], cold[:, None])
    our_part, their_part = board.part[layer2, ours][..., None], board.part[layer3, theirs]
    going = _tolls(board, to_them, our_home[..., None], our_part, board.paid[layer, a][..., None], toll)
    their_home = board.home.reshape(-1)[board.cells(layer3, theirs, cold[..., None])]
    to_us = board.cells(layer3, theirs, a[:, None, None])
    coming = _tolls(board, to_us, their_home, their_part, board.paid[layer2, cold], toll)
    peak = np.maximum(
        (above[:, None] - our_share)[:, :, None, None] + their_share[:, None],
        our_share[:, :, None, None] + (below[..., None] - their_share)[:, None],
    )
    np.maximum(peak, 0, out=peak)
    peak += going[..., None]
    peak += coming[:, None]
    flat = peak.reshape(len(layer), -1)
    best = flat.argmin(1)
    place_a, rest = np.divmod(best, partners * places)
    partner, place_b = np.divmod(rest, places)
    row = np.arange(len(layer))
    shift = our_share[row, place_a] - their_share[row, partner, place_b]
    worse = np.maximum(above - shift, below[row, partner] + shift)
    good = (flat[row, best] < _BLOCKED / 2) & (worse < above * (1 - _LEAST_GAIN))
    return _Swaps(layer[good], a[good], place_a[good], cold[row[good], partner[good]], place_b[good])


def _tolls(board: _Board, to: Ints, at_home: Flags, part: Singles, paid: Singles, price: Singles) -> Singles:
    """Price and traffic of experts that go to other cells; what comes home costs less than nothing.

    Blocked where a rank has the expert already.
    """
    tolls = price * (at_home.astype(np.float32) - board.home.reshape(-1)[to])
    if board.carry is not None:
        tolls += board.carry.reshape(-1)[to] * part - paid
    tolls[board.hosts.reshape(-1)[to]] = _BLOCKED
    return tolls


def _swap(board: _Board, swap: _Swaps) -> None:
    layer, a, b = swap.layer, swap.a, swap.b
    if not len(layer):
        return
    layers, _, places = board.shape
    leaving = board.experts[layer, a, swap.place_a]
    coming = board.experts[layer, b, swap.place_b]
    shift = board.share[layer, leaving] - board.share[layer, coming]
    board.excess[layer, a] -= shift
    board.excess[layer, b] += shift
    home, hosts, net = board.home.reshape(-1), board.hosts.reshape(-1), np.zeros(len(layer))
    for expert, old, new, place in ((leaving, a, b, swap.place_b), (coming, b, a, swap.place_a)):
        board.experts[layer, new, place] = expert
        gone, come = board.cells(layer, expert, old), board.cells(layer, expert, new)
        net += home[gone].astype(np.float64) - home[come]
        hosts[gone], hosts[come] = False, True
        if board.carry is not None:
            carry, part = board.carry.reshape(-1), board.part[layer, expert]
            board.paid[layer, new, place] = carry[come] * part
            saved = (carry[gone] - carry[come]) * part
            board.carried -= np.bincount(layer, saved, layers).astype(np.float32)
    board.moves += np.bincount(layer, net, layers).astype(np.int64)
    slots = np.concatenate([a * places + swap.place_a, b * places + swap.place_b])
    both = np.concatenate([layer, layer])
    board.steps.append(Step(layers=both, slots=slots, experts=np.concatenate([coming, leaving])))
    board.record()


# --- swaps that bring experts nearer to their tokens


def _bring_near(board: _Board, problem: Problem) -> None:
    """Swaps the expert that has farthest to its tokens for the one whose place serves both best, all layers at once."""
    layers, ranks, places = board.shape
    if board.carry is None or ranks < 2:
        return
    nearest, column = board.carry.min(2) * board.part, np.arange(layers)
    price = np.maximum(np.float32(problem.move_price_s), _LEAST_GAIN)
    hope = board.paid.reshape(layers, -1) - nearest[column[:, None], board.experts.reshape(layers, -1)]
    for _ in range(problem.most_moves):
        slot = hope.argmax(1)
        layer = np.nonzero((hope[column, slot] > 2 * price) & (board.moves < problem.most_moves))[0]
        if not len(layer):
            return
        swap = _nearest_swaps(board, layer, slot[layer], price)
        _swap(board, swap)
        # What changed its place, and what found none, is not tried again.
        hope[layer, slot[layer]] = 0
        hope[swap.layer, swap.b * places + swap.place_b] = 0


def _nearest_swaps(board: _Board, layer: Ints, slot: Ints, price: np.float32) -> _Swaps:
    """For each row, the slot with which to swap `slot` for the most traffic saved, where that is worth the moves."""
    layers, ranks, places = board.shape
    row, layer2 = np.arange(len(layer)), layer[:, None]
    a, rank = slot // places, np.arange(ranks * places) // places
    theirs = board.experts.reshape(layers, -1)[layer]
    ours = theirs[row, slot]
    paid = board.paid.reshape(layers, -1)[layer]
    to_us = board.cells(layer2, theirs, a[:, None])
    home, hosts = board.home.reshape(-1), board.hosts.reshape(-1)
    our_home, their_home = board.home[layer, ours], home[board.cells(layer2, theirs, rank)]
    # Of ours by rank, [row, rank], then by slot.
    assert board.carry is not None
    carried = board.carry[layer, ours] * board.part[layer, ours][:, None]
    going = carried + price * (our_home[row, a][:, None].astype(np.float32) - our_home)
    going[board.hosts[layer, ours]] = _BLOCKED
    saved = (paid[row, slot][:, None] - going)[:, rank]
    saved += paid - board.carry.reshape(-1)[to_us] * board.part[layer2, theirs]
    saved -= price * (their_home.astype(np.float32) - home[to_us])
    shift = board.share[layer, ours][:, None] - board.share[layer2, theirs]
    excess = board.excess[layer]
    limit = np.maximum(excess.max(1), _EVEN_ENOUGH * board.mean[layer])[:, None]
    after = np.maximum(excess[row, a][:, None] - shift, excess[:, rank] + shift)
    saved[hosts[to_us] | (after > limit)] = 0
    best = saved.argmax(1)
    good = saved[row, best] > price * _LEAST_GAIN
    return _Swaps(layer[good], a[good], slot[good] % places, rank[best[good]], best[good] % places)
