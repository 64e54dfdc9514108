"""Builds the bodies of the requests for a stream that may go on at another engine. Pure."""

from array import array
from collections.abc import Mapping
from typing import Any

import orjson

from moe_gateway.continuation.ways import SAMPLING
from moe_gateway.http.routes import Route

URL = b"/v1/completions"
# Of vLLM's completions where a body has none.
DEFAULT_MAX_TOKENS = 16
_CHAT_LIMITS = ("max_completion_tokens", "max_tokens")


def ask_for_tokens(body: bytes) -> bytes:
    """A JSON object that also asks for the ids of its tokens; the last of two equal keys counts."""
    return body.rstrip()[:-1] + b',"return_token_ids":true}'


def name_response(body: bytes, response_id: str) -> bytes:
    """A JSON object that also asks for this id of the response, as the client has it; vLLM keeps it under that id."""
    return b'%b,"request_id":%b}' % (body.rstrip()[:-1], orjson.dumps(response_id))


def build_prefix_body(
    route: Route, document: Mapping[str, Any], prompt: "array[int]", tokens: "array[int]", max_model_len: int | None
) -> bytes | None:
    """The body of a completion that goes on after `tokens`.

    Args:
        route: of the client's request.
        document: its body.
        prompt: ids of its prompt.
        tokens: ids of the answer so far, up to the cut.
        max_model_len: longest sequence of the model; None where it is not known.

    Returns:
        None where the number of tokens that are left is not known, or none are, or a field is nested too deeply.
    """
    left = _tokens_left(route, document, len(prompt), len(tokens), max_model_len)
    if left is None or left <= 0:
        return None
    fields = {name: value for name, value in document.items() if name in SAMPLING and value is not None}
    min_tokens = max(0, (document.get("min_tokens") or 0) - len(tokens))
    ids = prompt.tolist() + tokens.tolist()
    counted = {"prompt": ids, "max_tokens": left, "min_tokens": min_tokens, "return_token_ids": True}
    try:
        return orjson.dumps({**fields, **counted})
    except orjson.JSONEncodeError:
        return None


def is_limited(route: Route, document: Mapping[str, Any]) -> bool:
    """Whether a body itself limits the tokens of its answer, as completions always do."""
    return route is Route.COMPLETIONS or any(document.get(name) is not None for name in _CHAT_LIMITS)


def _tokens_left(
    route: Route, document: Mapping[str, Any], prompt_tokens: int, tokens: int, max_model_len: int | None
) -> int | None:
    names = _CHAT_LIMITS if route is Route.CHAT else ("max_tokens",)
    limit = next((document[name] for name in names if document.get(name) is not None), None)
    if limit is None and route is Route.COMPLETIONS:
        limit = DEFAULT_MAX_TOKENS
    if limit is None:
        limit = None if max_model_len is None else max_model_len - prompt_tokens
    return None if limit is None else limit - tokens
