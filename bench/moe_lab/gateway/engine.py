"""A mock engine that costs as little as Python can: `python -m moe_lab.gateway.engine` prints its port and serves.

It answers each chat request at once: with a small JSON document, or with a stream of events, one for each stream at
every step, as an engine's batch does. Its metrics and its health are those of an idle vLLM server.

Invariant: its answer depends on the request alone, so that two routers in front carry the same bytes.
"""

import asyncio
import sys

import httptools
import orjson
import uvloop

STEP_S = 0.005
# `max_tokens` of a stream that has one event and no end.
IDLE_TOKENS = 1_000_000
MODEL = "mock"


def frame_response(body: bytes, content_type: bytes = b"application/json") -> bytes:
    """Returns a whole HTTP/1.1 response of status 200 with this body."""
    head = b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\ncontent-length: %d\r\n\r\n" % (content_type, len(body))
    return head + body


def frame_event(document: bytes) -> bytes:
    """One server-sent event in a chunk of its own, as uvicorn writes it."""
    event = b"data: %b\n\n" % document
    return b"%x\r\n%b\r\n" % (len(event), event)


_CHOICE = {
    "index": 0,
    "message": {"role": "assistant", "content": "A token is a part of a word."},
    "finish_reason": "stop",
}
_ANSWER = {
    "id": "chatcmpl-0123456789abcdef0123456789abcdef",
    "object": "chat.completion",
    "created": 1700000000,
    "model": MODEL,
    "choices": [_CHOICE],
    "usage": {"prompt_tokens": 20, "total_tokens": 28, "completion_tokens": 8},
}
_DELTA = {
    "id": _ANSWER["id"],
    "object": "chat.completion.chunk",
    "created": _ANSWER["created"],
    "model": MODEL,
    "choices": [{"index": 0, "delta": {"content": " token"}, "logprobs": None, "finish_reason": None}],
}
_METRICS = "".join(
    f'# TYPE {name} gauge\n{name}{{engine="0",model_name="{MODEL}"}} 0.0\n'
    for name in ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
).encode()

ANSWER = frame_response(orjson.dumps(_ANSWER))
STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ncache-control: no-cache\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)
EVENT = frame_event(orjson.dumps(_DELTA))
STREAM_END = frame_event(b"[DONE]") + b"0\r\n\r\n"
PAGES = {
    b"/health": frame_response(b""),
    b"/metrics": frame_response(_METRICS, b"text/plain; version=0.0.4; charset=utf-8"),
    b"/v1/models": frame_response(orjson.dumps({"object": "list", "data": [{"id": MODEL, "object": "model"}]})),
}
NOT_FOUND = b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n"


class Batch:
    """The running streams; each gets one event at a step."""

    def __init__(self) -> None:
        self._left: dict[Connection, int] = {}
        self._next_s = 0.0

    def add(self, connection: "Connection", events: int) -> None:
        """Adds a stream, which is written to from the next step on."""
        if not self._left:
            loop = asyncio.get_running_loop()
            self._next_s = loop.time() + STEP_S
            loop.call_at(self._next_s, self._step)
        self._left[connection] = events

    def remove(self, connection: "Connection") -> None:
        """Drops the request of a connection whose client has gone."""
        self._left.pop(connection, None)

    def _step(self) -> None:
        for connection, events in list(self._left.items()):
            if events > 1:
                self._left[connection] = events - 1
                connection.write(EVENT)
            else:
                del self._left[connection]
                connection.write(EVENT)
                connection.write(STREAM_END)
        if self._left:
            # From the step that was due, so that a late step does not slow the pace.
            self._next_s += STEP_S
            asyncio.get_running_loop().call_at(self._next_s, self._step)


class Connection(asyncio.Protocol):
    """One connection of a router."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch
        self._parser = httptools.HttpRequestParser(self)
        self._url = b""
        self._pieces: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.write = transport.write  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._batch.remove(self)

    def on_message_begin(self) -> None:
        self._url = b""
        self._pieces.clear()

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_body(self, body: bytes) -> None:
        self._pieces.append(body)

    def on_message_complete(self) -> None:
        if not self._url.startswith(b"/v1/chat/"):
            self.write(PAGES.get(self._url, NOT_FOUND))
        elif b'"stream":true' not in (body := b"".join(self._pieces)):
            self.write(ANSWER)
        elif (tokens := orjson.loads(body)["max_tokens"]) == IDLE_TOKENS:
            self.write(STREAM_HEAD + EVENT)
        else:
            self.write(STREAM_HEAD)
            self._batch.add(self, tokens)


async def serve() -> None:
    """Serves on a free port of the loopback until killed."""
    batch = Batch()
    server = await asyncio.get_running_loop().create_server(lambda: Connection(batch), "127.0.0.1", 0, backlog=1024)
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve())
