"""The conditions of a resource. Pure: from observations to what holds, each with a reason and what to do."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from moe_operator.api.status import Condition, ConditionStatus, ExpertsStatus
from moe_operator.experts.report import CONDITION as BALANCED
from moe_operator.experts.report import TO_ACT_ON, judge_experts
from moe_operator.kubernetes.diagnosis import Finding

READY, PROGRESSING, DEGRADED, PAUSED = "Ready", "Progressing", "Degraded", "Paused"
LIMITED = "AutoscalingLimited"
FAILED = "ReconcileError"
# Characters of a message; the API server takes 32,768.
MOST = 8000


@dataclass(frozen=True, slots=True, kw_only=True)
class ConditionInputs:
    """Observations from which the conditions of a resource are computed.

    Attributes:
        invalid: why the resource cannot be planned; empty when it can.
        refused: what the API server refused; empty when nothing.
        failed: what kept the pass from doing all that it should; empty when nothing.
        paused: the operator leaves everything as it is.
        desired: engines that should exist.
        engines: engines that exist.
        ready: engines that accept requests.
        gateways: gateways that are ready.
        rolling: workloads that are not yet what was planned, in words.
        missing_kind: a kind that the plan needs and the cluster lacks.
        findings: what is wrong with pods.
        limited: why the autoscaler's number is not the one that it would take; None when it is, or without autoscaling.
        has_experts: the engines should have expert groups.
        experts: what the engines say of their experts.
    """

    invalid: str = ""
    refused: str = ""
    failed: str = ""
    paused: bool = False
    desired: int = 0
    engines: int = 0
    ready: int = 0
    gateways: int = 0
    rolling: tuple[str, ...] = ()
    missing_kind: str = ""
    findings: Sequence[Finding] = ()
    limited: tuple[str, str] | None = None
    has_experts: bool = False
    experts: ExpertsStatus = field(default_factory=ExpertsStatus)


Verdict = tuple[ConditionStatus, str, str]
TRUE, FALSE = ConditionStatus.TRUE, ConditionStatus.FALSE


def build_conditions(inputs: ConditionInputs, before: Mapping[str, Condition], now: datetime) -> tuple[Condition, ...]:
    """All conditions; one whose status did not change keeps its time."""
    verdicts = {
        READY: _ready(inputs),
        PROGRESSING: _progressing(inputs),
        DEGRADED: _degraded(inputs),
        PAUSED: _paused(inputs),
        LIMITED: _limited(inputs),
        BALANCED: judge_experts(inputs.experts, has_group=inputs.has_experts, before=before.get(BALANCED)),
    }
    return tuple(_build(kind, verdict, before.get(kind), now) for kind, verdict in verdicts.items())


def _build(kind: str, verdict: Verdict, before: Condition | None, now: datetime) -> Condition:
    status, reason, message = verdict
    message = message if len(message) <= MOST else message[:MOST] + " ..."
    since = before.last_transition_time if before is not None and before.status is status else now
    return Condition(type=kind, status=status, reason=reason, message=message, last_transition_time=since)


def _ready(inputs: ConditionInputs) -> Verdict:
    if inputs.invalid and not inputs.ready:
        return FALSE, "InvalidSpec", inputs.invalid
    if not inputs.gateways:
        return FALSE, "NoGateway", "no gateway is ready yet"
    if inputs.ready:
        return TRUE, "Serving", f"{inputs.ready} of {inputs.desired} engines accept requests"
    if inputs.desired == 0:
        return TRUE, "ScaledToZero", "no engine runs; the next request wakes one"
    if inputs.findings:
        return FALSE, inputs.findings[0].reason, inputs.findings[0].message
    return FALSE, "NoEngine", f"none of {inputs.desired} engines accepts requests yet"


def _progressing(inputs: ConditionInputs) -> Verdict:
    if inputs.paused or inputs.invalid:
        message = "spec.paused is set" if inputs.paused else "nothing is changed until the resource is valid"
        return FALSE, "Paused" if inputs.paused else "InvalidSpec", message
    if inputs.failed or inputs.refused:
        return FALSE, FAILED if inputs.failed else "Refused", "not all that is planned was made; it is tried again"
    if inputs.rolling:
        return TRUE, "Updating", "; ".join(inputs.rolling)
    if inputs.ready < inputs.desired:
        return TRUE, "EnginesStarting", f"{inputs.ready} of {inputs.desired} engines are ready"
    return FALSE, "Complete", "everything is as it should be"


def _degraded(inputs: ConditionInputs) -> Verdict:
    if inputs.invalid:
        return TRUE, "InvalidSpec", inputs.invalid
    if inputs.missing_kind:
        message = (
            f"the cluster has no {inputs.missing_kind}, which engines on several nodes need; install it "
            "(lws.sigs.k8s.io) or set spec.engine.parallelism.nodes to 1"
        )
        return TRUE, f"{inputs.missing_kind}Missing", message
    if inputs.failed:
        return TRUE, FAILED, "; ".join(filter(None, (inputs.failed, inputs.refused)))
    if inputs.refused:
        return TRUE, "Refused", inputs.refused
    if inputs.findings:
        more = f"; also: {', '.join(finding.reason for finding in inputs.findings[1:])}" if inputs.findings[1:] else ""
        return TRUE, inputs.findings[0].reason, inputs.findings[0].message + more
    return FALSE, "AsExpected", ""


def _paused(inputs: ConditionInputs) -> Verdict:
    if inputs.paused:
        return TRUE, "Paused", "spec.paused is set: everything is left as it is"
    return FALSE, "NotPaused", ""


def _limited(inputs: ConditionInputs) -> Verdict:
    if inputs.limited is None:
        return FALSE, "NotLimited", ""
    return TRUE, *inputs.limited


def changed_conditions(before: Mapping[str, Condition], after: Sequence[Condition]) -> list[Condition]:
    """Those of which status or reason changed: each is worth an event. Of a new resource, those that hold."""
    changed = []
    for condition in after:
        old = before.get(condition.type)
        if old is None:
            if condition.status is TRUE:
                changed.append(condition)
        elif (old.status, old.reason) != (condition.status, condition.reason):
            changed.append(condition)
    return changed


def read_conditions(document: Mapping[str, Any]) -> dict[str, Condition]:
    """The conditions in a resource's status, those that cannot be read left out."""
    found = {}
    for row in document.get("status", {}).get("conditions", []):
        try:
            condition = Condition.model_validate(row)
        except ValueError:
            continue
        found[condition.type] = condition
    return found


def is_bad(condition: Condition) -> bool:
    """Returns whether the condition needs a person to act."""
    if condition.type == BALANCED:
        return condition.reason in TO_ACT_ON
    return condition.type in (DEGRADED, LIMITED) and condition.status is TRUE
