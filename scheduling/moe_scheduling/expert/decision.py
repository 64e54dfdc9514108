"""Layer 3: decides on which ranks of an expert group the experts of each layer lie, and whether moving them pays.

Called by the node agent's planner on the group's first rank, by `moeserving experts plan` and by the benchmarks. The
search (`search.py`) gives a path of changes to better placements; the cost model (`cost.py`) gives the seconds a step
that each saves; the gate here decides how far along the path to go, if at all.

Invariants: a new placement has each expert in a slot and the same number of slots; an expert that stays on its rank
stays in its slot; never more moves than the budget; nothing moves unless the time gained until the next decision, as
far as the load has proved stable, exceeds the cost, except for a rollback under the regret bound (`regret_bound.py`);
the result depends on the arguments alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import numpy as np

from moe_scheduling.expert.candidates import PlacementPath, round_budget, search_candidates
from moe_scheduling.expert.cost import Balance, CostTerms, ExpertCosts, ExpertLoad, score_placement, seconds_of_layers
from moe_scheduling.expert.layer_time import StepSizes
from moe_scheduling.expert.placement import (
    Placement,
    check_experts,
    count_charged,
    count_moves,
    initial_placement,
    keep_slots,
)
from moe_scheduling.expert.regret_bound import RegretBound, plan_rollback
from moe_scheduling.expert.settings import ExpertMode, ExpertSettings

__all__ = [
    "Balance",
    "CostTerms",
    "ExpertCosts",
    "ExpertHistory",
    "ExpertLoad",
    "ExpertMode",
    "ExpertSettings",
    "Move",
    "Placement",
    "Prediction",
    "RegretBound",
    "Stay",
    "StayReason",
    "StepSizes",
    "add_steps",
    "count_moves",
    "initial_placement",
    "plan_experts",
    "score_placement",
]

# Part of the total below which a gain is rounding.
_MIN_GAIN = 1e-6
# Lower bound of the stability where a price is divided by it.
_MIN_STABILITY = 1e-3
# Least gain of a move as part of a layer's time, whatever it costs; and the same where the best placement is asked for.
_MIN_WORTH = 1e-4
_MIN_WORTH_OF_WHOLE = 1e-5
# Weight of the newest prediction in the hit rate. A miss counts for more than a hit, else a load that alternates in
# step with the decisions is followed each time just before it changes.
_MISS_WEIGHT = 0.5
_HIT_WEIGHT = 0.2

Score = tuple[CostTerms, Balance]

_COUNTS = (count_moves, count_charged)


class StayReason(StrEnum):
    """Why nothing moves; also a metric label."""

    IDLE = "idle"
    BALANCED = "balanced"
    UNPAID = "unpaid"
    UNSTABLE = "unstable"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prediction:
    """A plan, carried out or not, whose predicted gain is checked against the next load.

    Attributes:
        before: placement that it was made for.
        after: placement that it proposed.
        gain_part: predicted gain as a part of the experts' time in a step.
    """

    before: Placement
    after: Placement
    gain_part: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExpertHistory:
    """State from one decision to the next; the caller passes on what a decision returns.

    Attributes:
        load: load of the last decision; None before the first.
        prediction: the last plan; None if there was none.
        hit_rate: part of their predicted gains that the last plans would have had since, -1 to 1.
        regret: gains and costs since the beginning, accounted by the caller (`add_steps`); None: not accounted.
    """

    load: ExpertLoad | None = None
    prediction: Prediction | None = None
    hit_rate: float = 1.0
    regret: RegretBound | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Answer:
    """Fields that both answers have.

    Attributes:
        candidate: the best placement found; with `Move`, the one to go to.
        moves: experts that it would move to other ranks.
        gain_s: seconds a step that it would gain if the load stayed the same.
        cost_s: seconds that its moves cost; a layer of which only idle slots change costs as much as one move.
        stability: part of `gain_s` that is counted on, 0 to 1.
        balance_before: of the present placement.
        balance_after: of the candidate.
        terms_before: seconds a step of the present placement.
        terms_after: seconds a step of the candidate.
        history: for the next decision.
    """

    candidate: Placement
    moves: int
    gain_s: float
    cost_s: float
    stability: float
    balance_before: Balance
    balance_after: Balance
    terms_before: CostTerms
    terms_after: CostTerms
    history: ExpertHistory


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Move(_Answer):
    """Moving pays: go to `candidate`. `reasons` are sentences, the term that gains most first."""

    reasons: tuple[str, ...]

    @property
    def placement(self) -> Placement:
        """The placement to go to."""
        return self.candidate


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Stay(_Answer):
    """Moving does not pay. `reason` is the class of the cause, `why` the sentence about it."""

    reason: StayReason
    why: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Option:
    """A candidate placement with its score; `charged` is what its cost is counted by (`count_charged`)."""

    placement: Placement
    moves: int
    charged: int
    gain_s: float
    stability: float
    score: Score


def add_steps(
    history: ExpertHistory | None, load: ExpertLoad, placement: Placement, costs: ExpertCosts, steps: float
) -> ExpertHistory:
    """Returns the history with `steps` engine steps accounted in its regret bound; the first placement is the
    beginning.

    The caller does this before each decision, for the steps since the last one, and adds the time of moves itself.
    """
    history = history or ExpertHistory()
    regret = history.regret
    if regret is None or regret.began.physical_to_logical.shape != placement.physical_to_logical.shape:
        regret = RegretBound(began=placement)
    return replace(history, regret=regret.add_steps(load, placement, costs, steps))


def plan_experts(
    load: ExpertLoad,
    placement: Placement,
    costs: ExpertCosts,
    settings: ExpertSettings,
    history: ExpertHistory | None = None,
    *,
    whole: bool = False,
) -> Move | Stay:
    """Decides whether experts move, and which.

    A move has to gain `(1 + hysteresis) * move_s / (horizon_steps * stability)` seconds a step; the paths of the
    search are cut in each layer where that ends, and each layer takes the best of the candidates. Under a budget this
    price rises until the moves fit, so that the best moves are taken. The stability of the load is measured in gained
    time: the part of its gain that the candidate would also have had under the load before, and the hit rate of the
    last predictions, whether they were carried out or not. Without a history the load is taken as stable. When the
    loss budget of the regret bound is exhausted, nothing moves except back to the placement at the beginning.

    Args:
        load: load of a window of steps.
        placement: the present placement.
        costs: measured coefficients.
        settings: hysteresis and budget; the mode is not considered here.
        history: what the last decision returned, `regret` as the caller has kept it; None before the first.
        whole: the candidate is the best placement found within the budget whatever its moves cost, and the gate
            judges it as a whole: for a plan that a person reads, where costs are not known well.

    Raises:
        ValueError: load and placement do not fit together, or the sources do not divide the ranks evenly.
    """
    check_experts(placement, layers=load.layers, experts=load.experts)
    known = _check_prediction(history or ExpertHistory(), load, costs)
    before = score_placement(load, placement, costs)
    budget = settings.move_budget or round_budget(placement)
    least_s = (_MIN_WORTH_OF_WHOLE if whole else _MIN_WORTH) * before[0].total_s / placement.layers
    price_s = max(least_s, 0.0 if whole else (1 + settings.hysteresis) * costs.move_s / costs.horizon_steps)

    paths = tuple(search_candidates(load, placement, costs, settings))

    def weigh(price_s: float) -> _Option:
        after = _merge_layers(paths, price_s, budget, load, placement, costs)
        return _weigh_option(after, load, placement, costs, before, known)

    option = _choose_option(weigh, price_s, least_s, whole=whole)
    if known.regret is not None and known.regret.budget_exhausted:
        back = plan_rollback(known.regret, placement, budget, costs)
        if back is not placement:
            return _roll_back(back, known.regret, load, placement, costs, before, known)
        option = replace(option, stability=0.0)
    return _decide(option, load, placement, costs, settings, before, known)


def _choose_option(weigh: Callable[[float], _Option], price_s: float, least_s: float, *, whole: bool) -> _Option:
    """Returns the candidate at a price for each move, in seconds a step.

    Where only a part of the gain is counted on, the price rises by that part and fewer moves are taken, unless none is
    left. Where no move gains the price, it is the candidate at the least price `least_s`: the answer shows the
    refused candidate.
    """
    option = weigh(price_s)
    if 0.0 < option.stability < 1.0 and not whole:
        smaller = weigh(price_s / max(option.stability, _MIN_STABILITY))
        option = smaller if smaller.gain_s > 0 else option
    return option if option.gain_s > 0 else weigh(least_s)


def _merge_layers(
    paths: Sequence[PlacementPath],
    price_s: float,
    budget: int,
    load: ExpertLoad,
    placement: Placement,
    costs: ExpertCosts,
) -> Placement:
    """Returns the placement that takes for each layer the best candidate, the present one among them.

    A search balances one measure of work, and which one is best depends on the layer. The time of a layer depends on
    its own row alone, so that the rows can be chosen apart. Where together they have more moves than the budget and
    than each candidate, the layers that win most for each move go first, unless a single candidate wins more.
    """
    tables = (path.table(price_s) for path in paths)
    kept = [keep_slots(placement.physical_to_logical, table, placement.ranks) for table in tables]
    version = placement.version + 1
    options = [placement, *(replace(placement, physical_to_logical=table, version=version) for table in kept)]
    moves, charged = (np.stack([count(placement, option) for option in options]) for count in _COUNTS)
    layers_s = np.stack([seconds_of_layers(load, option, costs) for option in options])
    net_s = layers_s[0] - layers_s - price_s * charged
    best, layer = net_s.argmax(0), np.arange(placement.layers)
    needed = moves[best, layer]
    first = np.argsort(-net_s[best, layer] / np.maximum(needed, 1), kind="stable")
    fits = np.empty(placement.layers, np.bool_)
    fits[first] = needed[first].cumsum() <= max(budget, int(moves.sum(1).max()))
    chosen, single = np.where(fits, best, 0), int(net_s.sum(1).argmax())
    if net_s[chosen, layer].sum() < net_s[single].sum():
        return options[single]
    rows = np.stack([option.physical_to_logical for option in options])
    return replace(placement, physical_to_logical=rows[chosen, layer], version=version)


def _weigh_option(
    after: Placement, load: ExpertLoad, placement: Placement, costs: ExpertCosts, before: Score, known: ExpertHistory
) -> _Option:
    score = score_placement(load, after, costs)
    total_s = before[0].total_s
    gain_s = total_s - score[0].total_s
    if gain_s <= _MIN_GAIN * total_s:
        return _Option(placement=placement, moves=0, charged=0, gain_s=0.0, stability=1.0, score=before)
    stability = min(_gain_before(gain_s / total_s, placement, after, costs, known), max(known.hit_rate, 0.0))
    return _Option(
        placement=after,
        moves=int(count_moves(placement, after).sum()),
        charged=int(count_charged(placement, after).sum()),
        gain_s=gain_s,
        stability=stability,
        score=score,
    )


def _gain_before(
    gain_part: float, placement: Placement, after: Placement, costs: ExpertCosts, known: ExpertHistory
) -> float:
    """Returns the part of a predicted gain that the plan would also have had under the load before, 0 to 1."""
    if known.load is None:
        return 1.0
    return min(max(_gain_part(known.load, placement, after, costs) / gain_part, 0.0), 1.0)


def _gain_part(load: ExpertLoad, before: Placement, after: Placement, costs: ExpertCosts) -> float:
    """Returns the gain of a change under a load as a part of the experts' time in a step."""
    total_s = score_placement(load, before, costs)[0].total_s
    return 1 - score_placement(load, after, costs)[0].total_s / total_s if total_s else 0.0


def _check_prediction(history: ExpertHistory, load: ExpertLoad, costs: ExpertCosts) -> ExpertHistory:
    """Returns the history with its prediction checked against a new load; the history of another group is dropped."""
    if history.load is not None and history.load.tokens.shape != load.tokens.shape:
        return ExpertHistory()
    made = history.prediction
    if made is None:
        return history
    hit = min(max(_gain_part(load, made.before, made.after, costs) / made.gain_part, -1.0), 1.0)
    weight = _HIT_WEIGHT if hit > history.hit_rate else _MISS_WEIGHT
    return replace(history, prediction=None, hit_rate=history.hit_rate + weight * (hit - history.hit_rate))


def _decide(
    option: _Option,
    load: ExpertLoad,
    placement: Placement,
    costs: ExpertCosts,
    settings: ExpertSettings,
    before: Score,
    known: ExpertHistory,
) -> Move | Stay:
    fields = _common_fields(option, load, placement, costs, before, known)
    needed_s = (1 + settings.hysteresis) * fields["cost_s"]
    gained_s = option.gain_s * costs.horizon_steps
    if option.gain_s > 0 and option.stability > 0 and gained_s * option.stability >= needed_s:
        return Move(**fields, reasons=_reasons(option, before[0], gained_s, fields["cost_s"]))
    return Stay(**fields, **_why_not(load, option, gained_s, needed_s))


def _roll_back(
    back: Placement,
    regret: RegretBound,
    load: ExpertLoad,
    placement: Placement,
    costs: ExpertCosts,
    before: Score,
    known: ExpertHistory,
) -> Move:
    score = score_placement(load, back, costs)
    gain_s = before[0].total_s - score[0].total_s
    moves, charged = int(count_moves(placement, back).sum()), int(count_charged(placement, back).sum())
    option = _Option(placement=back, moves=moves, charged=charged, gain_s=gain_s, stability=1.0, score=score)
    why = f"moving has lost {-regret.won_s:.4g} s since the first decision: rollback to the placement of that time"
    return Move(**_common_fields(option, load, placement, costs, before, known), reasons=(why,))


def _common_fields(
    option: _Option, load: ExpertLoad, placement: Placement, costs: ExpertCosts, before: Score, known: ExpertHistory
) -> dict[str, Any]:
    """Returns the fields of `_Answer` by name."""
    prediction = None
    if option.gain_s > 0:
        prediction = Prediction(before=placement, after=option.placement, gain_part=option.gain_s / before[0].total_s)
    return {
        "candidate": option.placement,
        "moves": option.moves,
        "gain_s": option.gain_s,
        "cost_s": option.charged * costs.move_s,
        "stability": option.stability,
        "balance_before": before[1],
        "balance_after": option.score[1],
        "terms_before": before[0],
        "terms_after": option.score[0],
        "history": replace(known, load=load, prediction=prediction),
    }


def _reasons(option: _Option, before: CostTerms, gained_s: float, cost_s: float) -> tuple[str, ...]:
    after = option.score[0]
    names = (("load", "load_s"), ("traffic", "traffic_s"))
    pairs = [(name, getattr(before, field), getattr(after, field)) for name, field in names]
    changed = sorted((pair for pair in pairs if pair[1] != pair[2]), key=lambda pair: pair[2] - pair[1])
    words = tuple(f"{name} {old * 1e3:.4g} -> {new * 1e3:.4g} ms a step" for name, old, new in changed)
    summary = f"wins {gained_s * option.stability:.4g} s until the next decision, costs {cost_s:.4g} s"
    return (*words, f"{summary}; {option.stability:.0%} of the gain is counted on")


def _why_not(load: ExpertLoad, option: _Option, gained_s: float, needed_s: float) -> dict[str, Any]:
    if not load.tokens.any():
        return {"reason": StayReason.IDLE, "why": "the experts had nothing to do"}
    if option.gain_s <= 0:
        return {"reason": StayReason.BALANCED, "why": "no better placement was found"}
    if gained_s < needed_s:
        why = f"would win {gained_s:.4g} s until the next decision and needs {needed_s:.4g} s"
        return {"reason": StayReason.UNPAID, "why": why}
    why = f"would win {gained_s:.4g} s if the load stayed, of which {option.stability:.0%} is counted on"
    return {"reason": StayReason.UNSTABLE, "why": f"{why}, and needs {needed_s:.4g} s"}
