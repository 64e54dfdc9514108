"""The condition `TargetsMet`: whether the bounds of `scheduling.engine.targets` are kept, by measured traffic. Pure.

Gateways count their latencies of the last five minutes beside each bound (`moe_contract.latency_record`). A bound is
kept while 95 % of the latencies of all gateways are within it. One that was missed counts as kept again only below a
part of it, and a verdict needs a number of latencies, so that a value close to the bound gives no series of events.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from moe_contract.gateway_state import GatewayState
from moe_contract.latency_record import LatencyRecord, merge_records
from moe_scheduling.engine.choice import DispatchPolicy
from moe_scheduling.engine.disaggregation import LatencyTargets

from moe_operator.api.reasons import Reason
from moe_operator.api.roles import RoleMode
from moe_operator.api.status import Condition, ConditionStatus
from moe_operator.api.units import duration_s, render_duration
from moe_operator.experts.report import Verdict

CONDITION = "TargetsMet"
# Reasons that need a person.
TO_ACT_ON = frozenset({Reason.TARGETS_MISSED})
# Fewer latencies give no verdict; one that was given stays until there are fewer than the second.
LEAST_MEASURED, LEAST_KEPT = 20, 10
# A bound that was missed counts as kept again where the percentile is at least two buckets, 8.3 %, below it.
_AGAIN_BUCKET = -2
# A bound: its name and its value in seconds. One that was changed is another one.
Bound = tuple[str, float]
TRUE, FALSE, UNKNOWN = ConditionStatus.TRUE, ConditionStatus.FALSE, ConditionStatus.UNKNOWN
_WORDS = {"ttft": "first tokens", "interToken": "times between tokens"}


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetFacts:
    """The fields of a resource that decide about its bounds.

    Attributes:
        targets: the bounds.
        is_predicted: whether requests are sent by predictions, without which the bounds steer nothing.
        roles: who decides about prefill and decode.
        is_autoscaled: whether the number of engines follows the load.
    """

    targets: LatencyTargets
    is_predicted: bool = True
    roles: RoleMode = RoleMode.UNIFIED
    is_autoscaled: bool = False


def read_facts(document: Mapping[str, Any]) -> TargetFacts | None:
    """Returns the facts of a resource with bounds; None without bounds, or where they cannot be read."""
    section = _part(document, "spec", "scheduling", "engine")
    targets = _part(section, "targets")
    try:
        bounds = {name: duration_s(targets[name]) for name in ("ttft", "interToken") if targets.get(name) is not None}
        found = LatencyTargets(ttft_s=bounds.get("ttft"), inter_token_s=bounds.get("interToken"))
    except (TypeError, ValueError):
        return None
    mode = _part(document, "spec", "engine", "roles").get("mode")
    if not found.is_bounded:
        return None
    return TargetFacts(
        targets=found,
        is_predicted=section.get("policy", DispatchPolicy.PREDICTED) == DispatchPolicy.PREDICTED,
        roles=RoleMode(mode) if mode in set(RoleMode) else RoleMode.UNIFIED,
        is_autoscaled=bool(_part(document, "spec", "autoscaling")),
    )


def facts_in_force(gateway: GatewayState) -> TargetFacts | None:
    """Returns the facts of a gateway without a resource, as on one machine; None without bounds."""
    dispatch = None if gateway.config is None else gateway.config.dispatch
    if dispatch is None or not dispatch.targets.is_bounded:
        return None
    return TargetFacts(
        targets=dispatch.targets,
        is_predicted=dispatch.policy is DispatchPolicy.PREDICTED,
        roles=RoleMode.UNIFIED if gateway.splits is None else RoleMode.AUTO,
    )


def _part(document: Any, *names: str) -> Mapping[str, Any]:
    for name in names:
        document = document.get(name) if isinstance(document, Mapping) else None
    return document if isinstance(document, Mapping) else {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """The verdict over the bounds of a resource, and what the next one looks back on.

    Attributes:
        verdict: over all bounds.
        kept: whether each bound with enough latencies is kept, by its name and its value (seconds).
    """

    verdict: Verdict
    kept: Mapping[Bound, bool]


def judge_targets(facts: TargetFacts, gateways: Iterable[GatewayState], before: Mapping[Bound, bool]) -> Judgement:
    """Returns the verdict over the bounds of a resource.

    Args:
        facts: the bounds, and what could be changed.
        gateways: the newest state of each gateway.
        before: `kept` of the last judgement; of another bound it says nothing.
    """
    kept, texts = {}, []
    for name, record in _merge(facts.targets, [*gateways]).items():
        bound = (name, record.bound_s)
        least = LEAST_KEPT if bound in before else LEAST_MEASURED
        if record.measured < least:
            texts.append(_describe_unknown(name, least))
            continue
        kept[bound] = _bucket(record) <= (0 if before.get(bound, True) else _AGAIN_BUCKET)
        advice = "" if kept[bound] else f" ({_advise(name, facts)})"
        texts.append(_describe(name, record) + advice)
    message = "; ".join(texts)
    if not all(kept.values()):
        return Judgement(verdict=(FALSE, Reason.TARGETS_MISSED, message), kept=kept)
    is_known = len(kept) == len(texts)
    verdict = (TRUE, Reason.WITHIN_TARGETS, message) if is_known else (UNKNOWN, Reason.NO_TRAFFIC, message)
    return Judgement(verdict=verdict, kept=kept)


def read_kept(facts: TargetFacts, before: Condition | None) -> dict[Bound, bool]:
    """Returns what a condition of another operator says of each bound; of two the one that was missed is not known."""
    if before is None or before.status is UNKNOWN:
        return {}
    records = _merge(facts.targets, [])
    return {(name, record.bound_s): before.status is TRUE or len(records) > 1 for name, record in records.items()}


def _merge(targets: LatencyTargets, gateways: list[GatewayState]) -> dict[str, LatencyRecord]:
    """The latencies beside each bound, all gateways together."""
    found = {}
    if targets.ttft_s is not None:
        found["ttft"] = merge_records((state.ttft for state in gateways), targets.ttft_s)
    if targets.inter_token_s is not None:
        found["interToken"] = merge_records((state.inter_token for state in gateways), targets.inter_token_s)
    return found


def _bucket(record: LatencyRecord) -> int:
    bucket = record.percentile_bucket()
    assert bucket is not None
    return bucket


def _describe_unknown(name: str, least: int) -> str:
    return f"{name}: fewer than {least} {_WORDS[name]} of streams in the last 5 minutes"


def _describe(name: str, record: LatencyRecord) -> str:
    value_s = record.percentile_s()
    assert value_s is not None
    bound = render_duration(record.bound_s)
    return f"{name}: 95 % of the {_WORDS[name]} of the last 5 minutes within {render_latency(value_s)}, bound {bound}"


def render_latency(seconds: float) -> str:
    """Two digits that count: `0.42ms`, `120ms`, `1.2s`."""
    value, unit = (seconds, "s") if seconds >= 1.0 else (seconds * 1000.0, "ms")
    return f"{float(f'{value:.2g}'):g}{unit}"


def _advise(name: str, facts: TargetFacts) -> str:
    """Returns what would have to change for the bound to be kept."""
    if not facts.is_predicted:
        return "bounds steer requests only under scheduling.engine.policy predicted"
    longer = f"or a longer scheduling.engine.targets.{name}"
    if facts.roles is RoleMode.FIXED:
        role = "prefill" if name == "ttft" else "decode"
        return f"needed: more {role} engines, engine.roles.{role}, {longer}"
    more = "more engines, autoscaling.maxReplicas and targets" if facts.is_autoscaled else "more engines"
    apart = ", prefill and decode apart, engine.roles.mode auto" if name == "interToken" else ""
    return f"needed: {more}{apart if facts.roles is RoleMode.UNIFIED else ''}, {longer}"
