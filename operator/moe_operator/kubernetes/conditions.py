"""The conditions of a resource. Pure: from observations to what holds, each with a reason and what to do."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from moe_scheduling.engine.disaggregation import EngineRole

from moe_operator.api.autoscaling import AutoscalingMode
from moe_operator.api.reasons import Reason
from moe_operator.api.status import Condition, ConditionStatus, ExpertsStatus
from moe_operator.experts.report import CONDITION as BALANCED
from moe_operator.experts.report import TO_ACT_ON, Verdict, judge_experts
from moe_operator.kubernetes.finding import Finding
from moe_operator.kubernetes.kinds import INFERENCE_POOL, LEADER_WORKER_SET
from moe_operator.kubernetes.transfers import CONDITION as DISAGGREGATED
from moe_operator.kubernetes.transfers import TO_ACT_ON as TRANSFERS_TO_ACT_ON
from moe_operator.plan.pod_status import ENGINE, GATEWAY
from moe_operator.targets.report import CONDITION as TARGETS_MET
from moe_operator.targets.report import TO_ACT_ON as TARGETS_TO_ACT_ON

READY, PROGRESSING, DEGRADED, PAUSED = "Ready", "Progressing", "Degraded", "Paused"
LIMITED = "AutoscalingLimited"
# Characters of a message; the API server takes 32,768.
MOST = 8000
# Engines whose start is described in a message.
MOST_STARTS = 4
# What `kubectl get` shows without a line break in a usual terminal is less; the rest is in the conditions.
LONGEST_SUMMARY = 250


@dataclass(frozen=True, slots=True, kw_only=True)
class ConditionInputs:
    """Observations from which the conditions of a resource are computed.

    Attributes:
        invalid: why the resource cannot be planned; empty when it can.
        refused: what the API server refused; empty when nothing.
        failed: what kept the pass from doing all that it should; empty when nothing.
        paused: the operator leaves everything as it is.
        desired: engines that should exist.
        desired_roles: the same of each fixed role; empty without, and where the pass got to no plan.
        engines: engines that exist.
        ready: engines that accept requests.
        gateways: gateways that are ready.
        endpoint: whether clients reach a ready gateway through its Service.
        waker: what starts an engine where none runs, in words; empty where nothing does.
        seen: whether a gateway sees an engine that takes requests; None when no gateway answers.
        starting: how far the engines are that start, in words.
        rolling: workloads that are not yet what was planned, in words.
        gated: pods that a queueing system holds back, in words.
        disrupted: pods that Kubernetes takes away, in words.
        missing_kinds: kinds that the plan needs and the cluster lacks.
        findings: what is wrong with pods and workloads.
        limited: why the autoscaler's number is not the one that it would take; None when it is, or without autoscaling.
        has_experts: the engines should have expert groups.
        experts: what the engines say of their experts.
        transfers: whether KV blocks travel between the engines; None where they need not.
        targets: whether the bounds of latencies are kept; None without bounds.
        generation: of the resource from which all this was computed.
    """

    invalid: str = ""
    refused: str = ""
    failed: str = ""
    paused: bool = False
    desired: int = 0
    desired_roles: Mapping[EngineRole, int] = field(default_factory=dict)
    engines: int = 0
    ready: int = 0
    gateways: int = 0
    endpoint: bool = True
    waker: str = ""
    seen: bool | None = None
    starting: tuple[str, ...] = ()
    rolling: tuple[str, ...] = ()
    gated: tuple[str, ...] = ()
    disrupted: tuple[str, ...] = ()
    missing_kinds: tuple[str, ...] = ()
    findings: Sequence[Finding] = ()
    limited: tuple[Reason, str] | None = None
    has_experts: bool = False
    experts: ExpertsStatus = field(default_factory=ExpertsStatus)
    transfers: Verdict | None = None
    targets: Verdict | None = None
    generation: int | None = None


# What to do where the cluster lacks a kind that the plan needs.
_MISSING_WORKLOAD = (
    Reason.LEADER_WORKER_SET_MISSING,
    "the cluster has no LeaderWorkerSet, which engines on several nodes need; install it (lws.sigs.k8s.io) or set "
    "spec.engine.parallelism.nodes to 1",
)
_MISSING_POOL = (
    Reason.INFERENCE_POOL_MISSING,
    "the cluster has no InferencePool, or the operator no right to read it; install the Gateway API Inference "
    "Extension (gateway-api-inference-extension.sigs.k8s.io) or take spec.gateway.inferencePool away",
)
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
    if inputs.transfers is not None:
        verdicts[DISAGGREGATED] = inputs.transfers
    if inputs.targets is not None:
        verdicts[TARGETS_MET] = inputs.targets
    return tuple(
        build_condition(kind, verdict, before.get(kind), now, inputs.generation) for kind, verdict in verdicts.items()
    )


def build_condition(
    kind: str, verdict: Verdict, before: Condition | None, now: datetime, generation: int | None
) -> Condition:
    """The condition of a verdict; `before` is the one of this kind until now, whose time stays with its status."""
    status, reason, message = verdict
    message = message if len(message) <= MOST else message[:MOST] + " ..."
    since = before.last_transition_time if before is not None and before.status is status else now
    return Condition(
        type=kind,
        status=status,
        reason=reason,
        message=message,
        last_transition_time=since,
        observed_generation=generation,
    )


def is_serving(inputs: ConditionInputs) -> bool:
    """Whether a request reaches an engine now."""
    return bool(inputs.gateways and inputs.endpoint and inputs.ready and inputs.seen is not False)


def _ready(inputs: ConditionInputs) -> Verdict:
    if is_serving(inputs):
        return TRUE, Reason.SERVING, f"{inputs.ready} of {inputs.desired} engines accept requests"
    can_wait = inputs.gateways and inputs.endpoint and inputs.waker and not inputs.invalid
    if can_wait and not inputs.desired and not inputs.ready:
        return TRUE, Reason.SCALED_TO_ZERO, f"no engine runs; {inputs.waker}"
    return (FALSE, *_why_not_ready(inputs))


def find_waker(document: Mapping[str, Any]) -> str:
    """What starts an engine of a resource where none runs, in words; empty where nothing does."""
    spec = document.get("spec", {})
    section = spec.get("autoscaling")
    if section is None or spec.get("paused"):
        return ""
    is_own = section.get("mode", AutoscalingMode.INTERNAL) == AutoscalingMode.INTERNAL
    return "the next request wakes one" if is_own else "the autoscaler beside it starts one"


def _why_not_ready(inputs: ConditionInputs) -> tuple[Reason, str]:
    """The problem of what is missing, else that nobody is there yet."""
    if inputs.gateways and inputs.endpoint and inputs.ready:
        return Reason.ENGINES_NOT_SEEN, "engines accept requests, but no gateway sees one yet"
    missing = ENGINE if inputs.gateways and inputs.endpoint else GATEWAY
    if (problem := _problem(inputs, missing)) is not None:
        return problem
    if not inputs.gateways:
        return Reason.NO_GATEWAY, "no gateway is ready yet"
    if not inputs.endpoint:
        return Reason.NO_ENDPOINT, "a gateway is ready, but not yet an endpoint of its Service"
    if inputs.gated:
        return Reason.SCHEDULING_GATED, "; ".join(inputs.gated)
    nobody = "no engine is asked for, and no request starts one: the number is 0, or it is paused"
    return Reason.NO_ENGINE, f"none of {inputs.desired} engines accepts requests yet" if inputs.desired else nobody


def _progressing(inputs: ConditionInputs) -> Verdict:
    if (stopped := _why_stopped(inputs)) is not None:
        return FALSE, *stopped
    if inputs.gated:
        return TRUE, Reason.SCHEDULING_GATED, "; ".join(inputs.gated)
    if inputs.rolling:
        return TRUE, Reason.UPDATING, "; ".join((*inputs.rolling, *_starts(inputs)))
    if inputs.ready < inputs.desired:
        parts = (f"{inputs.ready} of {inputs.desired} engines are ready", *_starts(inputs), *inputs.disrupted)
        return TRUE, Reason.ENGINES_STARTING, "; ".join(parts)
    return FALSE, Reason.COMPLETE, "everything is as it should be"


def _starts(inputs: ConditionInputs) -> tuple[str, ...]:
    """How far the first engines that start are, and how many more there are."""
    more = len(inputs.starting) - MOST_STARTS
    return (*inputs.starting[:MOST_STARTS], *((f"and {more} more start",) if more > 0 else ()))


def _why_stopped(inputs: ConditionInputs) -> tuple[Reason, str] | None:
    """Why the pass did not do all that it should; None when it did."""
    if inputs.paused:
        return Reason.PAUSED, "spec.paused is set"
    if inputs.invalid:
        return Reason.INVALID_SPEC, "nothing is changed until the resource is valid"
    if inputs.failed or inputs.refused:
        reason = Reason.RECONCILE_ERROR if inputs.failed else Reason.REFUSED
        return reason, "not all that is planned was made; it is tried again"
    return None


def _degraded(inputs: ConditionInputs) -> Verdict:
    if (problem := _problem(inputs)) is None:
        return FALSE, Reason.AS_EXPECTED, ""
    reason, message = problem
    others = [*dict.fromkeys(finding.reason for finding in inputs.findings if finding.reason is not reason)]
    more = f"; also: {', '.join(others)}" if others and reason is inputs.findings[0].reason else ""
    return TRUE, reason, message + more


def _problem(inputs: ConditionInputs, component: str | None = None) -> tuple[Reason, str] | None:
    """The gravest problem: of everything, or of what keeps a component (`engine`, `gateway`) from serving."""
    if inputs.invalid:
        return Reason.INVALID_SPEC, inputs.invalid
    if LEADER_WORKER_SET.name in inputs.missing_kinds:
        return _MISSING_WORKLOAD
    if inputs.failed:
        return Reason.RECONCILE_ERROR, "; ".join(filter(None, (inputs.failed, inputs.refused)))
    if inputs.refused:
        return Reason.REFUSED, inputs.refused
    for finding in inputs.findings:
        if component is None or finding.component in (component, ""):
            return finding.reason, finding.message
    # The resource's own clients do without.
    return _MISSING_POOL if component is None and INFERENCE_POOL.name in inputs.missing_kinds else None


def _paused(inputs: ConditionInputs) -> Verdict:
    if inputs.paused:
        return TRUE, Reason.PAUSED, "spec.paused is set: everything is left as it is"
    return FALSE, Reason.NOT_PAUSED, ""


def _limited(inputs: ConditionInputs) -> Verdict:
    if inputs.limited is None:
        return FALSE, Reason.NOT_LIMITED, ""
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
    if condition.type == DISAGGREGATED:
        return condition.reason in TRANSFERS_TO_ACT_ON
    if condition.type == TARGETS_MET:
        return condition.reason in TARGETS_TO_ACT_ON
    return condition.type in (DEGRADED, LIMITED) and condition.status is TRUE


def summarise(conditions: Sequence[Condition]) -> str:
    """The conditions in one line, for `kubectl get`: what is wrong, else what is on its way, else that it serves."""
    by_type = {row.type: row for row in conditions}
    for kind, status in ((DEGRADED, TRUE), (READY, FALSE), (PAUSED, TRUE), (LIMITED, TRUE)):
        if (row := by_type.get(kind)) is not None and row.status is status:
            return _in_one_line(row)
    for kind in (BALANCED, DISAGGREGATED, TARGETS_MET):
        if (row := by_type.get(kind)) is not None and is_bad(row):
            return _in_one_line(row)
    if (row := by_type.get(PROGRESSING)) is not None and row.status is TRUE:
        return _in_one_line(row)
    return by_type[READY].reason if READY in by_type else ""


def _in_one_line(condition: Condition) -> str:
    text = " ".join(f"{condition.reason}: {condition.message}".split()) if condition.message else condition.reason
    return text if len(text) <= LONGEST_SUMMARY else text[: LONGEST_SUMMARY - 1] + "…"
