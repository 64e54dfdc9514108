"""The status of a resource but for its conditions. Pure: from pods, what their agents say, and the status before.

Numbers that change all the time, such as waiting requests, are written at most every half minute: a status is for
people; numbers are in metrics.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from moe_contract.agent_state import AgentState
from moe_contract.experts_state import ExpertsState
from moe_contract.gateway_state import GatewayState
from moe_scheduling.engine.disaggregation import EngineRole

from moe_operator.api.status import (
    EnginePhase,
    EngineStatus,
    ExpertsStatus,
    PoliciesInForce,
    RoleStatus,
    list_troubled_ranks,
    status_document,
)
from moe_operator.api.status import Status as StatusSection
from moe_operator.autoscale.signal import States, mean_ttft_s
from moe_operator.experts.report import build_experts
from moe_operator.kubernetes.conditions import ConditionInputs
from moe_operator.kubernetes.groups import read_nodes, whole_replicas
from moe_operator.kubernetes.serving import sees_engines
from moe_operator.plan.names import REVISION, ROLE, STABLE, Names, replica_labels, selector_text
from moe_operator.plan.pod_status import GATEWAY, component_of, is_engine, is_live, is_ready, label_of
from moe_operator.starting import build_start, describe_start

Document = dict[str, Any]
NUMBERS_EVERY = timedelta(seconds=30)
TIME_JITTER = timedelta(seconds=5)
_NUMBERS = ("running", "waiting", "kvUsage", "transfers")
NUMBERS_AT = "numbersAt"


def build_status(
    document: Document,
    names: Names,
    namespace: str,
    inputs: ConditionInputs,
    pods: Sequence[Document],
    states: States,
    experts: Mapping[str, ExpertsState],
) -> tuple[Document, ConditionInputs]:
    """Returns the status without conditions, and the inputs of the conditions with what pods and experts add."""
    engines = [pod for pod in pods if is_engine(pod) and is_live(pod)]
    gateways = [pod for pod in pods if component_of(pod) == GATEWAY and is_ready(pod)]
    whole = whole_replicas(pods, read_nodes(document))
    live = {_name(pod): states.engines[_name(pod)] for pod in engines if _name(pod) in states.engines}
    gateway_states = [states.gateways[_name(pod)] for pod in gateways if _name(pod) in states.gateways]
    now = datetime.now(UTC)
    inputs = replace(
        inputs,
        engines=len(engines),
        ready=sum(_name(pod) in whole for pod in engines),
        gateways=len(gateways),
        seen=sees_engines(gateway_states),
        generation=document["metadata"].get("generation"),
    )
    before: Document = document.get("status", {})
    gateway = document.get("spec", {}).get("gateway", {})
    status = StatusSection(
        observed_generation=inputs.generation,
        replicas=inputs.engines,
        ready_replicas=inputs.ready,
        desired_replicas=inputs.desired,
        roles=build_roles(engines, whole, inputs.desired_roles, before),
        selector=selector_text(replica_labels(names, read_nodes(document))),
        endpoint=_endpoint(gateway, f"{names.service}.{namespace}.svc"),
        engines=tuple(_engine(pod, states.engines.get(_name(pod)), now) for pod in sorted(engines, key=_name)),
        policies=_policies(list(live.values()), gateway_states),
        ttft=_render_ttft(mean_ttft_s(gateway_states)),
        experts=build_experts(experts, now, live),
    )
    current = _keep_numbers(status_document(status), before)
    starts = [EngineStatus.model_validate(row) for row in current["engines"] if "start" in row]
    shown = ExpertsStatus.model_validate(current["experts"])
    return current, replace(inputs, experts=shown, starting=tuple(map(describe_start, starts)))


def build_roles(
    engines: Sequence[Document], whole: Collection[str], desired: Mapping[EngineRole, int], before: Document
) -> tuple[RoleStatus, ...]:
    """The stable engines of each fixed role; a pass without a plan leaves the numbers that should be as they were.

    Args:
        engines: pods of engines that live.
        whole: names of the pods that stand for an engine that is ready.
        desired: engines of each role that should exist.
        before: the status until now.
    """
    old = {row.get("role"): row.get("desiredReplicas") for row in before.get("roles", [])}
    found = []
    for role in (EngineRole.PREFILL, EngineRole.DECODE):
        stable = (pod for pod in engines if label_of(pod, REVISION) == STABLE)
        names = [_name(pod) for pod in stable if label_of(pod, ROLE) == role.value]
        wanted = desired.get(role, old.get(role.value) if not desired else None)
        if names or wanted is not None:
            ready = sum(name in whole for name in names)
            found.append(RoleStatus(role=role, replicas=len(names), ready_replicas=ready, desired_replicas=wanted))
    return tuple(found)


def _endpoint(gateway: Document, host: str) -> str:
    """The URL for clients within the cluster."""
    scheme, usual = ("https", 443) if gateway.get("tls") else ("http", 80)
    port = gateway.get("service", {}).get("port", 80)
    return f"{scheme}://{host}" if port == usual else f"{scheme}://{host}:{port}"


def _policies(engines: Sequence[AgentState], gateways: Sequence[GatewayState]) -> PoliciesInForce:
    """What all that answer have in force; absent while they differ."""
    requests = {state.request_policy for state in engines}
    choices = {state.dispatch_policy for state in gateways}
    return PoliciesInForce(
        request=requests.pop() if len(requests) == 1 else None, engine=choices.pop() if len(choices) == 1 else None
    )


def _keep_numbers(status: Document, before: Document) -> Document:
    """Old numbers stay while they are young; so does a time to first token when no request came since."""
    now = datetime.now(UTC)
    status["experts"] = _with_kept_time(status["experts"], before.get("experts", {}))
    if not status["ttft"]:
        status["ttft"] = before.get("ttft", "")
    old = {row["name"]: row for row in before.get("engines", [])}
    for row in status["engines"]:
        _keep_start(row, old.get(row["name"], {}).get("start"))
    taken = _parse_time(before.get(NUMBERS_AT))
    if taken is not None and now - taken < NUMBERS_EVERY:
        for row in status["engines"]:
            row |= {name: old[row["name"]][name] for name in _NUMBERS if name in old.get(row["name"], {})}
            last = old.get(row["name"], {}).get("start")
            if last and row.get("start", {}).get("phase") == last["phase"]:
                row["start"] = last
        if old:
            status["ttft"] = before.get("ttft") or status["ttft"]
        if _is_same_story(status["experts"], before.get("experts", {})):
            status["experts"] = before["experts"]
    changed = (
        any(row != old.get(row["name"]) for row in status["engines"])
        or status["ttft"] != before.get("ttft", "")
        or status["experts"] != before.get("experts")
    )
    at = now.isoformat(timespec="seconds") if changed or taken is None else before[NUMBERS_AT]
    return status | {NUMBERS_AT: at}


def _keep_start(row: Document, before: Document | None) -> None:
    """A phase that goes on keeps the time of its begin, which is computed anew from its age at each look."""
    if before and row.get("start", {}).get("phase") == before["phase"]:
        row["start"]["since"] = before["since"]


def numbers_due_s(status: Document, now: datetime) -> float:
    """Seconds until numbers that a status keeps back are written; 0 when it keeps none back any more."""
    taken = _parse_time(status.get(NUMBERS_AT))
    return 0.0 if taken is None else max(0.0, (taken + NUMBERS_EVERY - now).total_seconds())


def _with_kept_time(now: Document, before: Document) -> Document:
    """An age that is read again and again gives a time that is never quite the same."""
    last, old = now.get("lastDecision"), before.get("lastDecision")
    if not last or not old or {**last, "time": old.get("time")} != old:
        return now
    time, old_time = _parse_time(last["time"]), _parse_time(old["time"])
    same = time is not None and old_time is not None and abs(time - old_time) <= TIME_JITTER
    return now | {"lastDecision": old} if same else now


def _is_same_story(now: Document, before: Document) -> bool:
    """Whether the experts differ in numbers alone; any other change is written at once."""

    def story(experts: Document) -> tuple[Any, ...]:
        last, problems = experts.get("lastDecision") or {}, experts.get("problems", [])
        names = ("engine", "mode", "placementVersion")
        return *map(experts.get, names), "balance" in experts, last.get("outcome"), [row["kind"] for row in problems]

    return story(now) == story(before)


def _parse_time(text: Any) -> datetime | None:
    try:
        return datetime.fromisoformat(text)
    except (TypeError, ValueError):
        return None


def _engine(pod: Document, state: AgentState | None, now: datetime) -> EngineStatus:
    if state is None:
        return EngineStatus(name=_name(pod), phase=EnginePhase.UNKNOWN)
    return EngineStatus(
        name=_name(pod),
        phase=EnginePhase(state.phase) if state.phase in set(EnginePhase) else EnginePhase.UNKNOWN,
        restarts=state.engine.restarts,
        last_exit=state.engine.last_exit[:500],
        running=sum(rank.running for rank in state.ranks),
        waiting=sum(rank.waiting for rank in state.ranks),
        kv_usage=round(state.kv_usage, 2),
        role=None if state.kv_transfer is None else state.kv_transfer.role,
        transfers=None if state.kv_transfer is None else state.kv_transfer.transfers,
        start=build_start(state, now),
        troubled_ranks=list_troubled_ranks(state),
    )


def _render_ttft(seconds: float | None) -> str:
    """Two digits that count: `120ms`, `1.2s`."""
    if seconds is None or not math.isfinite(seconds) or seconds <= 0.0:
        return ""
    if seconds >= 1.0:
        return f"{seconds:.2g}s" if seconds < 100.0 else f"{seconds:.0f}s"
    milliseconds = seconds * 1000.0
    return f"{milliseconds:.2g}ms" if milliseconds < 100.0 else f"{round(milliseconds, -1):.0f}ms"


def _name(pod: Document) -> str:
    return str(pod["metadata"]["name"])
