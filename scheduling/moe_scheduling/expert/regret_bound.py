"""What moving has won since the beginning, and when it is taken back: the bound on what `expert.py` can lose.

A placement is made for a window of load, and what comes later may be any: plans that are right as often as wrong still
leave the experts in a placement that is worse by chance. So an account is kept against the placement at the beginning,
over all windows, and over what came between two of them: a move that was taken back, or that ended half-way, cost its
moves and its time all the same (`book_spells`). In the red no plan is carried out, as in conservative bandits (Wu et
al., arXiv 1602.04282); and as in ski rental, what has lost more than going back costs is taken back, so it loses at
most about twice that.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from moe_scheduling.expert.cost import ExpertCosts, ExpertLoad, score_placement
from moe_scheduling.expert.placement import Placement, count_moves

# Part of the experts' time that may be lost against having moved nothing.
_MOST_LOST = 0.005


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Account:
    """What moving has come to, in seconds, each window standing for the steps until the next.

    Attributes:
        began: where the experts lay at the first decision.
        seen: where they lay at the last one.
        decided: where they lie if what was decided there has been carried out; None: as seen.
        won_s: by the placements since, against `began` under the same loads; less than 0: lost.
        paid_s: for moves.
        lived_s: time of the experts.
    """

    began: Placement
    seen: Placement
    decided: Placement | None = None
    won_s: float = 0.0
    paid_s: float = 0.0
    lived_s: float = 0.0

    @property
    def in_the_red(self) -> bool:
        """Whether more was lost than may be."""
        return self.won_s - self.paid_s < -_MOST_LOST * self.lived_s


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Spell:
    """A placement that was come to between two decisions by their own doing, and the steps that it was in force."""

    placement: Placement
    steps: int


def book_spells(
    account: Account, spells: Sequence[Spell], load: ExpertLoad, placement: Placement, costs: ExpertCosts
) -> Account:
    """The account with what was carried out since the last decision, in its order, before `keep_account`.

    `placement`, where the experts lie now, stands for the whole time since the last decision, so for a spell that is
    over the difference is booked, under the load of now.
    """
    total_s = score_placement(load, placement, costs)[0].total_s
    for spell in spells:
        won_s = 0.0
        if not _same(spell.placement, placement):
            won_s = (total_s - score_placement(load, spell.placement, costs)[0].total_s) * spell.steps
        account = replace(
            account,
            seen=spell.placement,
            decided=None,
            won_s=account.won_s + won_s,
            paid_s=account.paid_s + float(count_moves(account.seen, spell.placement).sum()) * costs.move_s,
        )
    return account


def keep_account(
    account: Account | None, load: ExpertLoad, placement: Placement, total_s: float, costs: ExpertCosts
) -> Account:
    """The account with one more window, in which a step took the experts `total_s`.

    A placement that was not decided on is somebody else's, and a new beginning.
    """
    lived_s = total_s * costs.horizon_steps
    if account is None or not (_same(account.seen, placement) or _same(account.decided, placement)):
        return Account(began=placement, seen=placement, lived_s=lived_s)
    won_s = 0.0
    if count_moves(account.began, placement).any():
        at_first_s = score_placement(load, account.began, costs)[0].total_s
        won_s = (at_first_s - total_s) * costs.horizon_steps
    return replace(
        account,
        seen=placement,
        decided=None,
        won_s=account.won_s + won_s,
        paid_s=account.paid_s + float(count_moves(account.seen, placement).sum()) * costs.move_s,
        lived_s=account.lived_s + lived_s,
    )


def plan_retreat(account: Account, budget: int, costs: ExpertCosts) -> Placement:
    """Where to go in the red: back to the beginning where that has paid by now, as many layers as the budget allows."""
    seen, began = account.seen, account.began
    moves = count_moves(seen, began)
    order = moves.argsort(kind="stable")
    goes = np.zeros(len(moves), np.bool_)
    goes[order] = moves[order].cumsum() <= budget
    if account.won_s >= -float(moves.sum()) * costs.move_s or not moves[goes].any():
        return seen
    table = np.where(goes[:, None], began.physical_to_logical, seen.physical_to_logical)
    return replace(seen, physical_to_logical=table, version=seen.version + 1)


def _same(one: Placement | None, other: Placement) -> bool:
    if one is None or one.ranks != other.ranks:
        return False
    return np.array_equal(one.physical_to_logical, other.physical_to_logical)
