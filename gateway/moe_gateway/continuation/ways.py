"""Which streams can go on at another engine, and in which way, by the fields of their requests. Pure.

A stream goes on only where the tokens that follow are those that its first engine would have computed. So they must
not be drawn at random (temperature 0), or from a seed. Fields are those of vLLM 0.32; one that is not listed here may
change how tokens are computed, so it rules out `PREFIX`.
"""

import re
from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from moe_gateway.http.routes import Route


class Way(StrEnum):
    """How a stream goes on; a metric label.

    `PREFIX`: another engine gets the prompt and the tokens so far, as token ids, and computes what follows.
    `REPLAY`: another engine computes the whole answer anew, and what the client has is compared with it and left out.
    """

    PREFIX = "prefix"
    REPLAY = "replay"


# Their engines show no token ids, neither of the prompt nor of the answer, so their streams go on by `REPLAY` alone.
EVENT_ROUTES = frozenset({Route.MESSAGES, Route.RESPONSES})
ROUTES = EVENT_ROUTES | {Route.COMPLETIONS, Route.CHAT}
# Text of this length is held back by an engine for a stop string at most; a longer one is unheard of.
LONGEST_STOP = 1024

# Their answers differ from one time to the next, or cannot be split between two tokens.
_NEVER = (
    "use_beam_search",
    "prompt_logprobs",
    "kv_transfer_params",
    "ec_transfer_params",
    "vllm_xargs",
)
# Tools of `/v1/responses` that the client runs; what an engine's own tools answer may be another thing the next time.
_CLIENTS_TOOLS = frozenset({"function", "custom", "namespace"})
# Sampling fields whose effect on a token does not depend on whether earlier ones are prompt or output. A repetition
# penalty counts both; presence and frequency penalties, bad words and a grammar count or follow the output alone.
SAMPLING = frozenset(
    (
        *("model", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "stop", "stop_token_ids"),
        *("include_stop_str_in_output", "ignore_eos", "skip_special_tokens", "spaces_between_special_tokens"),
        *("logit_bias", "allowed_token_ids", "cache_salt", "priority", "user", "session_id", "request_id"),
        *("stream", "stream_options", "stream_interval"),
    )
)
# Counted from the first token on, so they are reduced by the tokens so far.
COUNTED = frozenset({"max_tokens", "max_completion_tokens", "min_tokens"})
# What they do shows in the token ids of the prompt, or nowhere.
_RENDERED = frozenset(
    (
        *("prompt", "messages", "add_special_tokens", "truncate_prompt_tokens", "truncation_side", "documents"),
        *("add_generation_prompt", "continue_final_message", "chat_template", "chat_template_kwargs"),
        *("reasoning_effort", "parallel_tool_calls", "tool_choice", "include_reasoning", "return_token_ids"),
        *("metadata", "store", "service_tier", "length_penalty", "top_logprobs"),
    )
)
_KNOWN = SAMPLING | COUNTED | _RENDERED
# As good as absent, with this value.
_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "n": (1,),
    "best_of": (1,),
    "response_format": ({"type": "text"},),
}
# A field with what a parser has taken out of a chat's text. In the text itself such quotes are escaped.
_PARSED = re.compile(
    rb'"(?:reasoning|reasoning_content)"\s*:\s*"[^"]|"(?:tool_calls|function_call)"\s*:\s*[\[{]\s*[^\s\]}]'
)
_ABSENT: tuple[object, ...] = (None, False, [], {})


def find_way(route: Route, document: Mapping[str, Any], *, has_media: bool, by_prefix: bool) -> Way | None:
    """How the stream that a body asks for can go on; None: not at all.

    Args:
        route: one of `ROUTES` that is none of `EVENT_ROUTES`.
        document: the body.
        has_media: whether its prompt has images, audio or video, whose token ids do not stand for them.
        by_prefix: whether engines compute tokens of this route from those before alone, and pass their text on.
    """
    is_greedy = _is_greedy(document)
    if not is_greedy and type(document.get("seed")) is not int:
        return None
    if document.get("n") not in (None, 1) or any(_is_given(document, name) for name in _NEVER):
        return None
    if route is Route.COMPLETIONS and not _is_one_prompt(document.get("prompt")):
        return None
    if not is_greedy or has_media or not by_prefix or _is_given(document, "logprobs"):
        return Way.REPLAY
    return Way.PREFIX if all(map(_is_known, document.items())) and _has_plain_counts(document) else Way.REPLAY


def is_repeatable(route: Route, document: Mapping[str, Any]) -> bool:
    """Whether another engine computes the same stream of `/v1/messages` or `/v1/responses` from the same body.

    Messages have no seed. A response that continues another one, or runs in the background, is kept by one engine.
    """
    has_seed = route is Route.RESPONSES and type(document.get("seed")) is int
    if not (_is_greedy(document) or has_seed) or any(_is_given(document, name) for name in _NEVER):
        return False
    if route is Route.MESSAGES:
        return True
    if _is_given(document, "background") or document.get("previous_response_id") is not None:
        return False
    include = document.get("include")
    if type(include) is list and "message.output_text.logprobs" in include:
        return False
    tools = document.get("tools") or ()
    return type(tools) in (list, tuple) and all(
        type(tool) is dict and tool.get("type") in _CLIENTS_TOOLS for tool in tools
    )


def shows_parser(data: bytes) -> bool:
    """Whether bytes of a chat's stream have reasoning or a tool call, so that its engine parses the text."""
    return (b'"reasoning' in data or b"_call" in data) and _PARSED.search(data) is not None


def read_stops(document: Mapping[str, Any]) -> tuple[str, ...]:
    """The stop strings of a body."""
    stop = document.get("stop")
    if type(stop) is str:
        return (stop,)
    return tuple(text for text in stop if type(text) is str) if type(stop) is list else ()


def _is_given(document: Mapping[str, Any], name: str) -> bool:
    """Whether a field asks for anything; 0 alternatives to a token still ask for its own probability."""
    value = document.get(name)
    return value is not None and value is not False and value != {}


def _is_known(field: tuple[str, Any]) -> bool:
    name, value = field
    if name in _KNOWN or any(value is row or (row == value and type(row) is type(value)) for row in _ABSENT):
        return True
    return any(value == row and type(value) is not bool for row in _NEUTRAL.get(name, ()))


def _has_plain_counts(document: Mapping[str, Any]) -> bool:
    """Whether the fields that are rewritten have the types that they should have."""
    if any(document.get(name) is not None and type(document[name]) is not int for name in COUNTED):
        return False
    stop = document.get("stop")
    if (
        stop is not None
        and type(stop) is not str
        and not (type(stop) is list and all(type(row) is str for row in stop))
    ):
        return False
    return all(0 < len(text) <= LONGEST_STOP for text in read_stops(document))


def _is_greedy(document: Mapping[str, Any]) -> bool:
    return _is_number(document.get("temperature")) and document["temperature"] == 0


def _is_number(value: object) -> bool:
    return type(value) in (int, float)


def _is_one_prompt(prompt: object) -> bool:
    return type(prompt) is str or (type(prompt) is list and bool(prompt) and type(prompt[0]) is int)
