"""What a real expert group publishes is what the operator's side reads: the agent's state machine, in virtual time."""

import json
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from moe_agent.experts.bookkeeping import DecisionOutcome, ProblemKind
from moe_agent.experts.document import PublishedExperts, take_publication, write_document
from moe_contract.experts_state import ExpertsState, read_experts
from moe_operator.cli.experts import describe_change
from moe_operator.experts import report
from moe_operator.experts.heat import render_experts
from moe_operator.experts.load import balance_of, read_load, read_placement
from moe_operator.experts.planned import plan_document
from moe_scheduling.expert.decision import ExpertMode, ExpertSettings
from rich.console import Console

from tests.agent.test_expert_controller import BETTER, Group, answer

NOW = datetime(2026, 1, 2, tzinfo=UTC)


def published(group: Group, *, short: bool = False) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        write_document(Path(folder), take_publication(group.controller, group.now_s))
        document = PublishedExperts(Path(folder)).read(group.now_s + 3.0, short=short)
    assert document is not None
    return json.loads(json.dumps(document))


def read(document: dict[str, Any]) -> ExpertsState:
    found = read_experts(json.dumps(document).encode())
    assert found is not None
    return found


def verdict(document: dict[str, Any]) -> tuple[str, str]:
    experts = report.build_experts({"e0": read(document)}, NOW, {})
    state, reason, _ = report.judge_experts(experts, has_group=True, before=None)
    return state.value, reason


def test_a_group_that_has_just_started_is_read() -> None:
    document = published(Group())
    assert verdict(document) == ("Unknown", "NotRecorded")
    assert read_load(read(document)) is None


def test_a_dry_run_is_read_shown_and_can_be_applied() -> None:
    group = Group(mode=ExpertMode.DRY_RUN)
    # Expert 2 is on the first rank alone.
    group.tokens = np.array([0, 0, 9, 1])
    group.planner.answer = answer()
    group.run_until(DecisionOutcome.DRY_RUN)
    document = published(group)
    assert verdict(document) == ("False", "DryRunWouldMove")
    assert verdict(published(group, short=True)) == ("False", "DryRunWouldMove")
    found = read(document)
    load, placement = read_load(found), read_placement(found.placement.physical_to_logical, found)
    assert load is not None
    assert placement is not None
    assert found.balance is not None
    assert balance_of(load, placement) == pytest.approx(found.balance.mean, rel=1e-4)
    assert found.newest is not None
    assert found.newest.physical_to_logical == tuple(map(tuple, BETTER.tolist()))
    assert "6 experts move" in describe_change(found, found.newest.physical_to_logical)
    assert plan_document(found, ExpertSettings()).candidate.ranks == 2
    Console(quiet=True).print(render_experts("e0", found))


@pytest.mark.parametrize("outcome", [DecisionOutcome.MOVED, DecisionOutcome.STAYED])
def test_what_became_of_a_decision_is_read(outcome: DecisionOutcome) -> None:
    group = Group()
    group.planner.answer = answer(pays=outcome is DecisionOutcome.MOVED)
    group.run_until(outcome)
    last = report.build_experts({"e0": read(published(group))}, NOW, {}).last_decision
    assert last is not None
    assert last.outcome == outcome
    assert (last.balance_before, last.balance_after) == (1.8, 1.1)


def test_every_outcome_and_problem_of_the_agent_is_known_here() -> None:
    document = published(Group(mode=ExpertMode.DRY_RUN))
    document |= {"load": {"steps": 10.0}, "balance": {"mean": 1.9, "worst": 1.9}}
    for outcome in DecisionOutcome:
        decision = {"number": 1, "age_s": 1.0, "outcome": outcome.value, "reason": "r"}
        assert verdict(document | {"decisions": [decision]})[0] == "False"
    reasons = {verdict(document | {"problems": [{"kind": kind.value, "message": "m"}]})[1] for kind in ProblemKind}
    assert reasons == {"NoDecision", "SlowMove", "VersionSkew", "RolledBack"}


def unknown_fields(document: Any, read_back: Any, path: str = "") -> list[str]:
    """Paths of the fields that a reader skipped."""
    if isinstance(document, dict) and isinstance(read_back, dict):
        skipped = [f"{path}.{name}" for name in document if name not in read_back]
        known = document.keys() & read_back.keys()
        return skipped + [
            row for name in known for row in unknown_fields(document[name], read_back[name], f"{path}.{name}")
        ]
    if isinstance(document, list) and isinstance(read_back, list):
        return [row for pair in zip(document, read_back, strict=True) for row in unknown_fields(*pair, path)]
    return []


@pytest.mark.parametrize("short", [False, True])
def test_the_reader_knows_every_field_that_the_writer_writes(short: bool) -> None:
    group = Group(mode=ExpertMode.DRY_RUN)
    group.tokens = np.array([0, 0, 9, 1])
    group.planner.answer = answer()
    group.run_until(DecisionOutcome.DRY_RUN)
    document = published(group, short=short)
    assert unknown_fields(document, read(document).model_dump(mode="json")) == []
    # The heat has a form of its own.
    assert short or document.keys() >= ExpertsState.model_fields.keys() - {"heat"}
