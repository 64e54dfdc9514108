"""Layer 3: on which ranks of an expert group the experts of each layer lie, and whether moving them pays.

Called by the node agent's plugin on the group's first rank, by `moeserving experts plan` and by the benchmarks. A
search (`expert_search.py`) gives a path of changes to better placements; costs (`expert_cost.py`) say what each is
worth in seconds a step; the gate here says how far along the path to go, if at all.

Invariants: a placement that is moved to has each expert in a slot and no slot more; what stays on its rank stays in its
slot; never more moves than the budget; nothing moves unless the time won until the next decision, as far as the load
has proved to stay what it is, exceeds the cost, but to go back where moving has lost (`expert_account.py`); the answer
depends on the arguments alone.
"""

import math
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import numpy as np

from moe_scheduling.expert.cost import (
    Balance,
    ExpertCosts,
    ExpertLoad,
    Terms,
    carry_costs,
    handover_costs,
    link_costs,
    score_placement,
)
from moe_scheduling.expert.placement import (
    Ints,
    Placement,
    Singles,
    check_experts,
    count_moves,
    initial_placement,
    keep_slots,
)
from moe_scheduling.expert.regret_bound import Account, keep_account, plan_retreat
from moe_scheduling.expert.search import Path, SearchInput, apply_steps, search_steps
from moe_scheduling.settings import check_settings, setting

__all__ = [
    "Account",
    "Balance",
    "ExpertCosts",
    "ExpertHistory",
    "ExpertLoad",
    "ExpertMode",
    "ExpertSettings",
    "Move",
    "Placement",
    "Stay",
    "StayReason",
    "Terms",
    "Trial",
    "count_moves",
    "initial_placement",
    "plan_experts",
    "score_placement",
]

# A round moves no more than this part of what a placement made anew would: the load is an estimate, and what is left
# follows in the next round, from a fresh one, if it still pays.
_ROUND_PART = 0.24
# Of a small group that part is less than a swap or two a layer.
_LEAST_ROUND = 4
# The search goes on beyond the budget, so that the best moves are chosen among more.
_SEARCH_AHEAD = 1.1
# Part of the total below which what is won is rounding.
_LEAST_GAIN = 1e-6
# Less than this is as little as this, where a price is divided by it.
_LEAST_STABILITY = 1e-3
# Part of a layer's time that a move has to win however little it costs, and where the best placement is asked for.
_LEAST_WORTH = 1e-4
_LEAST_OF_WHOLE = 1e-5
# Weight of the newest trial in the trust that plans earn: a broken promise counts for more than a kept one, else a load
# that changes in step with the decisions is followed each time when it is about to leave.
_BROKEN = 0.5
_KEPT = 0.2

Score = tuple[Terms, Balance]


class ExpertMode(StrEnum):
    """What is done about the experts' placement while an engine runs."""

    OFF = "off"
    OBSERVE = "observe"
    DRY_RUN = "dryRun"
    ACTIVE = "active"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertSettings:
    """Placement of the experts: when they are moved, and how many.

    Raises:
        ValueError: a value is out of its range or not finite.
    """

    mode: ExpertMode = setting(
        ExpertMode.DRY_RUN,
        "`off` (in quotes: YAML reads a bare off as false) records nothing, `observe` records the load of the experts "
        "and shows it, `dryRun` decides as well and shows what it would move, `active` moves experts where that pays.",
    )
    # Interval and window are vLLM's defaults.
    interval_steps: int = setting(3000, "Engine steps between two decisions.", least=1)
    window_steps: int = setting(
        1000, "Engine steps of load that a decision looks at, the newer ones weighing more.", least=1
    )
    move_budget: int = setting(
        0,
        "Most experts moved in one round; 0 sets no bound beside what pays, which is at most about a quarter of the "
        "moves of a new placement.",
        least=0,
    )
    max_stall_s: float = setting(
        0.05,
        "Most that moving may add to one step of the engine; it sets how many layers move in a step.",
        above=0,
        most=60,
    )
    hysteresis: float = setting(
        0.1,
        "Part by which the time won until the next decision must exceed the cost of moving (0.1: by 10 %).",
        least=0,
        most=1000,
    )

    def __post_init__(self) -> None:
        check_settings(self)


class StayReason(StrEnum):
    """Why nothing moves; a metric label."""

    IDLE = "idle"
    BALANCED = "balanced"
    UNPAID = "unpaid"
    UNSTABLE = "unstable"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trial:
    """A plan, carried out or not, that the next load puts to the test.

    Attributes:
        before: the placement that it was made for.
        after: the placement that it came to.
        promise: part of the time that it was to win.
    """

    before: Placement
    after: Placement
    promise: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExpertHistory:
    """What the next decision knows of the last ones: the caller carries on what a decision returns.

    Attributes:
        load: what the last decision looked at; None before the first.
        trial: the last plan; None if there was none.
        trust: how much of their promises the last plans would have kept, -1 to 1.
        account: what moving has come to since the first decision; None before it.
    """

    load: ExpertLoad | None = None
    trial: Trial | None = None
    trust: float = 1.0
    account: Account | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Decision:
    """What both answers tell.

    Attributes:
        candidate: the best placement found; with `Move`, the one to go to.
        moves: experts that it would bring to other ranks.
        gain_s: seconds a step that it would win if the load stayed.
        cost_s: seconds that its moves cost.
        stability: the part of `gain_s` that is counted on, 0 to 1.
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
    terms_before: Terms
    terms_after: Terms
    history: ExpertHistory


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Move(_Decision):
    """It pays: go to `candidate`. `reasons` are sentences, the term that wins most first."""

    reasons: tuple[str, ...]

    @property
    def placement(self) -> Placement:
        """Where to go."""
        return self.candidate


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Stay(_Decision):
    """It does not pay. `why` is the sentence to `reason`."""

    reason: StayReason
    why: str


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

    A move has to win `(1 + hysteresis) * move_s / (horizon_steps * stability)` seconds a step, and layer by layer the
    path of the search is cut where that ends; under a budget the price rises until the moves fit, so the best come
    first. The stability of the load is measured in what counts, the time won: the part of its gain that the candidate
    would also have had under the load before (what is of this window alone would not), and the part of their promises
    that the last plans would have kept since, whether they were carried out or not. Without a history the load is taken
    to stay. Where moving has lost more than may be lost since the first decision, nothing moves but back to where the
    experts lay then.

    Args:
        load: of a window of steps.
        placement: where the experts lie.
        costs: measured coefficients.
        settings: hysteresis and budget; the mode is the caller's business.
        history: what the last decision returned; None before the first.
        whole: the candidate is the best placement found within the budget, whatever its moves cost, and the gate
            judges it as a whole: for a plan that is looked at, where costs are not known well.

    Raises:
        ValueError: load and placement do not fit together, or the sources do not divide the ranks evenly.
    """
    check_experts(placement, layers=load.layers, experts=load.experts)
    known = _learn(history or ExpertHistory(), load, costs)
    before = score_placement(load, placement, costs)
    account = keep_account(known.account, load, placement, before[0].total_s, costs)
    known = replace(known, account=account)
    budget = settings.move_budget or _round_budget(placement)
    path = _search(load, placement, costs, settings, budget)
    least_s = (_LEAST_OF_WHOLE if whole else _LEAST_WORTH) * before[0].total_s / placement.layers
    price_s = max(least_s, 0.0 if whole else (1 + settings.hysteresis) * costs.move_s / costs.horizon_steps)

    def weigh(price_s: float) -> _Option:
        table = apply_steps(path, placement.physical_to_logical, cut_path(path, price_s, budget))
        return _weigh_option(table, load, placement, costs, before, known)

    option = weigh(price_s)
    if 0.0 < option.stability < 1.0 and not whole:
        smaller = weigh(price_s / max(option.stability, _LEAST_STABILITY))
        option = smaller if smaller.gain_s > 0 else option
    if option.gain_s <= 0:
        option = weigh(least_s)
    if account.in_the_red:
        back = plan_retreat(account, budget, costs)
        if back is not placement:
            return _go_back(back, load, placement, costs, before, known)
        option = replace(option, stability=0.0)
    return _decide(option, load, placement, costs, settings, before, known)


def cut_path(path: Path, price_s: float, budget: int) -> Ints:
    """How many steps of a path each layer takes, [layer]: as long as a move wins its price, within the budget.

    Args:
        path: what was found.
        price_s: seconds a step that a move has to win.
        budget: most moves of all layers together.
    """
    layers = np.arange(path.moves.shape[1])

    def cut(price: float) -> Ints:
        return np.asarray((path.won_s - price * path.moves).argmax(0))

    states = cut(price_s)
    if path.moves[states, layers].sum() <= budget:
        return states
    low, high = price_s, price_s + float(path.won_s.max()) + 1e-300
    for _ in range(40):
        middle = (low + high) / 2
        if path.moves[cut(middle), layers].sum() <= budget:
            high = middle
        else:
            low = middle
    states = cut(high)
    return states if path.moves[states, layers].sum() <= budget else np.zeros_like(states)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Option:
    """A placement and what it is worth."""

    placement: Placement
    moves: int
    gain_s: float
    stability: float
    score: Score


def _round_budget(placement: Placement) -> int:
    anew = placement.slots * (1 - 1 / placement.ranks)
    return int(placement.layers * max(_LEAST_ROUND, _ROUND_PART * anew))


def _search(load: ExpertLoad, placement: Placement, costs: ExpertCosts, settings: ExpertSettings, budget: int) -> Path:
    """The path, in seconds; searched in a unit of about a rank's time in a layer, for single precision."""
    dearest_s = max(costs.token_s, costs.remote_token_s, costs.internode_token_s, costs.handover_token_s)
    unit_s = float(load.by_expert.sum(1).max()) * dearest_s / placement.ranks or 1.0
    per_layer = max(_LEAST_ROUND, _ROUND_PART * placement.slots, settings.move_budget / placement.layers)
    problem = SearchInput(
        work_s=load.by_expert * (costs.token_s / unit_s),
        carry_s=_carry(load, placement, costs, unit_s),
        move_price_s=(1 + settings.hysteresis) * costs.move_s / costs.horizon_steps / unit_s,
        most_moves=min(budget, math.ceil(_SEARCH_AHEAD * per_layer)),
    )
    path = search_steps(problem, placement)
    return replace(path, won_s=path.won_s * unit_s)


def _carry(load: ExpertLoad, placement: Placement, costs: ExpertCosts, unit_s: float) -> Singles | None:
    links = link_costs(load, placement, costs) / unit_s
    handed = handover_costs(load, placement, costs)
    if handed is not None:
        # In a round every other layer follows its neighbours: if both moved, they would miss each other.
        handed[(placement.version + 1) % 2 :: 2] = 0.0
    if len(load.tokens) == 1 or not links.any():
        return None if handed is None else np.divide(handed, unit_s, dtype=np.float32)
    carried = carry_costs(load, links)
    return carried if handed is None else np.add(carried, handed / unit_s, dtype=np.float32)


def _weigh_option(
    table: Ints, load: ExpertLoad, placement: Placement, costs: ExpertCosts, before: Score, known: ExpertHistory
) -> _Option:
    kept = keep_slots(placement.physical_to_logical, table, placement.ranks)
    after = replace(placement, physical_to_logical=kept, version=placement.version + 1)
    score = score_placement(load, after, costs)
    total_s = before[0].total_s
    gain_s = total_s - score[0].total_s
    if gain_s <= _LEAST_GAIN * total_s:
        return _Option(placement=placement, moves=0, gain_s=0.0, stability=1.0, score=before)
    stability = min(_kept_before(gain_s / total_s, placement, after, costs, known), max(known.trust, 0.0))
    moves = int(count_moves(placement, after).sum())
    return _Option(placement=after, moves=moves, gain_s=gain_s, stability=stability, score=score)


def _kept_before(
    promise: float, placement: Placement, after: Placement, costs: ExpertCosts, known: ExpertHistory
) -> float:
    """The part of a promise that would have been kept under the load before, 0 to 1."""
    if known.load is None:
        return 1.0
    return min(max(_won_part(known.load, placement, after, costs) / promise, 0.0), 1.0)


def _won_part(load: ExpertLoad, before: Placement, after: Placement, costs: ExpertCosts) -> float:
    """The part of a step's expert time that a change wins under a load."""
    total_s = score_placement(load, before, costs)[0].total_s
    return 1 - score_placement(load, after, costs)[0].total_s / total_s if total_s else 0.0


def _learn(history: ExpertHistory, load: ExpertLoad, costs: ExpertCosts) -> ExpertHistory:
    """The history with its trial put to the test of a new load; what is of another model is forgotten."""
    if history.load is not None and history.load.tokens.shape != load.tokens.shape:
        return ExpertHistory()
    trial = history.trial
    if trial is None:
        return history
    kept = min(max(_won_part(load, trial.before, trial.after, costs) / trial.promise, -1.0), 1.0)
    weight = _KEPT if kept > history.trust else _BROKEN
    return replace(history, trial=None, trust=history.trust + weight * (kept - history.trust))


def _decide(
    option: _Option,
    load: ExpertLoad,
    placement: Placement,
    costs: ExpertCosts,
    settings: ExpertSettings,
    before: Score,
    known: ExpertHistory,
) -> Move | Stay:
    told = _told(option, load, placement, costs, before, known)
    needed_s = (1 + settings.hysteresis) * told["cost_s"]
    sure_s = option.gain_s * costs.horizon_steps
    if option.gain_s > 0 and option.stability > 0 and sure_s * option.stability >= needed_s:
        return Move(**told, reasons=_reasons(option, before[0], sure_s, told["cost_s"]))
    return Stay(**told, **_why_not(load, option, sure_s, needed_s))


def _go_back(
    back: Placement, load: ExpertLoad, placement: Placement, costs: ExpertCosts, before: Score, known: ExpertHistory
) -> Move:
    score = score_placement(load, back, costs)
    gain_s = before[0].total_s - score[0].total_s
    moves = int(count_moves(placement, back).sum())
    option = _Option(placement=back, moves=moves, gain_s=gain_s, stability=1.0, score=score)
    assert known.account is not None
    why = f"moving has lost {-known.account.won_s:.4g} s since the first decision: back to where the experts lay then"
    return Move(**_told(option, load, placement, costs, before, known), reasons=(why,))


def _told(
    option: _Option, load: ExpertLoad, placement: Placement, costs: ExpertCosts, before: Score, known: ExpertHistory
) -> dict[str, Any]:
    """What both answers tell, by field."""
    assert known.account is not None
    account = replace(known.account, decided=option.placement)
    trial = None
    if option.gain_s > 0:
        trial = Trial(before=placement, after=option.placement, promise=option.gain_s / before[0].total_s)
    return {
        "candidate": option.placement,
        "moves": option.moves,
        "gain_s": option.gain_s,
        "cost_s": option.moves * costs.move_s,
        "stability": option.stability,
        "balance_before": before[1],
        "balance_after": option.score[1],
        "terms_before": before[0],
        "terms_after": option.score[0],
        "history": ExpertHistory(load=load, trial=trial, trust=known.trust, account=account),
    }


def _reasons(option: _Option, before: Terms, sure_s: float, cost_s: float) -> tuple[str, ...]:
    after = option.score[0]
    names = (("load", "load_s"), ("traffic", "traffic_s"), ("handover", "handover_s"))
    pairs = [(name, getattr(before, field), getattr(after, field)) for name, field in names]
    changed = sorted((pair for pair in pairs if pair[1] != pair[2]), key=lambda pair: pair[2] - pair[1])
    words = tuple(f"{name} {old * 1e3:.4g} -> {new * 1e3:.4g} ms a step" for name, old, new in changed)
    sum_up = f"wins {sure_s * option.stability:.4g} s until the next decision, costs {cost_s:.4g} s"
    return (*words, f"{sum_up}; {option.stability:.0%} of the gain is counted on")


def _why_not(load: ExpertLoad, option: _Option, sure_s: float, needed_s: float) -> dict[str, Any]:
    if not load.tokens.any():
        return {"reason": StayReason.IDLE, "why": "the experts had nothing to do"}
    if option.gain_s <= 0:
        return {"reason": StayReason.BALANCED, "why": "no better placement was found"}
    if sure_s < needed_s:
        why = f"would win {sure_s:.4g} s until the next decision and needs {needed_s:.4g} s"
        return {"reason": StayReason.UNPAID, "why": why}
    why = f"would win {sure_s:.4g} s if the load stayed, of which {option.stability:.0%} is counted on"
    return {"reason": StayReason.UNSTABLE, "why": f"{why}, and needs {needed_s:.4g} s"}
