"""What an agent answers at `/v1/experts`, as the contract has it: two ranks, four experts, one spare slot a rank."""

from copy import deepcopy
from typing import Any

Document = dict[str, Any]
# Experts 0 and 1 have most of the tokens and lie on rank 0; the spare slots hold copies of the cold ones.
PLACED = [[0, 1, 2, 2, 3, 3], [0, 1, 2, 2, 3, 3]]
TOKENS = [[[40.0, 30.0, 5.0, 5.0], [10.0, 10.0, 10.0, 10.0]], [[30.0, 20.0, 5.0, 5.0], [10.0, 10.0, 10.0, 10.0]]]
DECISION: Document = {
    "number": 12,
    "step": 51000,
    "age_s": 3.2,
    "outcome": "stayed",
    "reason": "the time won would not pay for the moves",
    "moves": 0,
    "predicted_gain_s": 0.0004,
    "measured_gain_s": None,
    "cost_s": 0.01,
    "balance_before": 1.6,
    "balance_after": 1.1,
    "seconds": 0.002,
}
EXPERTS: Document = {
    "mode": "dryRun",
    "ranks": 2,
    "nodes": 1,
    "layers": 2,
    "experts": 4,
    "slots_per_rank": 3,
    "step": 51234,
    "placement": {"version": 7, "directive": 3, "physical_to_logical": PLACED},
    "load": {"steps": 1000, "tokens": TOKENS},
    "balance": {"mean": 1.6, "worst": 1.7, "by_layer": [1.7, 1.0], "by_rank": [1.6, 0.4]},
    "remote_fraction": 0.48,
    "costs": {"token_s": 1e-6, "remote_token_s": 1e-6, "internode_token_s": 1e-6, "move_s": 0.001},
    "decisions": [],
    "totals": {"moves": 42, "decisions": {"moved": 3, "stayed": 9}, "lost_s": 0.12, "won_s": 3.4},
    "problems": [],
}


def experts(**changes: Any) -> Document:
    """The document with these fields in place of its own."""
    return deepcopy(EXPERTS) | changes


def decided(outcome: str, **changes: Any) -> Document:
    """The document with one decision of this outcome."""
    return experts(decisions=[{**DECISION, "outcome": outcome, **changes}])


def in_brief(document: Document) -> Document:
    """The document without its large tables, as `?brief=1` answers."""
    brief = deepcopy(document)
    brief["placement"].pop("physical_to_logical", None)
    brief["load"].pop("tokens", None)
    for row in brief["decisions"]:
        row.pop("physical_to_logical", None)
    return brief
