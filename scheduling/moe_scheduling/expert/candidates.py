"""The candidate placements of a decision: paths of the search, with and without copies, each cut where it stops paying.

With measured time to read an expert there are two: one keeps the copies and may add some, the other serves each expert
from one slot and leaves the rest idle, which small steps want (`layer_time.py`).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from moe_scheduling.expert.cost import ExpertCosts, ExpertLoad, layer_time, link_costs, traffic_costs
from moe_scheduling.expert.idle_slots import drop_copies, fill_idle, park_idle
from moe_scheduling.expert.placement import Floats, Ints, Placement, Singles
from moe_scheduling.expert.search import Path, SearchInput, apply_steps, search_steps
from moe_scheduling.expert.search_state import SlotWork
from moe_scheduling.expert.settings import ExpertSettings

# Moves of a round, as part of those of a placement computed from nothing. The load is an estimate; the rest follows in
# the next round, from a newer one, if it still pays.
_ROUND_PART = 0.24
# Further moves of the same round gain at least this part of a layer's time each: what matters does not wait.
_FURTHER_WORTH = 1e-3
# Least moves of a round in a layer; in a small group that part is less than one or two swaps.
_MIN_ROUND = 4
# The search continues beyond the budget, so that the best moves are chosen among more.
_SEARCH_AHEAD = 1.1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PlacementPath:
    """A path of the search from a start that nothing has to move for.

    Attributes:
        path: changes in order, with the gain in seconds a step.
        start: [layer, slot], with placeholders in idle slots.
        before: [layer, slot], the placement in force.
        work: [layer, expert], load of the experts.
        ranks: ranks of the group.
        budget: most moves of a round.
        further_s: seconds a step that each move has to gain in a round with more; None: never more.
    """

    path: Path
    start: Ints
    before: Ints
    work: Floats
    ranks: int
    budget: int
    further_s: float | None

    def table(self, price_s: float) -> Ints:
        """Returns [layer, slot]: the placement where each move gains `price_s` seconds a step at least."""
        states, layers = cut_path(self.path, price_s, self.budget), np.arange(len(self.start))
        if self.further_s is not None:
            further = (self.path.gain_s - max(price_s, self.further_s) * self.path.moves).argmax(0)
            if self.path.moves[further, layers].sum() > self.path.moves[states, layers].sum():
                states = further
        return fill_idle(apply_steps(self.path, self.start, states), self.before, self.work, self.ranks)


def search_candidates(
    load: ExpertLoad, placement: Placement, costs: ExpertCosts, settings: ExpertSettings
) -> Iterator[PlacementPath]:
    """Yields the candidates of a decision, the one that keeps copies first."""
    table, ranks, experts = placement.physical_to_logical, placement.ranks, load.experts
    parked = park_idle(table, experts, ranks)
    for work in _works(load, costs):
        yield _search(load, placement, costs, settings, work, parked, copies=True)
        if costs.expert_s and placement.slots > experts:
            start = drop_copies(table, work.of_experts, experts, ranks)
            yield _search(load, placement, costs, settings, work, start, copies=False)


def round_budget(placement: Placement) -> int:
    """Returns the moves of a round where the settings have no bound; only what gains much goes beyond."""
    from_nothing = placement.slots * (1 - 1 / placement.ranks)
    return int(placement.layers * max(_MIN_ROUND, _ROUND_PART * from_nothing))


def cut_path(path: Path, price_s: float, budget: int) -> Ints:
    """Returns how many steps of a path each layer takes, [layer]: as long as a move gains its price, within the budget.

    Args:
        path: result of the search.
        price_s: seconds a step that a move has to gain.
        budget: most moves of all layers together.
    """
    layers = np.arange(path.moves.shape[1])

    def cut(price: float) -> Ints:
        return np.asarray((path.gain_s - price * path.moves).argmax(0))

    states = cut(price_s)
    if path.moves[states, layers].sum() <= budget:
        return states
    low, high = price_s, price_s + float(path.gain_s.max()) + 1e-300
    for _ in range(40):
        middle = (low + high) / 2
        if path.moves[cut(middle), layers].sum() <= budget:
            high = middle
        else:
            low = middle
    states = cut(high)
    return states if path.moves[states, layers].sum() <= budget else np.zeros_like(states)


def _search(
    load: ExpertLoad,
    placement: Placement,
    costs: ExpertCosts,
    settings: ExpertSettings,
    work: "_Work",
    start: Ints,
    *,
    copies: bool,
) -> PlacementPath:
    """Searches in a unit of about a rank's time in a layer, for single precision; the path is in seconds."""
    budget = settings.move_budget or round_budget(placement)
    work_s, slot_work = work.of_experts, work.of_slots
    largest_s = max(costs.token_s, costs.remote_token_s, costs.internode_token_s)
    unit_s = float(load.by_expert.sum(1).max()) * largest_s / placement.ranks
    if slot_work is not None:
        unit_s = max(unit_s, float(work_s.sum(1).max()) / placement.ranks)
    unit_s = unit_s or 1.0
    usual = max(_MIN_ROUND, _ROUND_PART * placement.slots, settings.move_budget / placement.layers)
    per_layer = usual if settings.move_budget else placement.slots
    extra = max(int(start.max()) + 1 - load.experts, 0)
    given = SearchInput(
        work_s=_pad(work_s / unit_s, extra),
        traffic_s=_traffic(load, placement, costs, unit_s, extra),
        move_price_s=(1 + settings.hysteresis) * costs.move_s / costs.horizon_steps / unit_s,
        max_moves=min(settings.move_budget or placement.layers * placement.slots, math.ceil(_SEARCH_AHEAD * per_layer)),
        copies=copies,
        cheap_moves=min(budget, math.ceil(_SEARCH_AHEAD * usual)),
        slot_work=None if slot_work is None else _scaled(slot_work, unit_s, extra),
        experts=load.experts if extra else None,
    )
    path = search_steps(given, replace(placement, physical_to_logical=start))
    return PlacementPath(
        path=replace(path, gain_s=path.gain_s * unit_s),
        start=start,
        before=placement.physical_to_logical,
        work=load.by_expert,
        ranks=placement.ranks,
        budget=budget,
        further_s=None
        if settings.move_budget
        else _FURTHER_WORTH * float(work_s.sum()) / work_s.shape[0] / placement.ranks,
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Work:
    """What a search balances.

    Attributes:
        of_experts: [layer, expert], seconds a step of an expert that has one slot.
        of_slots: seconds a step of one of several slots; None: they divide those of the expert evenly.
    """

    of_experts: Floats
    of_slots: SlotWork | None = None


def _works(load: ExpertLoad, costs: ExpertCosts) -> Iterator[_Work]:
    """Yields the mean step, and where the time to read an expert is known the large step, which reads them all.

    The sum of both kinds of step can be even on all ranks while neither is.
    """
    if not costs.expert_s:
        yield _Work(of_experts=load.by_expert * costs.token_s)
        return
    times, one = layer_time(load, costs), np.ones(load.by_expert.shape, np.int64)
    for of_slots in (times.slot_work, times.slot_work_of_large):
        yield _Work(of_experts=of_slots(one), of_slots=of_slots)


def _scaled(slot_work: SlotWork, unit_s: float, extra: int) -> SlotWork:
    def scaled(copies: Ints) -> Floats:
        experts = copies.shape[1] - extra
        return _pad(slot_work(copies[:, :experts]) / unit_s, extra)

    return scaled


def _pad(values: Floats, extra: int) -> Floats:
    """Returns [layer, expert] with a zero for each placeholder behind."""
    return np.pad(values, ((0, 0), (0, extra))) if extra else values


def _traffic(load: ExpertLoad, placement: Placement, costs: ExpertCosts, unit_s: float, extra: int) -> Singles | None:
    links = link_costs(load, placement, costs) / unit_s
    if len(load.tokens) == 1 or not links.any():
        return None
    return np.pad(traffic_costs(load, links), ((0, 0), (0, extra), (0, 0)))
