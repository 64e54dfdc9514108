"""The gateway's own answers, as bytes: OpenAI-shaped errors and what no engine is asked for. Pure.

The one table from outcome to status stands here; outcomes are metric labels too.
"""

from enum import Enum

import orjson


class RequestOutcome(Enum):
    """How a request can end without an engine's answer: label, status, OpenAI error type."""

    BAD_REQUEST = ("bad_request", 400, "invalid_request_error")
    UNAUTHORIZED = ("invalid_api_key", 401, "invalid_request_error")
    NOT_FOUND = ("not_found", 404, "invalid_request_error")
    MODEL_NOT_FOUND = ("model_not_found", 404, "invalid_request_error")
    RESPONSE_NOT_FOUND = ("response_not_found", 404, "invalid_request_error")
    METHOD_NOT_ALLOWED = ("method_not_allowed", 405, "invalid_request_error")
    REQUEST_TIMEOUT = ("request_timeout", 408, "invalid_request_error")
    UNSUPPORTED_ENCODING = ("unsupported_encoding", 415, "invalid_request_error")
    BODY_TOO_LARGE = ("body_too_large", 413, "invalid_request_error")
    HEAD_TOO_LARGE = ("head_too_large", 431, "invalid_request_error")
    BUSY = ("busy", 429, "rate_limit_error")
    OVER_QUOTA = ("rate_limit_exceeded", 429, "rate_limit_error")
    CLIENT_GONE = ("client_gone", 499, "")
    INTERNAL_ERROR = ("internal_error", 500, "server_error")
    ENGINE_FAILED = ("engine_failed", 502, "server_error")
    NO_ENGINE = ("no_engine", 503, "server_error")
    GATEWAY_ENDED = ("gateway_ended", 503, "server_error")
    ISSUER_UNKNOWN = ("issuer_unknown", 503, "server_error")
    ENGINE_SILENT = ("engine_silent", 504, "server_error")
    DEADLINE_EXCEEDED = ("deadline_exceeded", 504, "server_error")

    def __init__(self, label: str, status: int, kind: str) -> None:
        self.label = label
        self.status = status
        self.kind = kind


# Encodings of request bodies that are decoded.
KNOWN_ENCODINGS = b"gzip, deflate, zstd"
# Of an engine's text in an error of the gateway.
LONGEST_QUOTE_BYTES = 2000
LAST_CHUNK = b"0\r\n\r\n"
REASONS = {
    200: "OK",
    400: "Bad Request",
    401: "Unauthorized",
    404: "Not Found",
    405: "Method Not Allowed",
    408: "Request Timeout",
    413: "Content Too Large",
    415: "Unsupported Media Type",
    429: "Too Many Requests",
    431: "Request Header Fields Too Large",
    500: "Internal Server Error",
    502: "Bad Gateway",
    503: "Service Unavailable",
    504: "Gateway Timeout",
}


# The types of Anthropic's API by status; every other one is an `api_error`.
_ANTHROPIC_KINDS = {
    **dict.fromkeys((400, 405, 415, 431), "invalid_request_error"),
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    **dict.fromkeys((408, 504), "timeout_error"),
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def build_error_document(
    outcome: RequestOutcome, message: str, param: str | None = None, *, is_anthropic: bool = False
) -> bytes:
    """The error object of OpenAI's or of Anthropic's API."""
    if is_anthropic:
        kind = _ANTHROPIC_KINDS.get(outcome.status, "api_error")
        return orjson.dumps({"type": "error", "error": {"type": kind, "message": message}})
    return orjson.dumps({"error": {"message": message, "type": outcome.kind, "param": param, "code": outcome.label}})


def as_error_document(answer: bytes, status: int, *, is_anthropic: bool = False) -> bytes:
    """An engine's error answer as an object that clients take for an error: as it is, or as the message of one.

    Args:
        answer: the body, in one line.
        status: its HTTP status.
        is_anthropic: whether it is for Anthropic's API, else for OpenAI's.
    """
    try:
        document = orjson.loads(answer)
    except orjson.JSONDecodeError:
        document = None
    if type(document) is dict and "error" in document:
        return answer
    outcome = RequestOutcome.BAD_REQUEST if 400 <= status < 500 else RequestOutcome.ENGINE_FAILED
    text = answer[:LONGEST_QUOTE_BYTES].decode("utf-8", "replace")
    return build_error_document(outcome, f"the engine answered {status}: {text}", is_anthropic=is_anthropic)


def build_error(
    outcome: RequestOutcome,
    message: str,
    *,
    request_id: bytes = b"",
    param: str | None = None,
    close: bool = False,
    retry_after_s: int | None = None,
    head_only: bool = False,
    allow: bytes | None = None,
    challenge: bytes = b"",
    is_anthropic: bool = False,
) -> bytes:
    """A whole HTTP response, with the header fields that belong to its outcome; `Retry-After` in whole seconds."""
    extra = b"" if retry_after_s is None else b"retry-after: %d\r\n" % retry_after_s
    if allow is not None:
        extra += b"allow: %b\r\n" % allow
    if outcome is RequestOutcome.UNSUPPORTED_ENCODING:
        extra += b"accept-encoding: %b\r\n" % KNOWN_ENCODINGS
    if challenge:
        extra += b"www-authenticate: %b\r\n" % challenge
    body = build_error_document(outcome, message, param, is_anthropic=is_anthropic)
    return build_response(outcome.status, body, request_id=request_id, extra=extra, close=close, head_only=head_only)


def build_response(
    status: int,
    body: bytes,
    *,
    request_id: bytes = b"",
    extra: bytes = b"",
    close: bool = False,
    head_only: bool = False,
) -> bytes:
    """A whole HTTP response with a JSON body; `extra` holds further header lines, each ended by CRLF."""
    if request_id:
        extra += b"x-request-id: %b\r\n" % request_id
    if close:
        extra += b"connection: close\r\n"
    head = b"HTTP/1.1 %d %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\n%b\r\n" % (
        status,
        REASONS[status].encode(),
        len(body),
        extra,
    )
    return head if head_only else head + body


def build_preflight(request_id: bytes, lines: bytes, *, close: bool) -> bytes:
    """The answer to a preflight of a browser, with the header lines that allow the request."""
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/plain; charset=utf-8\r\ncontent-length: 2\r\n"
    ending = b"connection: close\r\n" if close else b""
    return b"%bx-request-id: %b\r\n%b%b\r\nOK" % (head, request_id, ending, lines)


def build_health(request_id: bytes, *, close: bool, head_only: bool) -> bytes:
    """The gateway's own answer to `/health`."""
    return build_response(200, b'{"status":"ok"}', request_id=request_id, close=close, head_only=head_only)


def build_models(document: object, request_id: bytes, *, close: bool) -> bytes:
    """A list of models that the gateway answers itself; `document` is its JSON object."""
    return build_response(200, orjson.dumps(document), request_id=request_id, close=close)


def build_stream_error(outcome: RequestOutcome, message: str, *, is_anthropic: bool = False) -> bytes:
    """The event that ends a stream which was broken off, after a blank line that ends an unfinished event."""
    document = build_error_document(outcome, message, is_anthropic=is_anthropic)
    return b"\n\n" + frame_error(document, is_anthropic=is_anthropic)


def frame_error(document: bytes, *, is_anthropic: bool) -> bytes:
    """The event of an error; Anthropic's API names its events."""
    return b"%bdata: %b\n\n" % (b"event: error\n" if is_anthropic else b"", document)


def build_stream_head(request_id: bytes, *, close: bool) -> bytes:
    """The head of a stream of events whose engine has not sent its own."""
    return b"HTTP/1.1 200 OK\r\nx-request-id: %b\r\n%b%b" % (
        request_id,
        b"connection: close\r\n" if close else b"",
        b"content-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n",
    )


def frame_chunk(data: bytes) -> bytes:
    """One chunk of chunked transfer coding."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def frame_last_chunk(data: bytes) -> bytes:
    """A chunk, and the end of the body."""
    return frame_chunk(data) + LAST_CHUNK
