"""One look at a running deployment: its record, and the states of its agents and its gateway."""

import asyncio
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import aiohttp
from moe_contract.agent_state import AgentState
from moe_contract.clients import AgentClient, GatewayClient, PeerError
from moe_contract.experts_state import ExpertsState
from moe_contract.gateway_state import GatewayState

from moe_operator.local.record import Record

_ANSWER_TIMEOUT_S = 2.0

Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """The answers of all processes at one moment; None in place of an answer that did not come.

    Attributes:
        record: of the deployment.
        agents: the state of each agent, in the order of the record.
        gateway: the state of the gateway.
        metrics: `/metrics` of the gateway; empty when it gave none.
        experts: state of each expert group, by the engine's name.
    """

    record: Record
    agents: tuple[AgentState | None, ...]
    gateway: GatewayState | None
    metrics: str = ""
    experts: Mapping[str, ExpertsState] = field(default_factory=dict)


async def fetch_observation(record: Record) -> Observation:
    """Asks all processes at once."""
    async with aiohttp.ClientSession() as session:
        agents = [AgentClient(session, row.url, timeout_s=_ANSWER_TIMEOUT_S) for row in record.agents]
        gateway = GatewayClient(session, record.gateway.url, timeout_s=_ANSWER_TIMEOUT_S)
        states, gateway_state, metrics, experts = await asyncio.gather(
            asyncio.gather(*(_or_none(agent.state()) for agent in agents)),
            _or_none(gateway.state()),
            _or_none(gateway.metrics()),
            asyncio.gather(*(_or_none(agent.experts(brief=True)) for agent in agents)),
        )
    named = ((name_engine(record, index), answer) for index, answer in enumerate(experts))
    return Observation(
        record=record,
        agents=tuple(states),
        gateway=gateway_state,
        metrics=metrics or "",
        experts={name: answer for name, answer in named if answer is not None},
    )


def name_engine(record: Record, index: int) -> str:
    """Name of the engine that an agent runs, by the agent's place in the record."""
    return f"{record.name}-engine-{index}"


async def _or_none(call: Coroutine[Any, Any, Answer]) -> Answer | None:
    try:
        return await call
    except PeerError:
        return None
