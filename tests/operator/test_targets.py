"""The condition `TargetsMet`: what it says by the measured latencies, and that it does not flap."""

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_contract.gateway_config import GatewaySettings
from moe_contract.gateway_state import GatewayState, SplitTotals
from moe_contract.latency_record import LatencyRecord
from moe_operator.api.roles import RoleMode
from moe_operator.api.status import Condition, ConditionStatus
from moe_operator.autoscale.signal import NOT_ASKED, States
from moe_operator.cli.table import render_targets
from moe_operator.kubernetes.conditions import ConditionInputs, build_conditions, is_bad, summarise
from moe_operator.kubernetes.store import Key
from moe_operator.kubernetes.traffic import NUMBERS_EVERY_S, TrafficWatch
from moe_operator.local.report import build_status
from moe_operator.targets.report import (
    CONDITION,
    TargetFacts,
    facts_in_force,
    judge_targets,
    read_facts,
    read_kept,
    render_latency,
)
from moe_scheduling.engine.choice import EngineSettings
from moe_scheduling.engine.disaggregation import LatencyTargets
from moe_scheduling.request.order import RequestSettings
from test_local_decisions import NOW, seen

KEY = Key("ns", "a")
TTFT = {"spec": {"scheduling": {"engine": {"targets": {"ttft": "500ms"}}}}}


def gateway(ttft: dict[int, int] | None = None, gaps: dict[int, int] | None = None, bound_s: float = 0.5) -> Any:
    def record(counts: Any, bound_s: float) -> Any:
        return None if counts is None else LatencyRecord(bound_s=bound_s, counts=tuple(counts.items()))

    return GatewayState(ttft=record(ttft, bound_s), inter_token=record(gaps, 0.05))


def facts(ttft_s: float | None = 0.5, inter_token_s: float | None = None, **further: Any) -> TargetFacts:
    return TargetFacts(targets=LatencyTargets(ttft_s=ttft_s, inter_token_s=inter_token_s), **further)


def verdict(facts: TargetFacts, *gateways: Any, before: Any = None) -> Any:
    return judge_targets(facts, gateways, before or {}).verdict


def condition(status: str, reason: str = "TargetsMissed") -> Condition:
    return Condition(
        type=CONDITION, status=ConditionStatus(status), reason=reason, last_transition_time=datetime.now(UTC)
    )


@pytest.mark.parametrize(
    ("gateways", "expected"),
    [
        ([], ("Unknown", "NoTraffic")),
        ([gateway({0: 19})], ("Unknown", "NoTraffic")),
        ([gateway({0: 20})], ("True", "WithinTargets")),
        ([gateway({0: 10}), gateway({-40: 10})], ("True", "WithinTargets")),
        ([gateway({0: 95, 40: 5})], ("True", "WithinTargets")),
        ([gateway({0: 94, 40: 6})], ("False", "TargetsMissed")),
        ([gateway({0: 95}), gateway({1: 20})], ("False", "TargetsMissed")),
        ([gateway({9: 90}, bound_s=1.0), gateway({0: 20})], ("True", "WithinTargets")),
        ([GatewayState()], ("Unknown", "NoTraffic")),
    ],
)
def test_a_bound_is_kept_while_95_percent_of_all_gateways_latencies_are_within_it(gateways, expected):
    status, reason, message = verdict(facts(), *gateways)
    assert (status.value, reason.value) == expected
    assert message.startswith("ttft: ")


@pytest.mark.parametrize(
    ("ttft", "gaps", "expected"),
    [
        ({0: 50}, {0: 50}, "True"),
        ({1: 50}, {0: 50}, "False"),
        ({0: 50}, {1: 50}, "False"),
        ({0: 50}, {}, "Unknown"),
        ({1: 50}, None, "False"),
    ],
)
def test_each_bound_has_to_be_kept_and_one_that_is_not_measured_is_not_known(ttft, gaps, expected):
    status, _, message = verdict(facts(0.5, 0.05), gateway(ttft, gaps))
    assert status.value == expected
    assert "ttft: " in message
    assert "interToken: " in message


def test_the_message_has_the_measured_value_the_bound_and_what_would_have_to_change():
    _, _, message = verdict(facts(0.5, 0.05), gateway({16: 50}, {-16: 50}))
    assert message == (
        "ttft: 95 % of the first tokens of the last 5 minutes within 1s, bound 500ms (needed: more engines, or a "
        "longer scheduling.engine.targets.ttft); interToken: 95 % of the times between tokens of the last 5 minutes "
        "within 25ms, bound 50ms"
    )


@pytest.mark.parametrize(
    ("further", "words"),
    [
        ({}, "more engines, prefill and decode apart, engine.roles.mode auto, or a longer"),
        ({"roles": RoleMode.AUTO}, "needed: more engines, or a longer"),
        ({"roles": RoleMode.FIXED}, "more decode engines, engine.roles.decode"),
        ({"is_autoscaled": True}, "autoscaling.maxReplicas"),
        ({"is_predicted": False}, "scheduling.engine.policy predicted"),
    ],
)
def test_the_advice_is_for_this_resource(further, words):
    _, _, message = verdict(facts(None, 0.05, **further), gateway(None, {16: 50}))
    assert words in message


@pytest.mark.parametrize(
    ("before", "counts", "expected"),
    [
        ("True", {0: 50}, "True"),
        ("True", {1: 50}, "False"),
        ("False", {0: 50}, "False"),
        ("False", {-1: 50}, "False"),
        ("False", {-2: 50}, "True"),
        ("Unknown", {0: 50}, "True"),
        ("True", {0: 10}, "True"),
        ("True", {0: 9}, "Unknown"),
        ("Unknown", {0: 19}, "Unknown"),
        ("False", {1: 10}, "False"),
    ],
)
def test_a_value_close_to_the_bound_gives_no_series_of_events(before, counts, expected):
    status, _, _ = verdict(facts(), gateway(counts), before=read_kept(facts(), condition(before)))
    assert status.value == expected


@given(st.sampled_from(["True", "False", "Unknown"]), st.dictionaries(st.integers(-384, 384), st.integers(0, 99)))
def test_the_same_latencies_give_the_same_verdict_again(before, counts):
    first = judge_targets(facts(), [gateway(counts)], read_kept(facts(), condition(before)))
    second = judge_targets(facts(), [gateway(counts)], first.kept)
    assert (second.verdict[:2], second.kept) == (first.verdict[:2], first.kept)
    kept = read_kept(facts(), condition(first.verdict[0].value))
    assert verdict(facts(), gateway(counts), before=kept)[:2] == first.verdict[:2]


def test_each_bound_has_a_past_of_its_own():
    both, watch = facts(0.5, 0.05), TrafficWatch()
    missed = judge_targets(both, [gateway({8: 50}, {-1: 50})], {})
    assert missed.kept == {("ttft", 0.5): False, ("interToken", 0.05): True}
    assert judge_targets(both, [gateway({8: 50}, {-1: 50})], missed.kept).kept == missed.kept
    again = judge_targets(both, [gateway({-30: 50}, {-1: 50})], missed.kept)
    assert again.verdict[0] is ConditionStatus.TRUE, "interToken was never missed"
    longer = judge_targets(facts(1.0), [gateway({-1: 50}, bound_s=1.0)], missed.kept)
    assert longer.verdict[0] is ConditionStatus.TRUE, "this bound was never missed"
    targets = {"ttft": "500ms", "interToken": "50ms"}
    document = {"spec": {"scheduling": {"engine": {"targets": targets}}}}
    first = said(watch, document, States(gateways={"g": gateway({8: 50}, {-1: 50})}))
    second = said(watch, document, States(gateways={"g": gateway({8: 50}, {8: 50})}), built_from(first))
    assert first[2].count("needed") == 1
    assert second[2].count("needed") == 2, "another bound is written at once"
    third = said(watch, document, States(gateways={"g": gateway({-9: 50}, {-1: 50})}), built_from(second))
    assert third[:2] == (ConditionStatus.FALSE, "TargetsMissed")
    assert third[2].count("needed") == 1


def built_from(verdict: Any) -> Condition:
    status, reason, message = verdict
    row = condition(status.value, reason)
    return row.model_copy(update={"message": message})


def test_of_two_bounds_another_operator_left_none_is_held_against():
    assert read_kept(facts(0.5, 0.05), condition("False")) == {("ttft", 0.5): True, ("interToken", 0.05): True}


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (None, None),
        ({}, None),
        ({"ttft": None}, None),
        ({"ttft": "1s"}, LatencyTargets(ttft_s=1.0)),
        ({"interToken": "50ms"}, LatencyTargets(inter_token_s=0.05)),
        ({"ttft": "soon"}, None),
        ({"ttft": 7}, None),
        ("fast", None),
    ],
)
def test_bounds_are_read_from_any_document(targets, expected):
    found = read_facts({"spec": {"scheduling": {"engine": {"targets": targets}}}})
    assert (None if found is None else found.targets) == expected


def test_facts_are_those_of_the_resource():
    engine = {"targets": {"ttft": "1s"}, "policy": "roundRobin"}
    found = read_facts(
        {"spec": {"scheduling": {"engine": engine}, "engine": {"roles": {"mode": "auto"}}, "autoscaling": {"a": 1}}}
    )
    assert (found.is_predicted, found.roles, found.is_autoscaled) == (False, RoleMode.AUTO, True)


@pytest.mark.parametrize(("seconds", "text"), [(0.00042, "0.42ms"), (0.0123, "12ms"), (0.123, "120ms"), (1.26, "1.3s")])
def test_latencies_have_two_digits(seconds, text):
    assert render_latency(seconds) == text


def said(watch: TrafficWatch, document: Any, states: States, before: Condition | None = None) -> Any:
    found = {} if before is None else {CONDITION: before}
    return watch.judge(ConditionInputs(), KEY, document, states, found).targets


def test_other_numbers_are_written_twice_a_minute_and_another_verdict_at_once():
    now = [0.0]
    watch = TrafficWatch(lambda: now[0])
    first = said(watch, TTFT, States(gateways={"g": gateway({-9: 50})}))
    now[0] = NUMBERS_EVERY_S - 1
    slower = States(gateways={"g": gateway({-3: 50})})
    assert said(watch, TTFT, slower) == first
    now[0] = NUMBERS_EVERY_S
    assert said(watch, TTFT, slower)[2] != first[2]
    assert said(watch, TTFT, States(gateways={"g": gateway({5: 50})}))[0] is ConditionStatus.FALSE
    watch.forget(KEY)
    assert said(watch, {"spec": {}}, slower) is None


def test_gateways_that_were_not_asked_change_nothing():
    watch, before = TrafficWatch(), condition("False")
    assert said(watch, TTFT, NOT_ASKED, before)[:2] == (ConditionStatus.FALSE, "TargetsMissed")
    assert said(watch, TTFT, NOT_ASKED) is None


def test_missed_bounds_are_in_the_summary_and_a_condition_stands_only_with_bounds():
    def built(verdict: Any) -> Any:
        inputs = ConditionInputs(desired=1, engines=1, ready=1, gateways=1, seen=True, targets=verdict)
        return build_conditions(inputs, {}, datetime.now(UTC))

    missed = built(verdict(facts(), gateway({5: 50})))
    assert summarise(missed).startswith("TargetsMissed: ttft")
    assert [row.type for row in missed if is_bad(row)] == [CONDITION]
    assert summarise(built(verdict(facts()))) == "Serving"
    assert CONDITION not in {row.type for row in built(None)}


def test_one_machine_shows_what_its_gateway_measured():
    config = GatewaySettings(dispatch=EngineSettings(targets=LatencyTargets(ttft_s=0.5)), request=RequestSettings())
    measured = replace(gateway({16: 50}), accepting=True, config=config)
    status = build_status(replace(seen(), gateway=measured), NOW)
    (row,) = [row for row in status.conditions if row.type == CONDITION]
    assert (row.status.value, row.reason) == ("False", "TargetsMissed")
    assert render_targets(row).startswith("targets missed: ttft: 95 % of the first tokens")
    assert CONDITION not in {row.type for row in build_status(seen(), NOW).conditions}
    assert CONDITION not in {row.type for row in build_status(seen(gateway=None), NOW).conditions}


def test_roles_of_one_machine_are_those_that_its_gateway_may_move():
    splits = GatewayState(config=seen().gateway.config, splits=SplitTotals())
    assert facts_in_force(splits) is None
    config = GatewaySettings(dispatch=EngineSettings(targets=LatencyTargets(ttft_s=1.0)), request=RequestSettings())
    assert facts_in_force(GatewayState(config=config, splits=SplitTotals())).roles is RoleMode.AUTO
    assert facts_in_force(GatewayState(config=config)).roles is RoleMode.UNIFIED
