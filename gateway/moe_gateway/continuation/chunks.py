"""Reads and rewrites the chunks of streams: completions and chats, each one JSON object in an event. Pure."""

from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple

import orjson

from moe_gateway.continuation.calls import read_calls, replace_calls
from moe_gateway.continuation.probabilities import read_tokens
from moe_gateway.continuation.transcript import Piece
from moe_gateway.http.routes import Route

DONE = b"data: [DONE]\n\n"
# orjson reads 1024 levels and writes 254; the rest is for the fields that are added.
MOST_BRACKETS = 250
_TEXT_FIELDS = ("reasoning", "reasoning_content", "content")
_NONE = array("I")
# Fields of a delta whose text is not remembered.
_OTHER_FIELDS = ("function_call", "refusal", "audio")


class Chunk(NamedTuple):
    """One chunk of a stream with one choice.

    Attributes:
        document: the chunk.
        choice: its choice; None of the chunk that has the usage of the whole.
        pieces: its text, by field.
        tokens: ids of its tokens; empty where the engine does not say.
        prompt: ids of the prompt, which the first chunk may have.
        is_traceable: whether nothing is in it that could not be compared with another engine's.
        scored: texts of the tokens of which it has log-probabilities.
    """

    document: dict[str, Any]
    choice: dict[str, Any] | None
    pieces: tuple[Piece, ...]
    tokens: "array[int]"
    prompt: "array[int]"
    is_traceable: bool
    scored: tuple[str, ...] = ()

    @property
    def finish_reason(self) -> object:
        """Why the stream ends with this chunk; None where it does not."""
        return None if self.choice is None else self.choice.get("finish_reason")

    @property
    def has_usage(self) -> bool:
        """Whether it is the chunk that has the usage of the whole."""
        return self.choice is None and bool(self.document.get("usage"))


def read_data(event: bytes) -> bytes:
    """The data of an event of one line; empty for a comment and for any other event."""
    line = event.rstrip(b"\r\n")
    return line[5:].strip() if line.startswith(b"data:") and b"\n" not in line else b""


def load_chunk(data: bytes) -> dict[str, Any] | None:
    """The JSON object in an event; None where there is none, or one that is nested too deeply to be written again."""
    try:
        document = orjson.loads(data)
        if data.count(b"[") + data.count(b"{") > MOST_BRACKETS:
            orjson.dumps(document)
    except (orjson.JSONDecodeError, orjson.JSONEncodeError):
        return None
    return document if type(document) is dict else None


def read_chunk(document: dict[str, Any]) -> Chunk | None:
    """Reads a chunk; None where it is none of the known form, with one choice at most."""
    choices = document.get("choices")
    if type(choices) is not list or len(choices) > 1:
        return None
    if not choices:
        return Chunk(document, None, (), _NONE, _NONE, True)
    choice = choices[0]
    if type(choice) is not dict or choice.get("index") != 0:
        return None
    try:
        tokens = array("I", choice.get("token_ids") or ())
        prompt = array("I", document.get("prompt_token_ids") or choice.get("prompt_token_ids") or ())
    except (TypeError, OverflowError):
        return None
    delta = choice.get("delta")
    if delta is None:
        text = choice.get("text")
        pieces: tuple[Piece, ...] = (Piece("text", text),) if type(text) is str else ()
        is_known = bool(pieces)
    elif type(delta) is dict:
        calls = read_calls(delta)
        pieces = tuple(Piece(name, delta[name]) for name in _TEXT_FIELDS if type(delta.get(name)) is str)
        pieces += calls or ()
        is_known = calls is not None and not any(delta.get(name) for name in _OTHER_FIELDS)
    else:
        return None
    scored = read_tokens(choice)
    return Chunk(document, choice, pieces, tokens, prompt, is_known and scored is not None, scored or ())


def strip_tokens(chunk: Chunk, *, keeps_answer: bool = False) -> None:
    """Takes out the token ids that the client shall not get; vLLM writes their fields in any case.

    Args:
        chunk: changed in place.
        keeps_answer: whether those of the answer stay, and only those of the prompt go.
    """
    names = ("prompt_token_ids",) if keeps_answer else ("prompt_token_ids", "token_ids")
    for part in (chunk.document, chunk.choice or {}):
        for name in names:
            if name in part:
                part[name] = None


def replace_new(chunk: Chunk, pieces: Sequence[Piece], tokens: Sequence[int]) -> None:
    """Leaves only these pieces and tokens in a chunk, the rest of which the client has."""
    if chunk.choice is None:
        return
    if "token_ids" in chunk.choice:
        chunk.choice["token_ids"] = list(tokens)
    delta = chunk.choice.get("delta")
    if delta is None:
        chunk.choice.update(pieces)
        return
    delta.pop("role", None)
    texts = [piece for piece in pieces if piece.field in _TEXT_FIELDS]
    delta.update(texts)
    replace_calls(delta, pieces[len(texts) :])


def adopt(document: dict[str, Any], head: dict[str, Any], route: Route, prompt_tokens: int, resent_tokens: int) -> None:
    """Makes a chunk of another engine one of the stream that goes on.

    Args:
        document: the chunk, changed in place.
        head: id, time, model and kind of the stream's first chunk.
        route: of the client's request. The chunk of a chat may come from the completions route.
        prompt_tokens: tokens of the client's prompt.
        resent_tokens: tokens of the answer that the other engine got as part of its prompt.
    """
    document.update(head)
    usage = document.get("usage")
    if type(usage) is dict and resent_tokens:
        usage["prompt_tokens"] = prompt_tokens
        usage["completion_tokens"] = usage.get("completion_tokens", 0) + resent_tokens
        details = usage.get("prompt_tokens_details")
        if type(details) is dict and type(details.get("cached_tokens")) is int:
            details["cached_tokens"] = min(details["cached_tokens"], prompt_tokens)
    choices = document.get("choices")
    if route is Route.CHAT and type(choices) is list:
        document["choices"] = [
            _as_chat_choice(row) if type(row) is dict and type(row.get("text")) is str else row for row in choices
        ]


def _as_chat_choice(choice: dict[str, Any]) -> dict[str, Any]:
    """The choice of a completion as one of a chat, as vLLM writes it where nothing parses the text."""
    finish_reason = choice.get("finish_reason")
    chat = {
        "index": 0,
        "delta": {"content": choice["text"]},
        "logprobs": None,
        "finish_reason": finish_reason,
    }
    if finish_reason is not None:
        chat["stop_reason"] = choice.get("stop_reason")
    if "token_ids" in choice:
        chat["token_ids"] = choice["token_ids"]
    return chat


def write_chunk(document: dict[str, Any]) -> bytes:
    """The event of a chunk."""
    return b"data: %b\n\n" % orjson.dumps(document)


def build_usage(head: dict[str, Any], prompt_tokens: int, completion_tokens: int) -> bytes:
    """The event with the usage of a whole stream, whose engine failed after the last token."""
    usage = {
        "prompt_tokens": prompt_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "completion_tokens": completion_tokens,
    }
    return write_chunk({**head, "choices": [], "usage": usage})


def read_head(document: dict[str, Any]) -> dict[str, Any]:
    """The fields that all chunks of one stream have in common."""
    return {name: document[name] for name in ("id", "object", "created", "model") if name in document}
