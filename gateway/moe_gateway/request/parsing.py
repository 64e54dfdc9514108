"""Reads the fields of a request's body that dispatch needs: model, stream, priority, session, prompt. Pure.

The body itself goes to the engine as it came. The engine checks all other fields.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import orjson

from moe_gateway.http.routes import Route


class BadBody(ValueError):
    """The body cannot be dispatched; the text is for the client, `param` names the field."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class Parsed(NamedTuple):
    """The fields that dispatch needs; a tuple, because one is made for each request.

    Attributes:
        model: name of the model asked for; None when the body names none.
        stream: whether the answer is a stream of events.
        priority: level, lower is more urgent.
        user: `user` field, the session where no header names one.
        prompt: text of the prompt as bytes, for its size and its prefix.
        prompt_tokens: exact number of tokens where the prompt is token ids, else None.
        previous_response: id of the response that is continued; None: none is.
    """

    model: str | None
    stream: bool
    priority: int
    user: str | None
    prompt: bytes
    prompt_tokens: int | None
    previous_response: str | None = None


def parse_body(route: Route, body: bytes) -> Parsed:
    """Reads a JSON body.

    Raises:
        BadBody: it is not a JSON object, or a field that dispatch needs has the wrong type.
    """
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BadBody(f"the body is not valid JSON: {error}") from None
    if type(document) is not dict:
        raise BadBody("the body must be a JSON object")
    model = document.get("model")
    if model is not None and type(model) is not str:
        raise BadBody("model must be a string", "model")
    priority = document.get("priority")
    if priority is None:
        priority = 0
    elif type(priority) is not int:
        raise BadBody("priority must be an integer", "priority")
    user = document.get("user")
    prompt, prompt_tokens = read_prompt(route, document)
    session = user if type(user) is str and user else None
    previous = _read_previous_response(document) if route is Route.RESPONSES else None
    return Parsed(model, document.get("stream") is True, priority, session, prompt, prompt_tokens, previous)


def _read_previous_response(document: dict[str, Any]) -> str | None:
    """The response that a body of `/v1/responses` continues.

    Raises:
        BadBody: it asks for state that could not be found again here, or the id is of the wrong type.
    """
    if document.get("background"):
        raise BadBody("background responses cannot be fetched here; ask without background, or stream", "background")
    if document.get("conversation") is not None:
        raise BadBody("conversations are not kept here; continue with previous_response_id", "conversation")
    previous = document.get("previous_response_id")
    if previous is not None and type(previous) is not str:
        raise BadBody("previous_response_id must be a string", "previous_response_id")
    return previous or None


def read_prompt(route: Route, document: dict[str, Any]) -> tuple[bytes, int | None]:
    """The prompt as bytes, and its tokens where they are given as ids."""
    match route:
        case Route.CHAT:
            return _read_messages(document.get("messages")), None
        case Route.RESPONSES:
            parts = [*_texts(document.get("instructions")), *_texts(document.get("input"))]
            return _join(parts), None
        case Route.COMPLETIONS:
            return _read_input(document.get("prompt"))
        case Route.EMBEDDINGS:
            return _read_input(document.get("input"))
        case _:
            return b"", 0


def _read_messages(messages: object) -> bytes:
    """The prompt of messages; for the usual ones, each a role and a text, at a fraction of the cost of `_texts`."""
    parts: list[str] = []
    for message in messages if type(messages) is list else ():
        if type(message) is not dict or len(message) != 2:
            return _join(_texts(messages))
        role, text = message.get("role"), message.get("content")
        if type(role) is not str or type(text) is not str:
            return _join(_texts(messages))
        parts += (role, text)
    return _join(parts)


def _join(texts: Iterable[str]) -> bytes:
    return "\n".join(texts).encode("utf-8", "replace")


def _read_input(value: object) -> tuple[bytes, int | None]:
    """The prompt of a text, texts, token ids or lists of token ids, and its exact tokens where they are ids."""
    if type(value) is str:
        return value.encode("utf-8", "replace"), None
    if type(value) is list and value:
        if type(value[0]) is int:
            return _spell(value), len(value)
        if type(value[0]) is list:
            return _spell(value), sum(len(ids) for ids in value if type(ids) is list)
    return _join(_texts(value)), None


def _spell(ids: list[Any]) -> bytes:
    """Token ids as bytes, for the prefix index; empty where they are nested too deep to be ids."""
    try:
        return orjson.dumps(ids)
    except orjson.JSONEncodeError:
        return b""


def _texts(value: object) -> list[str]:
    """All texts below messages, content parts or lists of them, in their order; without recursion, for any depth."""
    texts, waiting = [], [value]
    while waiting:
        part = waiting.pop()
        if type(part) is str:
            texts.append(part)
        elif type(part) is list:
            waiting.extend(reversed(part))
        elif type(part) is dict:
            for name in ("text", "content", "role"):
                if name in part:
                    waiting.append(part[name])
    return texts
