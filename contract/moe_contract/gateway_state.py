"""The state of a gateway, `GET /v1/state` of its admin port: load, engines and the settings in force.

The gateway writes it with `write_gateway_state`; the operator, its autoscaler and the command line read it with
`read_gateway_state`, which skips unknown fields and uses the defaults of absent ones.
"""

import math
from dataclasses import dataclass, field, fields
from typing import Annotated

import orjson
from moe_scheduling.signals import EngineSignal
from pydantic import AfterValidator, TypeAdapter

from moe_contract.agent_state import Lenient
from moe_contract.gateway_config import GatewaySettings
from moe_contract.latency_record import LatencyRecord
from moe_contract.pod_identity import NO_POD, PodIdentity


def _none_if_infinite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


Figure = Annotated[float | None, AfterValidator(_none_if_infinite)]


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetReport:
    """One data-parallel rank of one engine, as the gateway sees it.

    Attributes:
        name: of the engine.
        rank: number of the rank.
        group: Service through which the engine was found; None for a fixed list.
        reachable: whether its source of signals answers.
        accepting: whether it takes new requests.
        stalled: whether it has an unanswered request and makes no steps.
        in_flight: requests sent there that have not ended.
        unanswered_prefill_tokens: uncached prompt tokens sent there that no first token has answered.
        signal_age_s: age of its newest signal; None without one.
        signal_source: where its load is known from: `agent`, `scrape`, or `in_flight`, the gateway's own accounting.
        signal: its newest signal; None without one.
        role: of the engine, where it exchanges KV blocks with others: `unified`, `prefill` or `decode`; else empty.
    """

    name: str
    rank: int = 0
    group: str | None = None
    reachable: bool = False
    accepting: bool = False
    stalled: bool = False
    in_flight: int = 0
    unanswered_prefill_tokens: int = 0
    signal_age_s: float | None = None
    signal_source: str = ""
    signal: EngineSignal | None = None
    role: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitTotals:
    """Requests split between two engines, and roles that changed, since the gateway's start.

    Attributes:
        transfers: answers that began at an engine that had not computed their prompt.
        fall_backs: pairs that were left for one engine before the answer began, by reason.
        role_changes: engines that got another role, by reason.
    """

    transfers: int = 0
    fall_backs: dict[str, int] = field(default_factory=dict)
    role_changes: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestTotals:
    """Requests since the gateway's start.

    Attributes:
        requests: that ended.
        failed: that ended with an error.
        retried: that were sent to a second engine.
    """

    requests: int = 0
    failed: int = 0
    retried: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayState:
    """The whole answer.

    Attributes:
        accepting: whether a new request can be sent to an engine.
        held: requests in the hold queue.
        held_since_s: age of the oldest of them; None without one.
        in_flight: requests at engines.
        wait_s: least predicted wait of a new request over the accepting targets; None without one.
        ttft_s: mean time to first token of the streams of the last 30 s; None without one.
        prompt_tokens_per_s: prompt tokens of requests that arrived in the last 30 s.
        arrivals_per_s: requests that arrived in the last 30 s.
        ttft: times to first token of the last five minutes beside their bound; None where they have none.
        inter_token: times between two pieces of a stream, likewise.
        config: the settings in force; None where this version cannot read them.
        engines: one row for each rank of each engine.
        totals: counters.
        splits: of requests between two engines; None where none is split.
        pod: the pod that answers; empty outside of a cluster.
    """

    accepting: bool = False
    held: int = 0
    held_since_s: Figure = None
    in_flight: int = 0
    wait_s: Figure = None
    ttft_s: Figure = None
    prompt_tokens_per_s: Figure = None
    arrivals_per_s: Figure = None
    ttft: Lenient[LatencyRecord] = None
    inter_token: Lenient[LatencyRecord] = None
    config: Lenient[GatewaySettings] = None
    engines: tuple[TargetReport, ...] = ()
    totals: RequestTotals = RequestTotals()
    splits: SplitTotals | None = None
    pod: PodIdentity = NO_POD

    @property
    def notable(self) -> tuple[object, ...]:
        """What matters at once when it changes; the rest is numbers, which change with the load."""
        return self.accepting, self.held > 0 and not self.accepting, self.config, self.pod

    @property
    def dispatch_policy(self) -> str | None:
        """Name of the choice of the engine; None where it is not known."""
        return None if self.config is None else self.config.dispatch.policy.value


_READER = TypeAdapter(GatewayState)
_NAMES = tuple(field.name for field in fields(GatewayState) if field.name != "config")


def write_gateway_state(state: GatewayState) -> bytes:
    """Returns the state as JSON, the body of `GET /v1/state`."""
    document = {name: getattr(state, name) for name in _NAMES}
    return orjson.dumps(document | {"config": None if state.config is None else state.config.document()})


def read_gateway_state(text: bytes) -> GatewayState:
    """The state in a JSON text.

    Raises:
        ValueError: it is no JSON, or a field has another type.
    """
    return _READER.validate_json(text)
