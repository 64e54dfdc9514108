"""Reads the beginning of a streamed answer: which of its server-sent events is the first token. Pure.

Before the first token of a stream come comments that keep the connection alive, the role of the assistant, or
`response.created`. None of them shows that the prompt was computed, so an exchange keeps the answer back until one
event does, or is an error. The usual first token is found by its bytes; other events are parsed, and only before it.
"""

import re
from enum import Enum
from typing import Any, NamedTuple

import orjson

from moe_gateway.engines.engine_death import is_death_mark


class AnswerPart(Enum):
    """What an answer has shown so far.

    `PENDING`: nothing that counts. `TOKEN`: the first token of a stream. `WHOLE`: an answer in one piece, or the end of
    a stream without a token. `REFUSAL`: an error of the client, or an answer that shows nothing about the engine.
    `ENGINE_ERROR`: an error of the engine.
    """

    PENDING = "pending"
    TOKEN = "token"
    WHOLE = "whole"
    REFUSAL = "refusal"
    ENGINE_ERROR = "engine_error"


class Beginning(NamedTuple):
    """The beginning of a stream.

    Attributes:
        part: what its first event of interest is.
        comments: the comments before that event.
        events: everything else, in its order.
    """

    part: AnswerPart
    comments: bytes
    events: bytes


# A longer beginning is passed on unread.
LONGEST_BEGINNING_BYTES = 1024 * 1024
# So is one of more events: each new event reads all of them again.
MOST_PENDING_EVENTS = 64
SMALL_READ_BYTES = 4096
ERROR_MARK = b'"error"'
_ERROR_NAME = re.compile(rb"event: ?error")
# An error within a text has its quotes escaped, so the mark stands in the frame of an event alone.
_USUAL_TOKEN = re.compile(
    rb'"delta": ?\{"(?:content|reasoning|reasoning_content)": ?"[^"]|"choices": ?\[\{"index": ?\d+, ?"text": ?"'
    rb"|(?:^|\n)event: (?:response\.[a-z_.]+\.delta|content_block_delta)\r?\n"
)
_LAST_NAMED_EVENT = re.compile(
    rb'(?:event: (?:%b)\r?\ndata: |"type": ?"(?:%b)")[^\n]*\Z'
    % ((rb"response\.(?:completed|incomplete|failed)|message_stop",) * 2)
)
BLANK_LINE = re.compile(rb"\r\n\r\n|\n\n|\r\r")
CHUNK_SIZE = re.compile(rb"[ \t]*([0-9a-fA-F]{1,8})[ \t]*(?:;[^\r\n]*)?\r\n")
# How an error begins that an engine answers as if it were what it was asked for, perhaps in a chunk.
_ERROR_BODY = re.compile(
    rb'(?:[0-9a-fA-F]{1,8}\r\n)?\s*\{\s*"(?:error"\s*:(?!\s*null\b)|(?:object|type)"\s*:\s*"error")'
)
_CLIENTS_ERROR = re.compile(
    r"bad_?request|invalid|not_?found|unprocessable|unsupported|not_?implemented|content_filter|context_length",
    re.IGNORECASE,
)


# Events of `/v1/messages`. A block of text, thinking or a tool call begins before its first token is there.
_MESSAGE_EVENTS = {
    **dict.fromkeys(("message_start", "ping", "content_block_start", "content_block_stop"), AnswerPart.PENDING),
    "content_block_delta": AnswerPart.TOKEN,
    **dict.fromkeys(("message_delta", "message_stop"), AnswerPart.WHOLE),
}

# A look-up of a member in its enum costs a fifth of a microsecond in Python 3.11.
_PENDING, _TOKEN, _WHOLE = AnswerPart.PENDING, AnswerPart.TOKEN, AnswerPart.WHOLE


def part_of_status(status: int) -> AnswerPart:
    """What the status of an answer to a request with a job says, where the answer is no stream of events."""
    if status < 400:
        return _WHOLE
    return AnswerPart.ENGINE_ERROR if status >= 500 and status != 501 else AnswerPart.REFUSAL


def split_chunks(raw: bytes) -> tuple[bytes, bytes]:
    """Returns the data of the whole chunks at the start of a chunked body, and the bytes that follow them as they are.

    The last chunk, of size zero, is left to the rest.
    """
    parts, at = [], 0
    while (head := CHUNK_SIZE.match(raw, at)) is not None:
        end = head.end() + int(head[1], 16)
        if end == head.end() or len(raw) < end + 2:
            break
        parts.append(raw[head.end() : end])
        at = end + 2
    return b"".join(parts), raw[at:]


def read_beginning(data: bytes) -> Beginning:
    """Reads the beginning of a stream of events.

    Args:
        data: its bytes so far, without the frames of chunks; the last event may be unfinished.
    """
    if ERROR_MARK not in data and _USUAL_TOKEN.search(data) is not None:
        return Beginning(_TOKEN, b"", data)
    comments, events, at = [], [], 0
    part = _PENDING
    for blank in BLANK_LINE.finditer(data):
        event, at = data[at : blank.end()], blank.end()
        if _is_comment(event):
            comments.append(event)
            continue
        events.append(event)
        if (part := read_event(event)) is not _PENDING:
            break
    return Beginning(part, b"".join(comments), b"".join(events) + data[at:])


def may_end_event(data: bytes, held_bytes: int) -> bool:
    """Whether a beginning is worth reading again: an event that comes in large pieces is not read at each of them.

    Args:
        data: the newest bytes.
        held_bytes: length of the beginning with them.
    """
    if len(data) < SMALL_READ_BYTES or held_bytes > LONGEST_BEGINNING_BYTES:
        return True
    return b"\n\n" in data or b"\r\n\r\n" in data or b"\r\r" in data


def may_have_error(data: bytes) -> bool:
    """Whether an error may be among the events in these bytes: never False where one is."""
    return b"error" in data and (ERROR_MARK in data or _ERROR_NAME.search(data) is not None)


def find_error(data: bytes) -> int:
    """Returns the HTTP status that the first error among the events in these bytes stands for; 0 where none is.

    Args:
        data: with the frames of chunks, if each ends with an event, or without them. An event that is not whole is
            passed over.
    """
    for event in BLANK_LINE.split(data):
        if may_have_error(event):
            name, fields = _read_fields(event)
            if (error := _read_error(name, fields)) is not None:
                return _status_of(error)
    return 0


def begins_error(answer: bytes, start: int) -> bool:
    """Whether a body that begins at this place of an answer, perhaps in a chunk, begins as an error does."""
    return _ERROR_BODY.match(answer, start) is not None


def read_error_body(body: bytes) -> int:
    """Returns the HTTP status that an error stands for which came as an answer in one piece."""
    return _status_of(_read_error(b"", body) or {})


def ends_stream(data: bytes) -> bool:
    """Whether these last bytes of a stream, chunked or not, end with its last event: nothing that counts is missing."""
    tail = data.rstrip(b"\r\n").removesuffix(b"\r\n0").rstrip(b"\r\n")
    if tail.endswith((b"data: [DONE]", b"data:[DONE]")):
        return True
    return tail.endswith(b"}") and data.endswith((b"\n", b"\r")) and _LAST_NAMED_EVENT.search(tail) is not None


def read_event(event: bytes) -> AnswerPart:
    """Returns what one event shows; `PENDING` for one that is no token, no end and no error."""
    name, data = _read_fields(event)
    if data == b"[DONE]":
        return AnswerPart.WHOLE
    if name == b"error":
        return part_of_status(_status_of(_read_error(name, data)))
    if name.startswith(b"response.") and name != b"response.failed":
        return _part_of_response(name.decode("ascii", "replace"), {})
    if not data:
        return AnswerPart.PENDING
    document = _load(data)
    return AnswerPart.TOKEN if document is None else _part_of_document(document)


def _load(data: bytes) -> dict[str, Any] | None:
    """The object in an event; None where there is none."""
    try:
        document = orjson.loads(data)
    except orjson.JSONDecodeError:
        return None
    return document if type(document) is dict else None


def _read_error(name: bytes, data: bytes) -> object:
    """The error in an event of this name; None where there is none."""
    document = _load(data)
    error = None if document is None else _error_of(document)
    return (document or {}) if error is None and name == b"error" else error


def _is_comment(event: bytes) -> bool:
    """Whether an event is nothing but comments; the mark of a dead engine belongs to the event behind it."""
    return all(line.startswith(b":") for line in event.splitlines() if line) and not is_death_mark(event)


def _read_fields(event: bytes) -> tuple[bytes, bytes]:
    """The name and the data of an event."""
    name, data = b"", []
    for line in event.splitlines():
        field, _, value = line.partition(b":")
        if field == b"event":
            name = value.strip()
        elif field == b"data":
            data.append(value.removeprefix(b" "))
    return name, b"\n".join(data)


def _part_of_document(document: dict[str, Any]) -> AnswerPart:
    kind = document.get("type")
    if type(kind) is str and kind.startswith("response."):
        return _part_of_response(kind, document)
    if type(kind) is str and kind in _MESSAGE_EVENTS:
        return _MESSAGE_EVENTS[kind]
    if (error := _error_of(document)) is not None:
        return part_of_status(_status_of(error))
    choices = document.get("choices")
    if type(choices) is not list:
        return AnswerPart.TOKEN
    return AnswerPart.TOKEN if any(map(_has_token, choices)) else AnswerPart.PENDING


def _part_of_response(kind: str, document: dict[str, Any]) -> AnswerPart:
    if kind.endswith(".delta"):
        return AnswerPart.TOKEN
    if kind in ("response.completed", "response.incomplete"):
        return AnswerPart.WHOLE
    if kind == "response.failed":
        return part_of_status(_status_of(_error_of(document)))
    return AnswerPart.PENDING


def _error_of(document: dict[str, Any]) -> object:
    """The error in an event; None where there is none."""
    kind = document.get("type")
    if kind == "response.failed":
        response = document.get("response")
        return (response.get("error") if type(response) is dict else None) or {}
    if type(kind) is str and kind.startswith("response."):
        return None
    if kind == "error" or document.get("object") == "error":
        return document.get("error") or document
    return document.get("error")


def _status_of(error: object) -> int:
    """The status of an error by its code or type: 400 for one of the client, 500 for every other without a code."""
    if type(error) is not dict:
        return 500
    code = error.get("code")
    if code is None and error.get("type") == "internal_error":
        code = _code_within(error.get("message"))
    if type(code) is str and code.isdecimal() and len(code) == 3:
        code = int(code)
    if type(code) is int:
        return code if 400 <= code < 600 else 500
    return 400 if _CLIENTS_ERROR.search(f"{code} {error.get('type')}") else 500


# vLLM 0.32 puts an error within a stream of `/v1/messages` into the text of another one.
_AROUND_CODE = "for ChatCompletionStreamResponse\n"
_CODE_WITHIN = re.compile(r"'code': (\d{3})\b")


def _code_within(message: object) -> str | None:
    if type(message) is not str or (begin := message.find(_AROUND_CODE)) < 0:
        return None
    found = _CODE_WITHIN.search(message, begin + len(_AROUND_CODE))
    return None if found is None else found[1]


_TOKEN_FIELDS = ("content", "reasoning", "reasoning_content", "tool_calls", "function_call", "refusal", "audio")


def _has_token(choice: object) -> bool:
    """Whether a choice has a token, or its end; the role alone is none.

    vLLM sends a chunk without a role for each token, also for one that completes no character and so has no text.
    """
    if type(choice) is not dict or choice.get("finish_reason") is not None:
        return True
    if choice.get("token_ids") or choice.get("logprobs"):
        return True
    delta = choice.get("delta")
    if type(delta) is not dict:
        return True
    return any(delta.get(name) for name in _TOKEN_FIELDS) or ("role" not in delta and "content" in delta)
