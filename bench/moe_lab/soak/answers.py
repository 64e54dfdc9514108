"""The answers of mock engines, and what a client finds in an answer. Pure; both sides know an answer's text alone.

A prompt names its request by a number and the tokens that it asks for. The token `i` of request `n` is the text ` n.i`,
so an answer shows whose it is, and whether a token is missing, comes twice or belongs to another request.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

import orjson

MODEL = "tiny"
# Served by the mock engines alone: prompts that a tiny real model has no room for.
MOCK_MODEL = "mock"
# An answer with this header is a mock engine's, so that its text is known.
MOCK_HEADER = b"x-soak-engine"
_MARK = re.compile(rb"\[soak (\d+) (\d+)\]")


class SoakRoute(Enum):
    """A route that computes, by its path and its field for the prompt."""

    COMPLETIONS = "/v1/completions"
    CHAT = "/v1/chat/completions"
    MESSAGES = "/v1/messages"
    RESPONSES = "/v1/responses"


def mark_prompt(number: int, tokens: int) -> str:
    """The part of a prompt that names its request and how many tokens it asks for."""
    return f"[soak {number} {tokens}]"


def read_mark(body: bytes) -> tuple[int, int] | None:
    """The number of a request and the tokens that it asks for; None where its body has no mark."""
    found = _MARK.search(body)
    return None if found is None else (int(found[1]), int(found[2]))


def token_text(number: int, index: int) -> str:
    """The text of one token."""
    return f" {number}.{index}"


def owed_text(number: int, tokens: int) -> str:
    """The whole text that a request is owed by a mock engine."""
    return "".join(token_text(number, index) for index in range(tokens))


# What an engine writes.


def build_piece(api: SoakRoute, number: int, tokens: int) -> bytes:
    """The JSON document of an answer in one piece."""
    text, usage = owed_text(number, tokens), {"prompt_tokens": 20, "completion_tokens": tokens}
    document: dict[str, Any] = {"id": f"soak-{number}", "model": MODEL}
    match api:
        case SoakRoute.COMPLETIONS:
            choice = {"index": 0, "text": text, "finish_reason": "length", "logprobs": None}
            document |= {"object": "text_completion", "created": 1, "choices": [choice]}
        case SoakRoute.CHAT:
            message = {"role": "assistant", "content": text}
            choice = {"index": 0, "message": message, "finish_reason": "length", "logprobs": None}
            document |= {"object": "chat.completion", "created": 1, "choices": [choice]}
        case SoakRoute.MESSAGES:
            content = [{"type": "text", "text": text}]
            document |= {"type": "message", "role": "assistant", "content": content, "stop_reason": "max_tokens"}
            usage = {"input_tokens": 20, "output_tokens": tokens}
        case SoakRoute.RESPONSES:
            item = {"type": "output_text", "text": text, "annotations": []}
            output = {"id": "m", "type": "message", "role": "assistant", "status": "completed", "content": [item]}
            document |= {"id": f"resp_{number}", "object": "response", "created_at": 1, "status": "completed"}
            document["output"] = [output]
            usage = {"input_tokens": 20, "output_tokens": tokens, "total_tokens": 20 + tokens}
    return orjson.dumps(document | {"usage": usage})


def build_first_events(api: SoakRoute, number: int) -> bytes:
    """The events before the first token."""
    match api:
        case SoakRoute.COMPLETIONS:
            return b""
        case SoakRoute.CHAT:
            return _event(_chat_chunk(number, {"role": "assistant", "content": ""}))
        case SoakRoute.MESSAGES:
            usage = {"input_tokens": 20, "output_tokens": 0}
            message = {"id": f"soak-{number}", "type": "message", "role": "assistant", "model": MODEL, "content": []}
            start = {"type": "message_start", "message": message | {"stop_reason": None, "usage": usage}}
            block = {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
            return _named(start) + _named(block)
        case SoakRoute.RESPONSES:
            return _named({"type": "response.created", "sequence_number": 0, "response": _response(number, [])})


def build_token_event(api: SoakRoute, number: int, index: int) -> bytes:
    """The event of one token."""
    text = token_text(number, index)
    match api:
        case SoakRoute.COMPLETIONS:
            choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": None}
            return _event({"id": f"soak-{number}", "object": "text_completion", "choices": [choice]})
        case SoakRoute.CHAT:
            return _event(_chat_chunk(number, {"content": text}))
        case SoakRoute.MESSAGES:
            return _named({"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": text}})
        case SoakRoute.RESPONSES:
            place = {"item_id": "m", "output_index": 0, "content_index": 0, "sequence_number": index + 1}
            return _named({"type": "response.output_text.delta", **place, "delta": text, "logprobs": []})


def build_last_events(api: SoakRoute, number: int, tokens: int) -> bytes:
    """The events after the last token."""
    match api:
        case SoakRoute.COMPLETIONS | SoakRoute.CHAT:
            return b"data: [DONE]\n\n"
        case SoakRoute.MESSAGES:
            delta = {
                "type": "message_delta",
                "delta": {"stop_reason": "max_tokens"},
                "usage": {"output_tokens": tokens},
            }
            stop = _named({"type": "content_block_stop", "index": 0})
            return stop + _named(delta) + _named({"type": "message_stop"})
        case SoakRoute.RESPONSES:
            response = _response(number, []) | {"status": "completed"}
            return _named({"type": "response.completed", "sequence_number": tokens + 1, "response": response})


def build_error_event(api: SoakRoute) -> bytes:
    """An error of the engine as an event."""
    error = {"message": "the mock engine fails", "type": "InternalServerError", "code": 500}
    return _named({"type": "error", "error": error}) if api is SoakRoute.MESSAGES else _event({"error": error})


def _chat_chunk(number: int, delta: dict[str, Any]) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}
    kind = {"object": "chat.completion.chunk", "created": 1, "model": MODEL}
    return {"id": f"soak-{number}", **kind, "choices": [choice]}


def _response(number: int, output: list[Any]) -> dict[str, Any]:
    return {"id": f"resp_{number}", "object": "response", "status": "in_progress", "model": MODEL, "output": output}


def _event(document: dict[str, Any]) -> bytes:
    return b"data: %b\n\n" % orjson.dumps(document)


def _named(document: dict[str, Any]) -> bytes:
    return b"event: %b\n%b" % (document["type"].encode(), _event(document))


# What a client reads.


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadAnswer:
    """What the body of an answer of status 200 says.

    Attributes:
        text: of all tokens that came.
        ends: how often it says that it is whole.
        error: an error in it; empty without one.
        has_more: whether something comes after its end.
        has_begun: whether a token of a stream came; one that completes no character has no text.
    """

    text: str
    ends: int
    error: str = ""
    has_more: bool = False
    has_begun: bool = False


def read_piece(api: SoakRoute, body: bytes) -> ReadAnswer:
    """Reads an answer in one piece.

    Raises:
        ValueError: it is no answer of this route.
    """
    document = orjson.loads(body)
    try:
        match api:
            case SoakRoute.COMPLETIONS:
                text = document["choices"][0]["text"]
            case SoakRoute.CHAT:
                text = document["choices"][0]["message"]["content"]
            case SoakRoute.MESSAGES:
                text = "".join(part["text"] for part in document["content"] if part["type"] == "text")
            case SoakRoute.RESPONSES:
                parts = (part for item in document["output"] for part in item.get("content") or ())
                text = "".join(part["text"] for part in parts if part.get("type") == "output_text")
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"no answer of {api.value}: {body[:200]!r}") from error
    return ReadAnswer(text=text or "", ends=1)


def read_stream(api: SoakRoute, body: bytes) -> ReadAnswer:
    """Reads as much of a stream as has come."""
    texts, ends, error, has_more = [], 0, "", False
    for data in _data_of(body):
        has_more = has_more or ends > 0
        if data == b"[DONE]":
            ends += 1
            continue
        try:
            document = orjson.loads(data)
        except orjson.JSONDecodeError:
            error = error or f"an event that is no JSON: {data[:100]!r}"
            continue
        if document.get("error"):
            error = error or str(document["error"])
        elif document.get("type") in ("message_stop", "response.completed", "response.incomplete"):
            ends += 1
        else:
            texts += _tokens_of(api, document)
    return ReadAnswer(text="".join(texts), ends=ends, error=error, has_more=has_more, has_begun=bool(texts))


def _data_of(body: bytes) -> Iterator[bytes]:
    for event in body.split(b"\n\n"):
        for line in event.split(b"\n"):
            if line.startswith(b"data: "):
                yield line[6:]


def _tokens_of(api: SoakRoute, document: dict[str, Any]) -> list[str]:
    """The text of each token in an event; empty where a token completes no character."""
    match api:
        case SoakRoute.COMPLETIONS:
            return [choice["text"] or "" for choice in document["choices"]]
        case SoakRoute.CHAT:
            deltas = (choice["delta"] for choice in document["choices"])
            return [delta["content"] or "" for delta in deltas if "content" in delta and "role" not in delta]
        case SoakRoute.MESSAGES:
            return [str(document["delta"].get("text", ""))] if document["type"] == "content_block_delta" else []
        case SoakRoute.RESPONSES:
            return [str(document["delta"])] if document["type"] == "response.output_text.delta" else []
