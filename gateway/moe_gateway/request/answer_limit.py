"""The most tokens that an answer may have, as far as its body bounds them: what a quota reserves at admission. Pure."""

from collections.abc import Mapping
from typing import Any

from moe_gateway.http.routes import Route
from moe_gateway.request.json_body import read_integer

# vLLM 0.32 answers a text completion that names no limit with this many tokens.
COMPLETION_DEFAULT = 16
# More than any real answer has, all choices together, and few enough for a bucket's fractions to stay exact.
MOST_TOKENS = 1 << 31
_OF_CHATS = ("max_completion_tokens", "max_tokens")
# The fields by route, of which vLLM takes the first that is there.
_FIELDS: Mapping[Route, tuple[str, ...]] = {
    Route.CHAT: _OF_CHATS,
    Route.CHAT_BATCH: _OF_CHATS,
    Route.COMPLETIONS: ("max_tokens",),
    Route.RESPONSES: ("max_output_tokens",),
    Route.MESSAGES: ("max_tokens",),
}


def read_answer_limit(route: Route, document: Mapping[str, Any]) -> int:
    """Returns the most tokens of all choices of an answer together; 0 where the body names no limit.

    Fields of the wrong type count as absent: the engine refuses them. At most `MOST_TOKENS` are returned.
    """
    return min(_read_whole_limit(route, document), MOST_TOKENS)


def _read_whole_limit(route: Route, document: Mapping[str, Any]) -> int:
    if route is Route.GENERATE:
        sampling = document.get("sampling_params")
        return _limit_of(sampling, ("max_tokens",)) * _choices_of(sampling) if isinstance(sampling, dict) else 0
    limit = _limit_of(document, _FIELDS.get(route, ()))
    if route is Route.COMPLETIONS:
        return (limit or COMPLETION_DEFAULT) * _choices_of(document) * _prompts_in(document.get("prompt"))
    if route is Route.CHAT_BATCH:
        chats = document.get("messages")
        return limit * _choices_of(document) * (len(chats) if isinstance(chats, list) else 1)
    return limit * _choices_of(document)


def _limit_of(fields: Mapping[str, Any], names: tuple[str, ...]) -> int:
    return next((_count(value) for name in names if (value := fields.get(name)) is not None), 0)


def _choices_of(fields: Mapping[str, Any]) -> int:
    return max(1, _count(fields.get("n")), _count(fields.get("best_of")))


def _count(value: object) -> int:
    """A number of tokens or choices."""
    try:
        return min(max(0, read_integer(value)), MOST_TOKENS)
    except ValueError:
        return 0


def _prompts_in(prompt: object) -> int:
    is_list_of_prompts = isinstance(prompt, list) and bool(prompt) and not isinstance(prompt[0], int)
    return len(prompt) if is_list_of_prompts and isinstance(prompt, list) else 1
