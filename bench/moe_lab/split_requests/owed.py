"""The tokens that each request is owed: those of one plain engine, asked before the run and kept in a file."""

import asyncio
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import aiohttp

from moe_lab.split_requests.judgement import Content, read_content
from moe_lab.split_requests.testbed import plain_engine
from moe_lab.split_requests.traffic import SplitRequest

_AT_ONCE = 8
_TIMEOUT = aiohttp.ClientTimeout(total=600.0)


async def find_owed(
    requests: Sequence[SplitRequest], model: Path, folder: Path, kept: Path, say: Callable[[str], None]
) -> dict[int, str]:
    """The owed tokens by the number of the request.

    Args:
        requests: all of the run.
        model: folder of the model.
        folder: for the engine's logs.
        kept: file of the tokens, which is made where it is not there.
        say: gets a line for each step.

    Raises:
        DidNotStart: the engine does not serve.
        RuntimeError: it refuses a request.
    """
    known = read_kept(kept)
    missing = [request for request in requests if request.number not in known]
    if missing:
        say(f"asking one plain engine for the tokens of {len(missing)} requests")
        async with plain_engine(model, folder) as engine:
            known |= await _ask_all(engine.url, missing)
        keep(known, kept)
    return {request.number: known[request.number] for request in requests}


def read_kept(path: Path) -> dict[int, str]:
    """The owed tokens that a file keeps; none where it is not there."""
    if not path.is_file():
        return {}
    return {int(number): tokens for number, tokens in json.loads(path.read_text("utf-8")).items()}


def keep(known: dict[int, str], path: Path) -> None:
    """Writes them to a file."""
    path.write_text(json.dumps(known), "utf-8")


async def _ask_all(url: str, requests: Sequence[SplitRequest]) -> dict[int, str]:
    owed: dict[int, str] = {}
    left = iter(requests)

    async def work(session: aiohttp.ClientSession) -> None:
        for request in left:
            owed[request.number] = (await ask_whole(session, url, request)).tokens

    async with aiohttp.ClientSession(timeout=_TIMEOUT) as session, asyncio.TaskGroup() as group:
        for _ in range(_AT_ONCE):
            group.create_task(work(session))
    return owed


async def ask_whole(session: aiohttp.ClientSession, url: str, request: SplitRequest, **more: Any) -> Content:
    """The whole answer of an engine.

    Raises:
        RuntimeError: it gives none.
    """
    async with session.post(url + request.api.value, json=request.body | more) as answer:
        body = await answer.read()
        if answer.status != 200:
            raise RuntimeError(f"the plain engine answered {answer.status}: {body[:500]!r}")
    content = read_content(request, body)
    if content.ends != 1 or content.error:
        raise RuntimeError(f"the plain engine gave no whole answer: {body[-500:]!r}")
    return content
