"""What a running server says about itself, and its tokenizer: the calls that a replay makes before it measures."""

import asyncio
import json
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from moe_contract.input_errors import InputError, InvalidInput, unknown_choice

from moe_tools.streaming import Answer, ServerAddress, exchange
from moe_tools.tiny.corpus import read_prose

CALL_TIMEOUT_S = 60.0
POOL_PIECE_CHARACTERS = 8_000
POOL_PIECES = 40

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """The name that requests carry, and the longest prompt with its answer; None where the server does not say."""

    name: str
    max_tokens: int | None


async def discover_model(endpoint: ServerAddress, wanted: str | None = None) -> ServedModel:
    """The wanted model, or the only one the server has."""
    listing = await call_json(endpoint, "GET", "/v1/models")
    models = {str(entry["id"]): entry for entry in listing.get("data", [])}
    if not models:
        raise InvalidInput([InputError(f"{endpoint}/v1/models", "lists no model")])
    if wanted is None and len(models) > 1:
        raise InvalidInput([InputError("model", f"the server has several; name one: {', '.join(sorted(models))}")])
    name = wanted or next(iter(models))
    if name not in models:
        raise InvalidInput([unknown_choice("model", name, models)])
    limit = models[name].get("max_model_len")
    return ServedModel(name=name, max_tokens=int(limit) if limit else None)


async def fetch_token_pool(endpoint: ServerAddress, model: str) -> tuple[int, ...]:
    """Token ids of real text, by the server's own tokenizer."""
    text = "\n\n".join(read_prose())
    pieces = [text[start : start + POOL_PIECE_CHARACTERS] for start in range(0, len(text), POOL_PIECE_CHARACTERS)]
    stride = max(1, len(pieces) // POOL_PIECES)
    ids: list[int] = []
    for piece in pieces[::stride][:POOL_PIECES]:
        body = {"model": model, "prompt": piece, "add_special_tokens": False}
        ids.extend((await call_json(endpoint, "POST", "/tokenize", body))["tokens"])
    return tuple(ids)


async def call_json(
    endpoint: ServerAddress, method: str, path: str, body: dict[str, Any] | None = None
) -> dict[str, Any]:
    """One call; anything but 200 with a JSON object is reported with the server's own words."""
    where = f"{endpoint}{path}"
    content = b"" if body is None else json.dumps(body).encode()
    try:
        answer = await exchange(endpoint, method, path, content, stream=False, timeout_s=CALL_TIMEOUT_S)
    except TimeoutError:
        raise InvalidInput([InputError(where, f"no answer within {CALL_TIMEOUT_S:.0f} s")]) from None
    except OSError as error:
        raise InvalidInput([InputError(where, f"cannot connect: {error.strerror or error}")]) from None
    return _read_object(where, answer)


def _read_object(where: str, answer: Answer) -> dict[str, Any]:
    text = b"".join(answer.body)
    if answer.status != 200:
        said = text[:200].decode("utf-8", "replace")
        raise InvalidInput(
            [InputError(where, f"answered {answer.status or 'nothing that is HTTP'}: {said}".rstrip(": "))]
        )
    try:
        parsed = json.loads(text)
    except ValueError:
        parsed = None
    if not isinstance(parsed, dict):
        raise InvalidInput([InputError(where, "answered something other than a JSON object")])
    return parsed


def run_async(main: Coroutine[Any, Any, Result]) -> Result:
    """The coroutine's result; it runs on an event loop of uvloop."""
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)
