"""One look at a running deployment: its record, and what agents and gateway say about themselves."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from moe_operator.experts.document import ExpertsDocument, read_experts
from moe_operator.local.record import Record

_ANSWER_TIMEOUT_S = 2.0

Document = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """What was seen; None in place of an answer that did not come.

    Attributes:
        agents: `/v1/state` of each agent, in the order of the record.
        gateway: `/v1/state` of the gateway.
        metrics: `/metrics` of the gateway; empty when it gave none.
        experts: what each engine with an expert group says of it, by the engine's name.
    """

    record: Record
    agents: tuple[Document | None, ...]
    gateway: Document | None
    metrics: str = ""
    experts: Mapping[str, ExpertsDocument] = field(default_factory=dict)


async def fetch_observation(record: Record) -> Observation:
    """Asks all at once."""
    timeout = aiohttp.ClientTimeout(total=_ANSWER_TIMEOUT_S)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        agents, gateway, metrics, experts = await asyncio.gather(
            asyncio.gather(*(fetch_state(session, row.url) for row in record.agents)),
            fetch_state(session, record.gateway.url),
            fetch_metrics(session, record.gateway.url),
            asyncio.gather(*(fetch_document(session, f"{row.url}/v1/experts?brief=1") for row in record.agents)),
        )
    read = ((name_engine(record, index), read_experts(answer)) for index, answer in enumerate(experts))
    return Observation(
        record=record,
        agents=tuple(agents),
        gateway=gateway,
        metrics=metrics,
        experts={name: document for name, document in read if document is not None},
    )


def name_engine(record: Record, index: int) -> str:
    """Name of the engine that an agent runs, by the agent's place in the record."""
    return f"{record.name}-engine-{index}"


async def fetch_state(session: aiohttp.ClientSession, url: str) -> Document | None:
    """One snapshot, or None."""
    return await fetch_document(session, f"{url}/v1/state")


async def fetch_document(session: aiohttp.ClientSession, url: str) -> Document | None:
    """A JSON object, or None."""
    try:
        async with session.get(url) as answer:
            document = await answer.json()
            return document if answer.status == 200 and isinstance(document, dict) else None
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError):
        return None


async def fetch_metrics(session: aiohttp.ClientSession, url: str) -> str:
    """The text of the metrics, or nothing."""
    try:
        async with session.get(f"{url}/metrics") as answer:
            return await answer.text() if answer.status == 200 else ""
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError):
        return ""
