"""What agents say of experts as `status.experts` and the condition `ExpertsBalanced`."""

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from experts_documents import DECISION, decided, experts, in_brief
from moe_contract.agent_state import AgentState, EngineProcess
from moe_contract.experts_state import ExpertsState, read_experts
from moe_operator.api.status import Condition, ConditionStatus, ExpertsStatus
from moe_operator.autoscale.signal import States
from moe_operator.experts.report import (
    BALANCED_AGAIN,
    BALANCED_UP_TO,
    CONDITION,
    TO_ACT_ON,
    build_experts,
    judge_experts,
)
from moe_operator.kubernetes.conditions import ConditionInputs, build_conditions, changed_conditions, is_bad
from moe_operator.kubernetes.report import build_status
from moe_operator.plan.names import Names

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def read(document: dict[str, Any]) -> ExpertsState:
    found = read_experts(json.dumps(document).encode())
    assert found is not None
    return found


def status(*documents: dict[str, Any]) -> ExpertsStatus:
    return build_experts({f"e{number}": read(document) for number, document in enumerate(documents)}, NOW, {})


def balance(mean: float) -> dict[str, Any]:
    return {"balance": {"mean": mean, "worst": mean}}


def condition(verdict: tuple[ConditionStatus, str, str]) -> Condition:
    state, reason, message = verdict
    return Condition(type=CONDITION, status=state, reason=reason, message=message, last_transition_time=NOW)


def verdict(
    *documents: dict[str, Any], has_group: bool = True, before: Condition | None = None
) -> tuple[str, str, str]:
    state, reason, message = judge_experts(status(*documents), has_group=has_group, before=before)
    return state.value, reason, message


def test_the_status_is_of_the_engine_that_is_worst_off() -> None:
    assert status().mode is None
    assert status(experts(**balance(1.2)), experts(**balance(1.5))).engine == "e1"
    grave = experts(**balance(1.0), problems=[{"kind": "version_skew", "message": "rank 1 has version 6"}])
    assert status(experts(**balance(1.9)), grave).engine == "e1"
    assert status(experts(**balance(1.3)), experts(**balance(1.3))).engine == "e0"


def test_the_status_has_what_the_agent_says_rounded_for_people() -> None:
    reported = status(decided("dryRun", moves=5, balance_after=1.0999))
    assert (reported.engine, reported.mode, reported.balance, reported.remote_fraction, reported.placement_version) == (
        "e0", "dryRun", 1.6, 0.48, 7,
    )  # fmt: skip
    last = reported.last_decision
    assert last is not None
    assert (last.outcome, last.moves, last.balance_before, last.balance_after) == ("dryRun", 5, 1.6, 1.1)
    assert last.time == NOW - timedelta(seconds=4), "3.2 s before, in whole seconds"


def test_the_brief_form_says_the_same() -> None:
    assert status(in_brief(decided("moved"))) == status(decided("moved"))


def test_a_balance_that_nothing_was_recorded_for_is_none() -> None:
    assert status(experts(load={"steps": 0})).balance is None
    assert status(experts(balance=None)).balance is None


def agent(not_balanced: str) -> AgentState:
    return AgentState(phase="ready", engine=EngineProcess(not_balanced=not_balanced))


def test_an_engine_whose_experts_cannot_be_balanced_says_so() -> None:
    why = "vLLM cannot balance the experts of OlmoeForCausalLM"
    reported = build_experts({}, NOW, {"e0": agent(""), "e1": agent(why)})
    assert (reported.engine, [row.message for row in reported.problems]) == ("e1", [why])
    state, reason, message = judge_experts(reported, has_group=True, before=None)
    assert (state, reason) == ("Unknown", "NotSupported")
    assert message == f"{why}: they lie as vLLM spreads them, and scheduling.expert has no effect"
    assert build_experts({}, NOW, {"e0": agent("")}) == ExpertsStatus()


def test_where_one_engine_balances_its_experts_its_document_is_the_status() -> None:
    reported = build_experts({"e1": read(experts())}, NOW, {"e0": agent("cannot"), "e1": agent("")})
    assert (reported.engine, reported.problems) == ("e1", ())


def test_a_newer_agent_is_understood_and_nonsense_is_no_document() -> None:
    assert read_experts(json.dumps(experts(future={"x": 1})).encode()).ranks == 2
    for broken in ({}, None, [], experts(ranks=0), experts(placement={}), experts(balance={"mean": float("nan")})):
        with pytest.raises(ValueError, match="ExpertsState"):
            read_experts(json.dumps(broken).encode())


@pytest.mark.parametrize(
    ("document", "state", "reason", "words"),
    [
        (experts(mode="off"), "Unknown", "Off", "set spec.scheduling.expert.mode to observe or dryRun"),
        (experts(load={"steps": 0}), "Unknown", "NotRecorded", "once requests come"),
        (experts(**balance(1.05)), "True", "Balanced", "e0: the busiest rank has 1.05 times the mean load"),
        (experts(mode="observe"), "False", "Imbalanced", "mode observe decides nothing"),
        (experts(), "False", "Imbalanced", "nothing was decided yet"),
        (decided("stayed"), "False", "Imbalanced", "nothing was moved: the time won would not pay for the moves"),
        (decided("dryRun", moves=5), "False", "DryRunWouldMove", "would move 5 experts for a balance of 1.10"),
        (decided("dryRun", balance_after=None), "False", "DryRunWouldMove", "`moeserving experts show`"),
        (decided("rolledBack", reason="0.2 ms slower"), "False", "RolledBack", "rolled back: 0.2 ms slower"),
        (decided("moved"), "False", "Imbalanced", "does not show yet or was not enough"),
        (decided("failed", reason="rank 1: timeout"), "False", "MoveFailed", "(rank 1: timeout)"),
        (
            experts(problems=[{"kind": "backoff", "message": "until step 99000"}]),
            "False", "RolledBack", "waits before it tries again: until step 99000",
        ),
        (experts(problems=[{"kind": "no_decision", "message": "9000 steps"}]), "False", "NoDecision", "(9000 steps)"),
        (experts(problems=[{"kind": "slow_move", "message": "0.3 s"}]), "False", "SlowMove", "moveBudget"),
        (experts(problems=[{"kind": "version_skew", "message": "6, 7"}]), "False", "VersionSkew", "restart that"),
    ],
)  # fmt: skip
def test_the_condition_says_what_holds_why_and_what_to_do(
    document: dict[str, Any], state: str, reason: str, words: str
) -> None:
    reported = verdict(document)
    assert reported[:2] == (state, reason)
    assert words in reported[2]


def test_without_a_group_or_an_answer_nothing_is_known() -> None:
    assert verdict(experts(), has_group=False)[:2] == ("Unknown", "NoExpertGroup")
    assert verdict()[:2] == ("Unknown", "NotRecorded")


def test_a_load_between_the_two_limits_changes_nothing() -> None:
    between = experts(**balance((BALANCED_UP_TO + BALANCED_AGAIN) / 2))
    balanced = condition(judge_experts(status(experts(**balance(1.0))), has_group=True, before=None))
    not_balanced = condition(judge_experts(status(experts(**balance(2.0))), has_group=True, before=balanced))
    assert verdict(between, before=balanced)[0] == "True"
    assert verdict(between, before=not_balanced)[0] == "False"
    assert verdict(experts(**balance(1.0)), before=not_balanced)[0] == "True"


def test_a_message_fits_whatever_an_agent_says() -> None:
    for document in (
        decided("stayed", reason="x" * 9000),
        experts(problems=[{"kind": "slow_move", "message": "x" * 9000}]),
    ):
        assert len(condition(judge_experts(status(document), has_group=True, before=None)).message) <= 1000


def test_only_what_somebody_has_to_act_on_is_a_warning() -> None:
    for reason in ("Imbalanced", "DryRunWouldMove", "RolledBack", "Balanced"):
        assert not is_bad(condition((ConditionStatus.FALSE, reason, "")))
    for reason in TO_ACT_ON:
        assert is_bad(condition((ConditionStatus.FALSE, reason, "")))


def test_an_event_comes_with_a_transition_and_not_with_a_number() -> None:
    def reported(before: dict[str, Condition], **changes: Any) -> tuple[dict[str, Condition], list[str]]:
        inputs = ConditionInputs(has_experts=True, experts=status(experts(**changes)))
        after = build_conditions(inputs, before, NOW)
        events = [row.reason for row in changed_conditions(before, after) if row.type == CONDITION]
        return {row.type: row for row in after}, events

    before, events = reported({}, **balance(1.0))
    assert events == ["Balanced"]
    before, events = reported(before, **balance(1.15))
    assert events == []
    before, events = reported(before, **balance(1.5))
    assert events == ["Imbalanced"]
    before, events = reported(before, **balance(1.7))
    assert events == []


def status_document(before: dict[str, Any], document: dict[str, Any]) -> dict[str, Any]:
    resource = {"metadata": {"name": "a", "generation": 1}, "spec": {}, "status": before}
    written, inputs = build_status(
        resource, Names("a"), "default", ConditionInputs(has_experts=True), [], States(), {"e0": read(document)}
    )
    assert inputs.experts == ExpertsStatus.model_validate(written["experts"])
    return written


def test_numbers_alone_are_not_written_again_while_they_are_young() -> None:
    first = status_document({}, decided("stayed"))
    again = status_document(first, decided("stayed", number=13, age_s=0.1) | balance(1.7))
    assert again == first
    old = {**first, "numbersAt": (datetime.now(UTC) - timedelta(minutes=1)).isoformat()}
    assert status_document(old, decided("stayed") | balance(1.7))["experts"]["balance"] == 1.7


def test_what_somebody_waits_for_is_written_at_once() -> None:
    first = status_document({}, decided("dryRun"))
    for document in (
        decided("dryRun") | {"mode": "active"},
        decided("moved"),
        experts(decisions=[DECISION], placement={"version": 8}),
        decided("dryRun") | {"problems": [{"kind": "slow_move"}]},
    ):
        assert status_document(first, document)["experts"] != first["experts"]


def test_an_idle_engine_gives_no_new_status_as_its_decision_ages() -> None:
    first = status_document({}, decided("stayed", age_s=3.0))
    taken = datetime.now(UTC) - timedelta(minutes=5)
    old = {**first, "numbersAt": taken.isoformat()}
    old["experts"]["lastDecision"]["time"] = (taken - timedelta(seconds=3)).isoformat(timespec="seconds")
    again = status_document(old, decided("stayed", age_s=303.4))
    assert again["experts"] == old["experts"]
    assert again["numbersAt"] == old["numbersAt"]
