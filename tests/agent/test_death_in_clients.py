"""The mark of a dead engine within a stream changes nothing for clients: each sees the error behind it."""

import json
import threading
import time
import urllib.request
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import anthropic
import openai
import pytest
import uvicorn
from moe_agent.vllm.middleware import ServingRoutesOnly
from moe_contract.engine_death import COMMENT

from tests.vllm import official_clients as clients
from tests.vllm.conftest import run_javascript

ERROR = {"message": "the words of some version of vLLM", "type": "InternalServerError", "param": None, "code": 500}
TOKEN = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "tiny"}
DELTA = {"choices": [{"index": 0, "delta": {"role": "assistant", "content": "a"}, "finish_reason": None}]}
START = {
    "type": "message_start",
    "message": {"id": "x", "type": "message", "role": "assistant", "model": "tiny", "content": []}
    | {"stop_reason": None, "stop_sequence": None, "usage": {"input_tokens": 1, "output_tokens": 1}},
}
STREAMS = {
    "/v1/chat/completions": ({**TOKEN, **DELTA}, {"error": ERROR}),
    "/v1/completions": ({**TOKEN, "choices": [{"index": 0, "text": "a", "finish_reason": None}]}, {"error": ERROR}),
    "/v1/messages": (START, {"type": "error", "error": {"type": "internal_error", "message": ERROR["message"]}}),
}


def event_of(path: str, document: dict[str, Any]) -> bytes:
    name = f"event: {document['type']}\n" if path == "/v1/messages" else ""
    return f"{name}data: {json.dumps(document)}\n\n".encode()


class DyingServer:
    """An ASGI application that sends one event of a stream, and an error once its core is dead, as vLLM does."""

    def __init__(self) -> None:
        self.core = SimpleNamespace(errored=False)
        self.state = SimpleNamespace(engine_client=self.core)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        first, error = STREAMS[scope["path"]]
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        self.core.errored = False
        for document in (first, error):
            body = event_of(scope["path"], document)
            await send({"type": "http.response.body", "body": body, "more_body": True})
            self.core.errored = True
        await send({"type": "http.response.body", "body": b""})


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    dying = DyingServer()
    guarded = ServingRoutesOnly(dying)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await guarded({**scope, "app": dying}, receive, send)

    server = uvicorn.Server(uvicorn.Config(app, port=0, lifespan="off", ws="none", log_config=None))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


@pytest.mark.parametrize("path", STREAMS)
def test_the_mark_is_a_block_of_its_own(url, path):
    """Some clients split a stream at blank lines and look at the first line of each part alone."""
    asked = urllib.request.Request(url + path, b"{}", {"content-type": "application/json"})
    blocks = urllib.request.urlopen(asked, timeout=60).read().split(b"\n\n")
    first, error = (event_of(path, document).rstrip() for document in STREAMS[path])
    assert blocks == [first, COMMENT.rstrip(), error, b""]


def test_the_python_client_of_openai_raises_the_error(url):
    client = clients.open_openai(url)
    chat, text = client.chat.completions, client.completions
    for stream in (
        chat.create(**clients.CHAT, stream=True),
        text.create(model="tiny", prompt="a", stream=True),
    ):
        seen = []
        with pytest.raises(openai.APIError, match=ERROR["message"]):
            seen.extend(chunk.id for chunk in stream)
    with pytest.raises(openai.APIError, match=ERROR["message"]), chat.stream(**clients.CHAT) as helped:
        list(helped)


def test_the_python_client_of_anthropic_raises_the_error(url):
    messages = clients.open_anthropic(url).messages
    with pytest.raises(anthropic.APIStatusError, match=ERROR["message"]):
        list(messages.create(**clients.MESSAGE, stream=True))
    with pytest.raises(anthropic.APIStatusError, match=ERROR["message"]), messages.stream(**clients.MESSAGE) as helped:
        list(helped)


def test_the_javascript_clients_throw_the_error(url):
    thrown = run_javascript(url, script="broken_streams.mjs")
    assert set(thrown) == {"chat", "completions", "messages", "messagesHelper"}
    for name, (events, text) in thrown.items():
        assert events == 1, name
        assert ERROR["message"] in text, name
