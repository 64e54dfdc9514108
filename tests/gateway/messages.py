"""HTTP messages: what clients send and what engines answer."""

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any

OK = {"choices": [{"text": "ok"}], "usage": {"prompt_tokens": 3}}


@dataclass
class Received:
    """A request as an engine got it; `gone` is set when the connection ended before the answer did."""

    head: bytes
    body: bytes
    at_s: float
    gone: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def line(self) -> bytes:
        return self.head.split(b"\r\n", 1)[0]

    @property
    def headers(self) -> dict[bytes, bytes]:
        return parse_headers(self.head)


def parse_headers(head: bytes) -> dict[bytes, bytes]:
    rows = [line.split(b":", 1) for line in head.split(b"\r\n")[1:] if line]
    return {name.lower(): value.strip() for name, value in rows}


def json_answer(document: Any, *, status: str = "200 OK", extra: bytes = b"") -> bytes:
    body = json.dumps(document).encode()
    return b"HTTP/1.1 %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\n%b\r\n%b" % (
        status.encode(),
        len(body),
        extra,
        body,
    )


SSE_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def event(text: str) -> bytes:
    return chunk(b"data: %b\n\n" % json.dumps({"text": text}).encode())


SSE_END = chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"


def post(body: bytes | dict[str, Any], path: str = "/v1/completions", extra: bytes = b"") -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = b"POST %b HTTP/1.1\r\nhost: gateway\r\ncontent-type: application/json\r\n%bcontent-length: %d\r\n\r\n"
    return head % (path.encode(), extra, len(data)) + data


def prompt(text: str = "hello", **fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": text, **fields}
