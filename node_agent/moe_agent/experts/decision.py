"""What `moe_scheduling.expert.decision` decides, in the terms of the controller; run by the thread of the group's
first rank.
"""

import time
from dataclasses import replace

from moe_scheduling.expert.decision import ExpertCosts, ExpertHistory, ExpertLoad, Move, Placement, plan_experts
from moe_scheduling.expert.regret_bound import Spell, book_spells

from moe_agent.experts.figures import make_load, make_placement
from moe_agent.experts.planning import Answer, Question


class Decider:
    """Decides, and carries on what one decision tells the next."""

    def __init__(self) -> None:
        self._history: ExpertHistory | None = None

    def decide(self, question: Question) -> Answer:
        """Whether to move which experts where.

        Raises:
            ValueError: the load does not fit the group.
        """
        begun_s = time.perf_counter()
        load = make_load(question.tokens, question.pairs, question.steps)
        placement = make_placement(question.placement, question.shape, question.version)
        costs = ExpertCosts(
            token_s=question.costs.token_s,
            remote_token_s=question.costs.remote_token_s,
            internode_token_s=question.costs.internode_token_s,
            move_s=question.costs.move_s,
            horizon_steps=question.horizon_steps,
        )
        history = self._book(question, load, placement, costs)
        found = plan_experts(load, placement, costs, question.settings, history)
        self._history = found.history
        return Answer(
            pays=isinstance(found, Move),
            kept_by="" if isinstance(found, Move) else found.reason.value,
            reason="; ".join(found.reasons) if isinstance(found, Move) else f"{found.reason}: {found.why}",
            placement=found.candidate.physical_to_logical,
            gain_s=found.gain_s,
            cost_s=found.cost_s,
            balance_before=found.balance_before.mean,
            balance_after=found.balance_after.mean,
            seconds=time.perf_counter() - begun_s,
        )

    def _book(
        self, question: Question, load: ExpertLoad, placement: Placement, costs: ExpertCosts
    ) -> ExpertHistory | None:
        """The history with what was carried out since."""
        history = self._history
        if history is None or history.account is None:
            return history
        spells = [
            Spell(placement=make_placement(table, question.shape), steps=steps) for table, steps in question.spells
        ]
        return replace(history, account=book_spells(history.account, spells, load, placement, costs))
