"""The experts of a deployment's engines over HTTP: their state, settings in force, and directives."""

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import aiohttp
from moe_contract.clients import AgentClient, PeerError, Refused, Unreachable
from moe_contract.experts_state import ExpertsState
from moe_contract.routes import EXPERTS_TIMEOUT_S
from moe_scheduling.expert.settings import ExpertSettings

from moe_operator.experts.reach import Agent, Reached
from moe_operator.local.failure import Failure

_LOOK_EVERY_S = 0.25


async def fetch_experts(reached: Reached, *, brief: bool = False) -> dict[str, ExpertsState]:
    """The state of each engine's expert group, by the engine's name.

    Raises:
        Failure: no engine has a group, or an agent gives no answer that can be read.
    """
    async with aiohttp.ClientSession() as session:
        answers = await asyncio.gather(*(_fetch(session, agent, brief=brief) for agent in reached.agents))
    found = {agent.engine: answer for agent, answer in zip(reached.agents, answers, strict=True) if answer is not None}
    if not found:
        raise Failure(f"{reached.name}: no engine has an expert group; see spec.engine.parallelism.expert")
    return found


async def fetch_settings(agent: Agent) -> ExpertSettings:
    """The settings in force in an engine.

    Raises:
        Failure: its agent gives no answer that can be read.
    """
    async with aiohttp.ClientSession() as session:
        with _failures(agent):
            settings = (await _client(session, agent).state()).config.expert
    if settings is None:
        raise Failure(f"{agent.engine}: its agent does not say which settings of experts are in force")
    return settings


async def send_directive(agent: Agent, tokens: Sequence[str], body: dict[str, Any]) -> int:
    """Sends a directive to one engine; its number.

    Raises:
        Failure: the engine refuses or gives no answer.
    """
    async with aiohttp.ClientSession() as session:
        try:
            with _failures(agent):
                return await _client(session, agent).send_directive(body, tokens)
        except Refused as error:
            raise Failure(f"{agent.engine} {error}") from None


async def wait_for_directive(agent: Agent, version: int, timeout_s: float) -> ExpertsState | None:
    """The state once the engine has carried out a directive; None when it has not within the time."""
    give_up_s = time.monotonic() + timeout_s
    async with aiohttp.ClientSession() as session:
        while True:
            state = await _fetch(session, agent, brief=True)
            if state is not None and state.placement.directive >= version:
                return state
            if time.monotonic() >= give_up_s:
                return None
            await asyncio.sleep(_LOOK_EVERY_S)


async def _fetch(session: aiohttp.ClientSession, agent: Agent, *, brief: bool) -> ExpertsState | None:
    """The state; None on an engine without an expert group."""
    try:
        with _failures(agent):
            return await _client(session, agent).experts(brief=brief)
    except Refused as error:
        raise Failure(f"{agent.engine}: {error.reason}") from None


def _client(session: aiohttp.ClientSession, agent: Agent) -> AgentClient:
    return AgentClient(session, agent.url, timeout_s=EXPERTS_TIMEOUT_S)


@contextmanager
def _failures(agent: Agent) -> Iterator[None]:
    """Turns the errors of a call, but for refusals, into failures that name the engine."""
    try:
        yield
    except Refused:
        raise
    except Unreachable:
        raise Failure(f"{agent.engine}: its agent cannot be reached") from None
    except PeerError as error:
        raise Failure(f"{agent.engine}: its agent {error}") from None
