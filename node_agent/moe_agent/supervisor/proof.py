"""The proof that an engine serves: one generated token, asked for by the supervisor itself.

An engine whose server answers `/health` may still die at its first request. After it did so repeatedly it is ready only
once it has generated a token, so that no gateway sends it one request more after each restart.
"""

import asyncio
from http import HTTPStatus

import aiohttp

PROOF_TIMEOUT_S = 300.0
"""Time limit of one proof: kernels that are compiled for a first request take minutes at most."""

UNSTEADY_DEATHS = 2
"""Deaths in a row, each soon after the engine was ready, from which on a proof is asked for."""


async def generates_token(session: aiohttp.ClientSession, limit_s: float) -> bool:
    """Asks the engine for one token; False while it does not answer, at the latest after `limit_s`.

    An answer that refuses the request (a model that takes no completions, a key that is asked for) is no proof against
    the engine.
    """
    timeout = aiohttp.ClientTimeout(total=PROOF_TIMEOUT_S)
    try:
        async with asyncio.timeout(limit_s):
            async with session.get("/v1/models") as answer:
                if answer.status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
                    return True
                model = (await answer.json())["data"][0]["id"]
            body = {"model": model, "prompt": "a", "max_tokens": 1}
            async with session.post("/v1/completions", json=body, timeout=timeout) as answer:
                await answer.read()
                return answer.status < 500
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError, KeyError, IndexError, TypeError):
        return False
