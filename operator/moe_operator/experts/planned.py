"""A plan for experts made on this side, from what an engine says of itself: its decision as JSON and in words. Pure."""

from typing import Any

from moe_contract.experts_state import ExpertsState
from moe_contract.input_errors import InputError, InvalidInput
from moe_scheduling.expert.decision import ExpertSettings, Move, Stay, plan_experts

from moe_operator.experts.load import read_costs, read_load, read_placement


def plan_document(document: ExpertsState, settings: ExpertSettings) -> Move | Stay:
    """What would be decided now, under these settings.

    Raises:
        InvalidInput: the engine has not recorded or measured what a plan needs.
    """
    load = read_load(document)
    placement = read_placement(document.placement.physical_to_logical, document)
    costs = read_costs(document, settings.interval_steps)
    if load is None or placement is None:
        raise InvalidInput(
            [InputError("load", "nothing was recorded yet: that takes `scheduling.expert.window` steps with requests")]
        )
    if costs is None:
        raise InvalidInput(
            [InputError("costs", "nothing was measured yet; it is after some hundred steps with requests")]
        )
    return plan_experts(load, placement, costs, settings)


def decision_document(decision: Move | Stay, seconds: float) -> dict[str, Any]:
    """The file that `experts apply --plan` takes; `seconds` is how long the decision took."""
    return {
        "physical_to_logical": decision.candidate.physical_to_logical.tolist(),
        "seconds": seconds,
        "moves": decision.moves,
        "balance_before": decision.balance_before.mean,
        "balance_after": decision.balance_after.mean,
        "gate": f"{'move' if isinstance(decision, Move) else 'stay'}: {_reason(decision)}",
    }


def render_decision(decision: Move | Stay) -> str:
    """Before and after, line by line, and what the gate says."""
    before, after = decision.balance_before, decision.balance_after
    old, new = decision.terms_before, decision.terms_after
    word = "would move" if isinstance(decision, Move) else "would stay"
    return (
        f"balance    {before.mean:.3f} -> {after.mean:.3f} (worst layer {before.worst:.3f} -> {after.worst:.3f})\n"
        f"to others  {before.remote_fraction:.1%} -> {after.remote_fraction:.1%} of the tokens, "
        f"to other nodes {before.internode_fraction:.1%} -> {after.internode_fraction:.1%}\n"
        f"experts    {old.total_s * 1e3:.4g} -> {new.total_s * 1e3:.4g} ms a step\n"
        f"moves      {decision.moves}, which cost {decision.cost_s:.3g} s\n"
        f"the engine {word}: {_reason(decision)}"
    )


def _reason(decision: Move | Stay) -> str:
    return "; ".join(decision.reasons) if isinstance(decision, Move) else decision.why
