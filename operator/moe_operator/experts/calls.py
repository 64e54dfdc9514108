"""Agents asked about their experts and told what to do with them, over HTTP."""

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import aiohttp
from moe_scheduling.expert.decision import ExpertSettings
from pydantic import TypeAdapter

from moe_operator.experts.document import ExpertsDocument, read_experts
from moe_operator.experts.reach import Agent, Reached
from moe_operator.local.change import explain_answer
from moe_operator.local.failure import Failure

# The whole document of a large model has some megabytes.
_TIMEOUT = aiohttp.ClientTimeout(total=30.0, sock_connect=5.0)
_LOOK_EVERY_S = 0.25
_NO_GROUP = 404
_SETTINGS = TypeAdapter(ExpertSettings)


async def fetch_experts(reached: Reached, *, brief: bool = False) -> dict[str, ExpertsDocument]:
    """What each engine with an expert group says, by its name.

    Raises:
        Failure: no engine has one, or an agent gives no answer that can be read.
    """
    async with aiohttp.ClientSession(timeout=_TIMEOUT) as session:
        answers = await asyncio.gather(*(_fetch(session, agent, brief=brief) for agent in reached.agents))
    found = {agent.engine: answer for agent, answer in zip(reached.agents, answers, strict=True) if answer is not None}
    if not found:
        raise Failure(f"{reached.name}: no engine has an expert group; see spec.engine.parallelism.expert")
    return found


async def _fetch(session: aiohttp.ClientSession, agent: Agent, *, brief: bool) -> ExpertsDocument | None:
    """The document; None on an engine without an expert group."""
    try:
        async with session.get(f"{agent.url}/v1/experts", params={"brief": int(brief)}) as answer:
            body = await answer.read()
    except (aiohttp.ClientError, TimeoutError, OSError):
        raise Failure(f"{agent.engine}: its agent cannot be reached") from None
    if answer.status == _NO_GROUP:
        return None
    if answer.status != 200:
        raise Failure(f"{agent.engine}: {explain_answer(answer.status, body)}")
    document = read_experts(_parse(body))
    if document is None:
        raise Failure(f"{agent.engine}: its agent says of its experts what this version does not understand")
    return document


async def fetch_settings(agent: Agent) -> ExpertSettings:
    """The settings in force in an engine.

    Raises:
        Failure: its agent gives no answer that can be read.
    """
    try:
        async with (
            aiohttp.ClientSession(timeout=_TIMEOUT) as session,
            session.get(f"{agent.url}/v1/state") as answer,
        ):
            told = _parse(await answer.read())["config"]["expert"]
        known = {field.name for field in fields(ExpertSettings)}
        return _SETTINGS.validate_python({name: value for name, value in told.items() if name in known})
    except (aiohttp.ClientError, TimeoutError, OSError):
        raise Failure(f"{agent.engine}: its agent cannot be reached") from None
    except (KeyError, TypeError, AttributeError, ValueError):
        raise Failure(f"{agent.engine}: its agent does not say which settings of experts are in force") from None


async def send_directive(agent: Agent, tokens: Sequence[str], body: dict[str, Any]) -> int:
    """Tells one engine what to do; the number of the directive.

    While a token is being replaced an agent may know only the old one yet.

    Raises:
        Failure: it refuses or gives no answer.
    """
    told = "no control token"
    async with aiohttp.ClientSession(timeout=_TIMEOUT) as session:
        for token in tokens:
            headers = {"Authorization": f"Bearer {token}"}
            try:
                async with session.post(f"{agent.url}/v1/experts", json=body, headers=headers) as answer:
                    text = await answer.read()
            except (aiohttp.ClientError, TimeoutError, OSError):
                raise Failure(f"{agent.engine}: its agent cannot be reached") from None
            if answer.status == 202:
                return int(_parse(text)["version"])
            told = explain_answer(answer.status, text)
            if answer.status != 401:
                break
    raise Failure(f"{agent.engine} refused: {told}")


async def wait_for_directive(agent: Agent, version: int, timeout_s: float) -> ExpertsDocument | None:
    """The document once the engine has dealt with a directive; None when it has not within the time."""
    give_up_s = time.monotonic() + timeout_s
    async with aiohttp.ClientSession(timeout=_TIMEOUT) as session:
        while True:
            document = await _fetch(session, agent, brief=True)
            if document is not None and document.placement.directive >= version:
                return document
            if time.monotonic() >= give_up_s:
                return None
            await asyncio.sleep(_LOOK_EVERY_S)


def _parse(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return None
