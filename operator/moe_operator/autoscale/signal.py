"""The signal of the whole fleet, from the states of gateways and agents. Pure."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

from moe_contract.agent_state import AgentState
from moe_contract.gateway_state import GatewayState
from moe_scheduling.engine.disaggregation import EngineRole
from moe_scheduling.fleet.role_load import decode_load, prefill_backlog_s
from moe_scheduling.fleet.size import FleetSignal


@dataclass(frozen=True, slots=True, kw_only=True)
class Freshness:
    """How new the newest state of a pod is; times are on the operator's monotonic clock.

    Attributes:
        as_of_s: the last time at which its numbers are known to have been these.
        alive_s: the last sign of life of what says it; what is notable was so until then.
    """

    as_of_s: float
    alive_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class States:
    """The agents and gateways of one resource that answered, each by its pod.

    Attributes:
        engines: states of agents.
        gateways: states of gateways.
        strangers: pods at whose address another pod answered; their states are in neither.
        freshness: of each state; one without counts as of now.
        asked: whether they were asked at all: of those that were not, silence says nothing.
    """

    engines: Mapping[str, AgentState] = field(default_factory=dict)
    gateways: Mapping[str, GatewayState] = field(default_factory=dict)
    strangers: frozenset[str] = frozenset()
    freshness: Mapping[str, Freshness] = field(default_factory=dict)
    asked: bool = True

    def __contains__(self, pod: str) -> bool:
        """Whether the agent or gateway in this pod answered."""
        return pod in self.engines or pod in self.gateways


NOT_ASKED = States(asked=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """The states at one moment.

    Attributes:
        gateways: state of each gateway that answered, ready or not.
        engines: state of each agent that answered, by pod.
        silent: ready gateways that did not answer; the signal is not known while there is one, for what it holds and
            sends is not known either.
        ready: gateways that are ready, silent ones included.
        observed_s: last sign of life of the one that has been silent for longest, on the operator's monotonic clock.
    """

    gateways: tuple[GatewayState, ...]
    engines: Mapping[str, AgentState]
    silent: int
    ready: int
    observed_s: float


def build_signal(now: Fleet, tokens_per_s: float | None = None) -> FleetSignal | None:
    """The fleet's signal; None when no gateway, or not every ready one, answered.

    Args:
        now: the newest states.
        tokens_per_s: tokens per second that all engines compute together; None when unknown.
    """
    if not now.gateways or now.silent:
        return None
    ready = [engine for engine in now.engines.values() if engine.ready]
    return FleetSignal(
        observed_s=now.observed_s,
        wait_s=min(_known(state.wait_s for state in now.gateways), default=None),
        kv_usage=_mean(engine.kv_usage for engine in ready),
        ttft_s=mean_ttft_s(now.gateways),
        tokens_per_s=tokens_per_s,
        arrivals_per_s=_sum(_known(state.arrivals_per_s for state in now.gateways)),
        held=sum(state.held for state in now.gateways),
        held_since_s=max(_known(state.held_since_s for state in now.gateways), default=None),
        in_flight=sum(state.in_flight for state in now.gateways),
    )


def build_role_signal(
    now: Fleet, role: EngineRole, engines: Collection[str], inter_token_s: float | None, tokens_per_s: float | None
) -> FleetSignal | None:
    """The signal of the engines of one fixed role; None when no gateway, or not every ready one, answered.

    Args:
        now: the newest states of the whole fleet.
        role: prefill or decode.
        engines: pods of the engines of the role.
        inter_token_s: longest step of an engine that decodes (seconds); None when nobody asks.
        tokens_per_s: tokens per second that the engines of the role compute together; None when unknown.
    """
    whole = build_signal(now, tokens_per_s)
    if whole is None:
        return None
    ready = [state for name, state in now.engines.items() if name in engines and state.ready]
    if role is EngineRole.PREFILL:
        backlogs = _known(prefill_backlog_s(state.ranks) for state in ready)
        return replace(whole, wait_s=min(backlogs, default=None), kv_usage=None)
    loads = [] if inter_token_s is None else [decode_load(state.ranks, inter_token_s) for state in ready]
    known = _known(loads)
    return replace(
        whole,
        wait_s=None,
        ttft_s=None,
        kv_usage=_mean(state.kv_usage for state in ready),
        # One that is not known could be above all others.
        decode_load=_mean(known) if len(known) == len(loads) else None,
    )


def asks(gateways: Iterable[GatewayState]) -> bool:
    """Whether one of the gateways has a request; what others would say changes nothing of that."""
    return any(state.held > 0 or state.in_flight > 0 or (state.arrivals_per_s or 0.0) > 0.0 for state in gateways)


def mean_ttft_s(gateways: Iterable[GatewayState]) -> float | None:
    """Mean time to first token over the gateways, each by its requests."""
    rows = [(state.ttft_s, state.arrivals_per_s or 0.0) for state in gateways if state.ttft_s is not None]
    weight = sum(arrivals for _, arrivals in rows)
    if not rows:
        return None
    return sum(value * arrivals for value, arrivals in rows) / weight if weight > 0.0 else _mean(row[0] for row in rows)


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _sum(values: list[float]) -> float | None:
    return sum(values) if values else None


def _mean(values: Iterable[float]) -> float | None:
    rows = list(values)
    return sum(rows) / len(rows) if rows else None
