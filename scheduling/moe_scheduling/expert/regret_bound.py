"""Bound on what moving experts can lose against leaving them where they were: the regret bound of the expert layer.

A placement is computed for a window of load, and the load that follows may be any. Plans that are right as often as
wrong still leave the experts in a placement that is worse by chance. So all time and all moves are accounted against
the placement at the beginning. When the loss exceeds its budget, no new plan is carried out, as in conservative
bandits (Wu et al., arXiv 1602.04282); and as in ski rental, a placement that has lost more than its rollback costs is
rolled back, so that the loss is at most about twice that cost.

The caller that runs the steps keeps the value: the node agent's planner in an engine, the replay in a benchmark.
"""

from dataclasses import dataclass, replace

import numpy as np

from moe_scheduling.expert.cost import ExpertCosts, ExpertLoad, score_placement
from moe_scheduling.expert.placement import Placement, count_charged

# Part of the experts' time that may be lost against the placement at the beginning.
_LOSS_BUDGET = 0.005


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RegretBound:
    """Gain and cost of all placements since the beginning, in seconds.

    Attributes:
        began: placement at the beginning.
        won_s: time gained by the placements since, against `began` under the same loads; negative: lost.
        paid_s: time that moves took.
        duration_s: time that the experts took in all steps.
    """

    began: Placement
    won_s: float = 0.0
    paid_s: float = 0.0
    duration_s: float = 0.0

    @property
    def budget_exhausted(self) -> bool:
        """Whether more was lost than the budget allows."""
        return self.won_s - self.paid_s < -_LOSS_BUDGET * self.duration_s

    def add_steps(self, load: ExpertLoad, placement: Placement, costs: ExpertCosts, steps: float) -> "RegretBound":
        """Returns the bound after `steps` engine steps with a placement under a load."""
        step_s = score_placement(load, placement, costs)[0].total_s
        won_s = 0.0
        if count_charged(self.began, placement).any():
            won_s = score_placement(load, self.began, costs)[0].total_s - step_s
        return replace(self, won_s=self.won_s + won_s * steps, duration_s=self.duration_s + step_s * steps)

    def add_moves(self, seconds: float) -> "RegretBound":
        """Returns the bound after moves that took `seconds`."""
        return replace(self, paid_s=self.paid_s + seconds)


def plan_rollback(bound: RegretBound, placement: Placement, budget: int, costs: ExpertCosts) -> Placement:
    """Returns the placement to go to when the loss budget is exhausted.

    Args:
        bound: the regret bound.
        placement: the present placement.
        budget: most moves, where a layer that changes counts for at least one; of the layers that differ from the
            beginning those with the fewest moves go first.
        costs: `move_s` is the cost of one move back.

    Returns:
        The layers of the beginning as far as the budget reaches; `placement` itself where the way back costs more than
        was lost so far.
    """
    moves = count_charged(placement, bound.began)
    order = moves.argsort(kind="stable")
    goes = np.zeros(len(moves), np.bool_)
    goes[order] = moves[order].cumsum() <= budget
    if bound.won_s >= -float(moves.sum()) * costs.move_s or not moves[goes].any():
        return placement
    table = np.where(goes[:, None], bound.began.physical_to_logical, placement.physical_to_logical)
    return replace(placement, physical_to_logical=table, version=placement.version + 1)
