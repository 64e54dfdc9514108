"""Bodies of the two phases of a request that is split between two engines. Pure.

As vLLM's NixlConnector has it: the first engine computes the prompt and one token, which nobody reads, and answers with
`kv_transfer_params`; with these the second engine fetches the blocks and computes the whole answer. Fields are put
behind the client's own, of which the last counts, so that a body needs no parsing.
"""

import re
from typing import Any

import orjson

from moe_gateway.http.bodies import Body, LargeBody
from moe_gateway.http.routes import Route

# Longer than the blocks of a prompt of a million tokens take.
LONGEST_ANSWER_BYTES = 4 * 1024 * 1024
_ASK = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
_SAMPLED = {"max_tokens": 1, "min_tokens": 0, "stream": False, "stream_options": None}
_FIGURES = {"return_token_ids": None, "logprob_token_ids": None}
# What the first engine is asked for: one token, at once, without its figures. By vLLM 0.32's protocol classes.
_FIRST_PHASE: dict[Route, dict[str, Any]] = {
    Route.CHAT: {**_SAMPLED, **_FIGURES, "max_completion_tokens": 1, "logprobs": False, "top_logprobs": None},
    Route.COMPLETIONS: {**_SAMPLED, **_FIGURES, "logprobs": None},
    Route.MESSAGES: {"max_tokens": 1, "stream": False},
    # The answer repeats the client's own marks, which may be long.
    Route.RESPONSES: {"max_output_tokens": 1, "stream": False, "store": False, "metadata": None, "user": None},
}
ROUTES = frozenset(_FIRST_PHASE)
_FIRST_FIELDS = {
    route: orjson.dumps(fields | {"kv_transfer_params": _ASK})[1:-1] for route, fields in _FIRST_PHASE.items()
}
_ONE_TOKEN = re.compile(rb'"max_(?:completion_|output_)?tokens"\s*:\s*[01]\s*[,}]')
_SPACE = b" \t\r\n"


def can_split(body: Body) -> bool:
    """Returns whether fields can be put behind those of a body, which asks for more than one token."""
    parts = body.parts if isinstance(body, LargeBody) else (body,)
    begin, end = parts[0], _without_space_at_end(parts)[-1:]
    # In UTF-16 and UTF-32 every other byte is a NUL.
    if not end or not end[0].endswith(b"}") or b"\0" in begin[:4] or end[0].rstrip(b"}" + _SPACE).endswith(b"{"):
        return False
    return not any(_ONE_TOKEN.search(part) for part in {begin, end[0]})


def build_prefill_body(route: Route, body: Body) -> Body:
    """The body for the engine that computes the prompt."""
    return _with_fields(body, _FIRST_FIELDS[route])


def build_decode_body(body: Body, params: bytes) -> Body:
    """The body for the engine that decodes; `params` is what `read_transfer_params` returned."""
    return _with_fields(body, b'"kv_transfer_params":' + params)


def _with_fields(body: Body, fields: bytes) -> Body:
    if not isinstance(body, LargeBody):
        return b"%b,%b}" % (body.rstrip(_SPACE)[:-1], fields)
    *parts, last = _without_space_at_end(body.parts)
    return LargeBody((*parts, b"%b,%b}" % (last[:-1], fields)))


def _without_space_at_end(parts: tuple[bytes, ...]) -> list[bytes]:
    kept = list(parts)
    while kept and not (last := kept.pop().rstrip(_SPACE)):
        pass
    return [*kept, last] if parts and last else kept


def read_transfer_params(body: bytes) -> bytes | None:
    """The `kv_transfer_params` of an answer of the first engine, as JSON; None where they are no use to another one.

    They are checked as far as vLLM's connector relies on them: a value of another type would end the second engine.
    """
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    params = document.get("kv_transfer_params") if isinstance(document, dict) else None
    return orjson.dumps(params) if isinstance(params, dict) and _is_usable(params) else None


def _is_usable(params: dict[str, Any]) -> bool:
    texts = (params.get(name) for name in ("remote_engine_id", "remote_request_id", "remote_host"))
    sizes = (params.get(name, 1) for name in ("tp_size", "dcp_size", "pp_size"))
    tokens = params.get("remote_num_tokens")
    return (
        params.get("do_remote_prefill") is True
        and not params.get("do_remote_decode")
        and all(isinstance(text, str) and text for text in texts)
        and all(type(size) is int and size > 0 for size in sizes)
        and (tokens is None or (type(tokens) is int and tokens > 0))
        and type(port := params.get("remote_port")) is int
        and 0 < port < 65536
        and _has_blocks(params.get("remote_block_ids"))
    )


def _has_blocks(groups: object) -> bool:
    """Whether these are lists of block numbers, one for each group of layers, and not all empty."""
    if not isinstance(groups, list) or not all(isinstance(group, list) for group in groups):
        return False
    return any(groups) and all(type(block) is int and block >= 0 for group in groups for block in group)
