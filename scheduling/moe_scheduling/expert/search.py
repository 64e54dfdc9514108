"""Local search for better placements, in all layers at once: `search_steps` gives a path of small changes.

Three kinds of step, each vectorised over many layers: a replica of a hot expert in the place of a spare replica of a
cold one (`copies.py`), a swap that takes load off a hot rank, a swap that moves an expert nearer to its tokens. The
path is a log: `decision.py` cuts it, layer by layer, where further steps no longer pay. The steps of a layer never
depend on another layer.

Slots that hold no expert but a placeholder (`idle_slots.py`) are searched like others: a placeholder has no work and is
at home on each rank.

Invariants: each expert keeps a slot and no rank gets more slots; apart from replicas, no step makes the busiest rank of
its layer busier by more than it saves in traffic; the same arguments give the same path.
"""

from dataclasses import dataclass

import numpy as np

from moe_scheduling.expert.copies import spread_copies, wanted_copies
from moe_scheduling.expert.placement import Flags, Floats, Ints, Placement, Singles
from moe_scheduling.expert.search_state import BLOCKED, PlacementChange, SearchState, SlotWork, Swaps

# Part of the mean; a rank whose imbalance is below it is not changed.
_EVEN_ENOUGH = np.float32(1e-4)
# A hot rank is relieved once its imbalance is at least this part of the greatest in its layer.
_HOT_PART = np.float32(0.6)
# Part of a hot rank's imbalance that one move has to gain; 0 for a second try after nothing was found.
_MOVE_PRICE = np.float32(0.3)
# In each round 1 in 8 ranks, the hottest, tries to swap with 6 of the coldest. The n-th hottest starts at the n-th
# coldest, because with the same candidates for all most would choose the same one.
_RANKS_PER_HOT_RANK = 8
_PARTNERS = 6
_MIN_GAIN = np.float32(1e-4)
# Replicas beyond this part of a layer's moves are only for experts that would otherwise fill a rank.
_COPIES_PART = 0.35
# Layers whose imbalance after the swaps exceeds this part of the mean get replicas a second time, with the largest
# share of one replica reduced to this part of the first limit.
_STUCK = np.float32(0.01)
_SECOND_SHARE = 0.6
# Rounds of swaps off hot ranks, in addition to four for each rank.
_BASE_ROUNDS = 8


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Path:
    """Result of a search: changes in order, with the gain and the moves after each.

    Attributes:
        steps: the changes.
        gain_s: [state, layer], seconds a step gained since the start; state 0 is the start.
        moves: [state, layer], experts that are on a rank that did not have them at the start.
    """

    steps: tuple[PlacementChange, ...]
    gain_s: Floats
    moves: Ints


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SearchInput:
    """Input of a search.

    Attributes:
        work_s: [layer, expert], seconds a step that one rank would need for all tokens of an expert.
        traffic_s: [layer, expert, rank], seconds a step of traffic if all tokens of the expert went to that rank;
            None: traffic is not counted.
        move_price_s: seconds a step that a move has to gain.
        max_moves: moves of a layer at which the search ends.
        slot_work: seconds a step of one replica by their number; None: replicas divide `work_s` evenly.
        experts: experts of a layer where `work_s` has rows of placeholders behind them; None: it has none.
        copies: whether replicas may be added.
        cheap_moves: moves of a layer of which a part are for replicas in any case; None: `max_moves`.
    """

    work_s: Floats
    traffic_s: Singles | None
    move_price_s: float
    max_moves: int
    slot_work: SlotWork | None = None
    experts: int | None = None
    copies: bool = True
    cheap_moves: int | None = None


def search_steps(given: SearchInput, placement: Placement) -> Path:
    """Returns a path of changes from a placement to better ones.

    Args:
        given: loads and prices.
        placement: the present placement; each expert has a slot.
    """
    state = _build_state(given, placement)
    state.record()
    every = np.ones(len(state.mean), np.bool_)
    if given.copies:
        moves = given.max_moves if given.cheap_moves is None else given.cheap_moves
        spread_copies(state, _wanted(state, given, 1.0, cheap=int(_COPIES_PART * moves)))
    _level_ranks(state, given, every)
    stuck = (state.imbalance.max(1) > _STUCK * state.mean) & (state.moves < given.max_moves)
    if stuck.any() and given.copies:
        spread_copies(state, np.where(stuck[:, None], _wanted(state, given, _SECOND_SHARE), state.copies))
        _level_ranks(state, given, stuck)
    _reduce_traffic(state, given)
    peaks = np.array(state.peaks)
    return Path(steps=tuple(state.steps), gain_s=peaks[0] - peaks, moves=np.array(state.counts))


def apply_steps(path: Path, table: Ints, states: Ints) -> Ints:
    """The placement [layer, slot] after the first `states[layer]` steps in each layer."""
    table = table.copy()
    for number, step in enumerate(path.steps):
        taken = states[step.layers] > number
        table[step.layers[taken], step.slots[taken]] = step.experts[taken]
    return table


def _build_state(given: SearchInput, placement: Placement) -> SearchState:
    table = placement.physical_to_logical
    layers = len(table)
    work = given.work_s.astype(np.float32)
    state = SearchState(
        experts=table.reshape(layers, placement.ranks, -1).transpose(2, 0, 1).copy(),
        work=work,
        mean=np.divide(work.sum(1), placement.ranks, dtype=np.float32),
        traffic=given.traffic_s,
        slot_work=given.slot_work,
    )
    if given.experts is not None:
        state.welcome(given.experts)
    return state


def _wanted(state: SearchState, given: SearchInput, part: float, cheap: int | None = None) -> Ints:
    _, ranks, places = state.shape
    experts = state.work.shape[1] if given.experts is None else given.experts
    wanted = np.zeros(state.work.shape, np.int64)
    wanted[:, :experts] = wanted_copies(state.work[:, :experts], ranks * places - experts, ranks, places, part, cheap)
    return wanted


# --- swaps that take load off hot ranks


def _level_ranks(state: SearchState, given: SearchInput, allowed: Flags) -> None:
    """Swaps experts of hot ranks for lighter ones of cold ranks, the hottest ranks of all layers in each round."""
    layers, ranks, _ = state.shape
    hot_ranks, half = max(1, ranks // _RANKS_PER_HOT_RANK), ranks // 2
    if not half:
        return
    partners = (np.arange(hot_ranks)[:, None] + np.arange(min(_PARTNERS, half))) % half
    price = np.full(layers, _MOVE_PRICE)
    alive = allowed & (state.mean > 0)
    for _ in range(_BASE_ROUNDS + 4 * ranks):
        order = np.argsort(state.imbalance, axis=1, kind="stable")
        hot = order[:, : -hot_ranks - 1 : -1]
        above = np.take_along_axis(state.imbalance, hot, 1)
        alive &= (above[:, 0] > _EVEN_ENOUGH * state.mean) & (state.moves < given.max_moves)
        due = alive[:, None] & (above > _HOT_PART * above[:, :1]) & (above > _EVEN_ENOUGH * state.mean[:, None])
        layer, turn = np.nonzero(due)
        if not len(layer):
            return
        cold = order[layer[:, None], partners[turn]]
        swaps = _best_swaps(state, layer, hot[layer, turn], cold, price[layer])
        state.swap(swaps)
        # A layer without a good swap tries once more without a price, then is done.
        found = np.zeros(layers, np.bool_)
        found[swaps.layer] = True
        stuck = alive & ~found
        alive &= found | (price > 0)
        price[stuck] = 0.0


def _best_swaps(state: SearchState, layer: Ints, a: Ints, cold: Ints, price: Singles) -> Swaps:
    """Returns for each row the best swap of an expert of rank `a` with one of the ranks `cold[row]`, if any gains.

    Rows are in the order of their layers, the hottest rank first; of rows that choose the same partner the first gets
    it.
    """
    (_, ranks, places), partners = state.shape, cold.shape[1]
    here, there = layer * ranks + a, layer[:, None] * ranks + cold
    imbalance, placement_cost, initial_hosts = state.imbalance.reshape(-1), state.placement_cost, state.initial_hosts
    rows = state.rows.reshape(places, -1)
    load, in_place, slot_traffic = (
        table.reshape(places, -1) for table in (state.load, state.in_place, state.slot_traffic)
    )
    above, below, move_penalty = imbalance[here][:, None], imbalance[there], (price * imbalance[here])[:, None]
    x, y = load[:, here], load[:, there]
    # Traffic and moves of one side of the swap alone, [place, row, partner].
    to_them: Ints = rows[:, here][..., None] + cold
    to_us: Ints = rows[:, there] + a[:, None]
    going = placement_cost.take(to_them) - move_penalty * initial_hosts.take(to_them)
    going += (move_penalty[:, 0] * in_place[:, here] - slot_traffic[:, here])[..., None]
    coming = placement_cost.take(to_us) - move_penalty * initial_hosts.take(to_us)
    coming += move_penalty * in_place[:, there] - slot_traffic[:, there]
    # The busier of both ranks, max(above - x + y, below + x - y), plus traffic and moves: [ours, theirs, row, partner].
    peak = (going + (above - x[..., None]))[:, None] + (coming + y)
    np.maximum(peak, (going + (below + x[..., None]))[:, None] + (coming - y), out=peak)
    flat = peak.reshape(places * places, -1)
    least, row = flat.min(0).reshape(-1, partners), np.arange(len(layer))
    partner = least.argmin(1)
    place_a, place_b = np.divmod(flat.take(row * partners + partner, 1).argmin(0), places)
    b, shift = cold[row, partner], x[place_a, row] - y[place_b, row, partner]
    worse = np.maximum(above[:, 0] - shift, below[row, partner] + shift)
    good = np.nonzero((least[row, partner] < BLOCKED / 2) & (worse < above[:, 0] * (1 - _MIN_GAIN)))[0]
    _, first = np.unique(there[good, partner[good]], return_index=True)
    good = good[np.sort(first)]
    return Swaps(layer[good], a[good], place_a[good], b[good], place_b[good])


# --- swaps that reduce traffic


def _reduce_traffic(state: SearchState, given: SearchInput) -> None:
    """Swaps the experts with the most avoidable traffic for those whose place saves most, all layers at once."""
    layers, ranks, _ = state.shape
    if state.traffic is None or ranks < 2:
        return
    part = np.divide(1, np.maximum(state.copies, 1), dtype=np.float32)
    nearest, column = state.traffic.min(2) * part, np.arange(layers)
    price = np.maximum(np.float32(given.move_price_s), _MIN_GAIN)
    # [layer, slot], where the slots are numbered place by place.
    experts = state.experts.swapaxes(0, 1).reshape(layers, -1)
    avoidable = _by_layer(state.slot_traffic) - nearest[column[:, None], experts]
    for _ in range(given.max_moves):
        slot = avoidable.argmax(1)
        layer = np.nonzero((avoidable[column, slot] > 2 * price) & (state.moves < given.max_moves))[0]
        if not len(layer):
            return
        swaps = _nearest_swaps(state, layer, slot[layer], price)
        state.swap(swaps)
        # A slot is tried once, whether a swap was found or not.
        avoidable[layer, slot[layer]] = 0
        avoidable[swaps.layer, swaps.place_b * ranks + swaps.b] = 0


def _by_layer(table: Singles) -> Singles:
    return table.swapaxes(0, 1).reshape(table.shape[1], -1)


def _nearest_swaps(state: SearchState, layer: Ints, slot: Ints, price: np.float32) -> Swaps:
    """Returns for each row the swap of `slot` that saves most traffic, if that is worth its moves.

    Load added to the busiest rank is subtracted from the traffic saved; both are seconds of a step.
    """
    ranks = state.shape[1]
    row, initial_hosts = np.arange(len(layer)), state.initial_hosts
    place_a, a = np.divmod(slot, ranks)
    rows, load, in_place, slot_traffic = (
        state.rows[:, layer],
        state.load[:, layer],
        state.in_place[:, layer],
        state.slot_traffic[:, layer],
    )
    # First by rank, [row, rank], then by slot.
    to_them, to_us = rows[place_a, row, a][:, None] + np.arange(ranks), rows + a[:, None]
    saved = slot_traffic[place_a, row, a][:, None] - state.placement_cost[to_them]
    saved = saved - price * (in_place[place_a, row, a][:, None] - initial_hosts[to_them])
    saved = saved + slot_traffic - state.placement_cost[to_us] - price * (in_place - initial_hosts[to_us])
    shift = load[place_a, row, a][:, None] - load
    imbalance = state.imbalance[layer]
    limit = np.maximum(imbalance.max(1), _EVEN_ENOUGH * state.mean[layer])[:, None]
    after = np.maximum(imbalance[row, a][:, None] - shift, imbalance + shift)
    saved = saved - np.maximum(after - limit, 0)
    saved = _by_layer(saved)
    best = saved.argmax(1)
    good = saved[row, best] > price * _MIN_GAIN
    place_b, b = np.divmod(best, ranks)
    return Swaps(layer[good], a[good], place_a[good], b[good], place_b[good])
