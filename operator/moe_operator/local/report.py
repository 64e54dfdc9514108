"""What an observation means: the status of the resource, and how far a start has come. Pure."""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from moe_contract.agent_state import AgentState

from moe_operator.api.status import (
    Condition,
    ConditionStatus,
    EnginePhase,
    EngineStatus,
    PoliciesInForce,
    Status,
    list_troubled_ranks,
)
from moe_operator.experts.report import build_experts
from moe_operator.local.observation import Observation, name_engine
from moe_operator.local.record import GATEWAY, Life, ProcessRecord, Record
from moe_operator.starting import build_start, describe_phase
from moe_operator.targets.report import CONDITION as TARGETS_MET
from moe_operator.targets.report import facts_in_force, judge_targets

# A start that failed so often is not a passing trouble: the same input gives the same failure.
FAILURES_TO_GIVE_UP = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Starting:
    """Not ready yet; `phases` has for each engine how far it is, in words."""

    phases: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """Every engine accepts requests and the gateway passes them on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """It will not become ready; `process` is the one whose log tells why."""

    process: str
    reason: str


Progress = Starting | Ready | Failed


def judge_start(seen: Observation, now: datetime) -> Progress:
    """How far a start has come; what is only beside the gateway and the agents does not decide."""
    for row in (seen.record.gateway, *seen.record.agents):
        if row.restarts >= FAILURES_TO_GIVE_UP:
            return Failed(process=row.name, reason=row.last_exit)
    engines = build_engines(seen, now)
    for index, engine in enumerate(engines):
        gave_up = engine.phase is EnginePhase.BACKOFF and not engine.restarts
        if gave_up or (engine.restarts >= FAILURES_TO_GIVE_UP and engine.phase is not EnginePhase.READY):
            return Failed(process=f"engine-{index}", reason=engine.last_exit)
    if all(engine.phase is EnginePhase.READY for engine in engines) and accepts(seen):
        return Ready()
    unknown = EnginePhase.UNKNOWN
    return Starting(
        phases={row.name: "waits for its agent" if row.phase is unknown else describe_phase(row) for row in engines}
    )


def find_failing(record: Record) -> tuple[ProcessRecord, ...]:
    """Processes that failed and without which requests are served all the same, such as `prometheus`."""
    needed = {row.name for row in (record.gateway, *record.agents)}
    return tuple(row for row in record.processes if row.name not in needed and row.restarts)


def accepts(seen: Observation) -> bool:
    """Whether the gateway can pass a request to an engine."""
    return seen.gateway is not None and seen.gateway.accepting


def build_status(seen: Observation, now: datetime) -> Status:
    """The status, in the form of the resource."""
    engines = build_engines(seen, now)
    return Status(
        conditions=(build_condition(seen, engines, now), *_build_targets(seen, now)),
        replicas=len(engines),
        ready_replicas=sum(engine.phase is EnginePhase.READY for engine in engines),
        endpoint=seen.record.endpoint,
        policies=build_policies(seen),
        experts=build_experts(seen.experts, now, _agents(seen)),
        engines=engines,
    )


def _agents(seen: Observation) -> dict[str, AgentState]:
    """What each agent that answers says, by the engine's name."""
    rows = enumerate(seen.agents)
    return {name_engine(seen.record, index): agent for index, agent in rows if agent is not None}


def build_engines(seen: Observation, now: datetime) -> tuple[EngineStatus, ...]:
    """Each engine, as its agent says."""
    rows = zip(seen.record.agents, seen.agents, strict=True)
    return tuple(_build_engine(name_engine(seen.record, index), agent, now) for index, (_, agent) in enumerate(rows))


def build_condition(seen: Observation, engines: Iterable[EngineStatus], now: datetime) -> Condition:
    """Returns the condition `Ready` of a local deployment, with its reason."""
    ready = accepts(seen) and not seen.record.draining
    reason, message = _explain(seen, list(engines), ready)
    # The record knows when it changed; it lags behind by up to the interval of looks.
    since = datetime.fromtimestamp(seen.record.ready_changed, UTC) if seen.record.ready == ready else now
    status = ConditionStatus.TRUE if ready else ConditionStatus.FALSE
    return Condition(type="Ready", status=status, reason=reason, message=message, last_transition_time=since)


def _build_targets(seen: Observation, now: datetime) -> tuple[Condition, ...]:
    """The condition `TargetsMet` as of now, where latencies have bounds: nothing here remembers the look before."""
    facts = None if seen.gateway is None else facts_in_force(seen.gateway)
    if facts is None or seen.gateway is None:
        return ()
    status, reason, message = judge_targets(facts, [seen.gateway], {}).verdict
    row = Condition(type=TARGETS_MET, status=status, reason=reason, message=message, last_transition_time=now)
    return (row,)


def build_policies(seen: Observation) -> PoliciesInForce:
    """The policies that run; one on which engines differ is left out."""
    orders = {None if agent is None else agent.request_policy for agent in seen.agents}
    order = orders.pop() if len(orders) == 1 else None
    return PoliciesInForce(request=order, engine=None if seen.gateway is None else seen.gateway.dispatch_policy)


def build_processes(seen: Observation) -> list[dict[str, Any]]:
    """The supervised processes, for JSON: what the status of a resource has no place for on one machine."""
    return [
        {
            "name": row.name,
            "life": str(row.life),
            "pid": row.process.pid if row.process else None,
            "url": row.url,
            "restarts": row.restarts,
            "lastExit": row.last_exit,
        }
        for row in seen.record.processes
    ]


def _build_engine(name: str, agent: AgentState | None, now: datetime) -> EngineStatus:
    if agent is None:
        return EngineStatus(name=name, phase=EnginePhase.UNKNOWN)
    return EngineStatus(
        name=name,
        phase=EnginePhase(agent.phase) if agent.phase in set(EnginePhase) else EnginePhase.UNKNOWN,
        restarts=agent.engine.restarts,
        last_exit=agent.engine.last_exit,
        running=sum(rank.running for rank in agent.ranks),
        waiting=sum(rank.waiting for rank in agent.ranks),
        kv_usage=min(1.0, agent.kv_usage),
        role=None if agent.kv_transfer is None else agent.kv_transfer.role,
        transfers=None if agent.kv_transfer is None else agent.kv_transfer.transfers,
        start=build_start(agent, now),
        troubled_ranks=list_troubled_ranks(agent),
    )


def _explain(seen: Observation, engines: list[EngineStatus], ready: bool) -> tuple[str, str]:
    count = sum(engine.phase is EnginePhase.READY for engine in engines)
    if seen.record.draining:
        return "Draining", "running streams end, then the deployment stops"
    if ready:
        return "Serving", f"{count} of {len(engines)} engines accept requests"
    if seen.gateway is None:
        gateway = next(row for row in seen.record.processes if row.name == GATEWAY)
        ended = f" since it ended: {gateway.last_exit}" if gateway.life is Life.BACKOFF else ""
        return "GatewayUnreachable", f"the gateway gives no answer{ended}"
    return "NoEngineReady", f"{count} of {len(engines)} engines accept requests"
