"""Local search for better placements, in all layers at once: `search_steps` gives a path of small changes.

Three kinds of step, each a row of numpy work over many layers: a copy of a hot expert over a spare copy of a cold one
(`expert_copies.py`), a swap that takes load off a hot rank, a swap that brings an expert nearer to its tokens. The path
is a log: `expert.py` cuts it, layer by layer, where going on no longer pays. A layer's steps never depend on another
layer.

Invariants: each expert keeps a slot, no rank gets a slot more; the copies aside, no step makes the busiest rank of its
layer busier but by less than it saves in traffic; the same arguments give the same path.
"""

from dataclasses import dataclass

import numpy as np

from moe_scheduling.expert.copies import spread_copies, wanted_copies
from moe_scheduling.expert.placement import Flags, Floats, Ints, Placement, Singles
from moe_scheduling.expert.search_state import BLOCKED, SearchState, Step, Swaps

# A rank that is busier than the mean by less is left alone.
_EVEN_ENOUGH = np.float32(1e-4)
# A hot rank waits for its turn until the hottest of its layer is not more than so many times above the mean.
_HOT_PART = np.float32(0.6)
# Part of a hot rank's excess that one move has to be worth; without it, once nothing is found with it.
_MOVE_PRICE = np.float32(0.3)
# Of so many ranks one at a time is hot; each looks for a partner among so many cold ones, the hottest from the coldest
# on, the next from the second coldest on: with the same for all, most would want the same one.
_RANKS_TO_A_HOT_ONE = 8
_PARTNERS = 6
_LEAST_GAIN = np.float32(1e-4)
# Copies beyond this part of a layer's moves are made only of experts that fill a rank otherwise.
_COPIES_PART = 0.35
# Where swaps leave the busiest rank so far above the mean, copies are made once more, of experts with this part of the
# share that was to be borne at first.
_STUCK = np.float32(0.01)
_SECOND_SHARE = 0.6
# Rounds in which hot ranks get rid of load, beside four for each rank.
_LEAST_ROUNDS = 8


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
class SearchInput:
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


def search_steps(problem: SearchInput, placement: Placement) -> Path:
    """The path from a placement to better ones.

    Args:
        problem: loads and prices.
        placement: where the experts lie; each has a slot.
    """
    board = _lay_out(problem, placement)
    board.record()
    every = np.ones(len(board.mean), np.bool_)
    spread_copies(board, _wanted(board, 1.0, cheap=int(_COPIES_PART * problem.most_moves)))
    _level_ranks(board, problem, every)
    stuck = (board.excess.max(1) > _STUCK * board.mean) & (board.moves < problem.most_moves)
    if stuck.any():
        spread_copies(board, np.where(stuck[:, None], _wanted(board, _SECOND_SHARE), board.copies))
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


def _lay_out(problem: SearchInput, placement: Placement) -> SearchState:
    table = placement.physical_to_logical
    layers = len(table)
    work = problem.work_s.astype(np.float32)
    return SearchState(
        experts=table.reshape(layers, placement.ranks, -1).transpose(2, 0, 1).copy(),
        work=work,
        mean=np.divide(work.sum(1), placement.ranks, dtype=np.float32),
        carry=problem.carry_s,
    )


def _wanted(board: SearchState, part: float, cheap: int | None = None) -> Ints:
    _, ranks, places = board.shape
    return wanted_copies(board.work, ranks * places - board.work.shape[1], ranks, places, part, cheap)


# --- swaps that take load off hot ranks


def _level_ranks(board: SearchState, problem: SearchInput, allowed: Flags) -> None:
    """Swaps an expert of a hot rank for a lighter one of a cold rank, the hottest ranks of all layers at once."""
    layers, ranks, _ = board.shape
    hot_ranks, half = max(1, ranks // _RANKS_TO_A_HOT_ONE), ranks // 2
    if not half:
        return
    partners = (np.arange(hot_ranks)[:, None] + np.arange(min(_PARTNERS, half))) % half
    price = np.full(layers, _MOVE_PRICE)
    alive = allowed & (board.mean > 0)
    for _ in range(_LEAST_ROUNDS + 4 * ranks):
        order = np.argsort(board.excess, axis=1, kind="stable")
        hot = order[:, : -hot_ranks - 1 : -1]
        above = np.take_along_axis(board.excess, hot, 1)
        alive &= (above[:, 0] > _EVEN_ENOUGH * board.mean) & (board.moves < problem.most_moves)
        due = alive[:, None] & (above > _HOT_PART * above[:, :1]) & (above > _EVEN_ENOUGH * board.mean[:, None])
        layer, turn = np.nonzero(due)
        if not len(layer):
            return
        cold = order[layer[:, None], partners[turn]]
        swaps = _best_swaps(board, layer, hot[layer, turn], cold, price[layer])
        board.swap(swaps)
        # What found nothing tries once more without a price, and then no more.
        found = np.zeros(layers, np.bool_)
        found[swaps.layer] = True
        stuck = alive & ~found
        alive &= found | (price > 0)
        price[stuck] = 0.0


def _best_swaps(board: SearchState, layer: Ints, a: Ints, cold: Ints, price: Singles) -> Swaps:
    """For each row, the best swap of an expert of rank `a` with one of the ranks `cold[row]`, where one is good.

    Of rows that want the same partner the first has it; the rows are in the order of their layers, the hottest first.
    """
    (_, ranks, places), partners = board.shape, cold.shape[1]
    here, there = layer * ranks + a, layer[:, None] * ranks + cold
    excess, fees, home = board.excess.reshape(-1), board.fees, board.home
    rows = board.rows.reshape(places, -1)
    load, kept, paid = (table.reshape(places, -1) for table in (board.load, board.kept, board.paid))
    above, below, toll = excess[here][:, None], excess[there], (price * excess[here])[:, None]
    x, y = load[:, here], load[:, there]
    # Traffic and moves of one side of the swap alone, [place, row, partner].
    to_them: Ints = rows[:, here][..., None] + cold
    to_us: Ints = rows[:, there] + a[:, None]
    going = fees.take(to_them) - toll * home.take(to_them)
    going += (toll[:, 0] * kept[:, here] - paid[:, here])[..., None]
    coming = fees.take(to_us) - toll * home.take(to_us)
    coming += toll * kept[:, there] - paid[:, there]
    # The busier of both ranks, max(above - x + y, below + x - y), and what comes with it: [ours, theirs, row, partner].
    peak = (going + (above - x[..., None]))[:, None] + (coming + y)
    np.maximum(peak, (going + (below + x[..., None]))[:, None] + (coming - y), out=peak)
    flat = peak.reshape(places * places, -1)
    least, row = flat.min(0).reshape(-1, partners), np.arange(len(layer))
    partner = least.argmin(1)
    place_a, place_b = np.divmod(flat.take(row * partners + partner, 1).argmin(0), places)
    b, shift = cold[row, partner], x[place_a, row] - y[place_b, row, partner]
    worse = np.maximum(above[:, 0] - shift, below[row, partner] + shift)
    good = np.nonzero((least[row, partner] < BLOCKED / 2) & (worse < above[:, 0] * (1 - _LEAST_GAIN)))[0]
    _, first = np.unique(there[good, partner[good]], return_index=True)
    good = good[np.sort(first)]
    return Swaps(layer[good], a[good], place_a[good], b[good], place_b[good])


# --- swaps that bring experts nearer to their tokens


def _bring_near(board: SearchState, problem: SearchInput) -> None:
    """Swaps the expert that has farthest to its tokens for the one whose place serves both best, all layers at once."""
    layers, ranks, _ = board.shape
    if board.carry is None or ranks < 2:
        return
    part = np.divide(1, board.copies, dtype=np.float32)
    nearest, column = board.carry.min(2) * part, np.arange(layers)
    price = np.maximum(np.float32(problem.move_price_s), _LEAST_GAIN)
    # [layer, slot], where the slots are numbered place by place.
    experts = board.experts.swapaxes(0, 1).reshape(layers, -1)
    hope = _by_layer(board.paid) - nearest[column[:, None], experts]
    for _ in range(problem.most_moves):
        slot = hope.argmax(1)
        layer = np.nonzero((hope[column, slot] > 2 * price) & (board.moves < problem.most_moves))[0]
        if not len(layer):
            return
        swaps = _nearest_swaps(board, layer, slot[layer], price)
        board.swap(swaps)
        # What changed its place, and what found none, is not tried again.
        hope[layer, slot[layer]] = 0
        hope[swaps.layer, swaps.place_b * ranks + swaps.b] = 0


def _by_layer(table: Singles) -> Singles:
    return table.swapaxes(0, 1).reshape(table.shape[1], -1)


def _nearest_swaps(board: SearchState, layer: Ints, slot: Ints, price: np.float32) -> Swaps:
    """For each row, the slot with which to swap `slot` for the most traffic saved, where that is worth the moves.

    What a swap makes the busiest rank busier is taken off what it saves: both are seconds of a step.
    """
    ranks = board.shape[1]
    row, home = np.arange(len(layer)), board.home
    place_a, a = np.divmod(slot, ranks)
    rows, load, kept, paid = board.rows[:, layer], board.load[:, layer], board.kept[:, layer], board.paid[:, layer]
    # Of ours by rank, [row, rank], then by slot.
    to_them, to_us = rows[place_a, row, a][:, None] + np.arange(ranks), rows + a[:, None]
    saved = paid[place_a, row, a][:, None] - board.fees[to_them]
    saved = saved - price * (kept[place_a, row, a][:, None] - home[to_them])
    saved = saved + paid - board.fees[to_us] - price * (kept - home[to_us])
    shift = load[place_a, row, a][:, None] - load
    excess = board.excess[layer]
    limit = np.maximum(excess.max(1), _EVEN_ENOUGH * board.mean[layer])[:, None]
    after = np.maximum(excess[row, a][:, None] - shift, excess + shift)
    saved = saved - np.maximum(after - limit, 0)
    saved = _by_layer(saved)
    best = saved.argmax(1)
    good = saved[row, best] > price * _LEAST_GAIN
    place_b, b = np.divmod(best, ranks)
    return Swaps(layer[good], a[good], place_a[good], b[good], place_b[good])
