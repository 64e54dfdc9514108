"""Mock engines that exchange KV blocks by vLLM's two-phase protocol: one holds the blocks of a prompt until another
fetches them or their lease is over.

The answer follows from the prompt whose blocks were read: one that was computed from freed blocks is wrong.
"""

import asyncio
import itertools
import json
import zlib
from dataclasses import dataclass, field
from typing import Any

from tests.gateway.messages import SSE_END, SSE_HEAD, Received, chunk, json_answer

WRONG = "wrong tokens"
PATHS = {
    "chat": "/v1/chat/completions",
    "completions": "/v1/completions",
    "messages": "/v1/messages",
    "responses": "/v1/responses",
}
# More than an engine preferred for decoding computes itself.
PROMPT = "Which of these words comes first? " * 60
DEAD = {
    "error": {
        "message": "EngineCore encountered an issue. See stack trace",
        "type": "InternalServerError",
        "code": 500,
    }
}
ERROR = {"error": {"message": "the transfer failed", "type": "InternalServerError", "code": 500}}
_NUMBERS = itertools.count(1)


def body_of(route: str, prompt: str = PROMPT, **fields: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": prompt}]
    own = {"chat": {"messages": turns}, "messages": {"messages": turns}, "completions": {"prompt": prompt}}
    limit = {"responses": "max_output_tokens"}.get(route, "max_tokens")
    return {"model": "tiny", limit: 60, **own.get(route, {"input": prompt}), **fields}


def text_of(body: dict[str, Any]) -> str:
    """What an engine answers to the prompt of a body."""
    prompt = body.get("messages") or body.get("prompt") or body.get("input")
    return f"It is {zlib.crc32(json.dumps(prompt).encode())}, of course."


@dataclass
class Cluster:
    """Engines by their id; `lease_over` makes each engine free all blocks at once."""

    engines: dict[str, "SplitEngine"] = field(default_factory=dict)

    @property
    def held(self) -> int:
        return sum(len(engine.held) for engine in self.engines.values())


@dataclass
class SplitEngine:
    """An engine's script.

    Attributes:
        cluster: the engines that it exchanges blocks with.
        fails: by phase (`prefill`, `decode`, `whole`), how the next requests of it fail; None: that one does not.
        held: the text that follows from the prompt of each held sequence, by its id.
        bodies: phase and body of each request.
        heads: of each request.
        go: what a failure `hangs` waits for.
        echoes: fields of a request that the answer to its first phase repeats.
    """

    cluster: Cluster
    fails: dict[str, list[Any]] = field(default_factory=dict)
    held: dict[str, str] = field(default_factory=dict)
    bodies: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    heads: list[dict[bytes, bytes]] = field(default_factory=list)
    echoes: tuple[str, ...] = ()
    go: asyncio.Event = field(default_factory=asyncio.Event)
    engine_id: str = field(default_factory=lambda: f"uuid-{next(_NUMBERS)}")

    def __post_init__(self) -> None:
        self.cluster.engines[self.engine_id] = self

    @property
    def phases(self) -> list[str]:
        return [phase for phase, _ in self.bodies]

    async def __call__(self, request: Received, writer: asyncio.StreamWriter) -> None:
        path, body = request.line.split(b" ")[1].decode(), json.loads(request.body)
        params = body.get("kv_transfer_params") or {}
        phase = "prefill" if params.get("do_remote_decode") else "decode" if params else "whole"
        self.bodies.append((phase, body))
        self.heads.append(request.headers)
        failure = self.fails[phase].pop(0) if self.fails.get(phase) else None
        if failure not in (None, "midway") and await self._fail(failure, phase, body, writer):
            return
        if phase == "prefill":
            echo = {name: body.get(name) for name in self.echoes}
            writer.write(json_answer({"choices": [], "kv_transfer_params": self._hold(body), **echo}))
            return
        text = self._fetch(params) if phase == "decode" else text_of(body)
        if body.get("stream"):
            await self._stream(path, text, writer, breaks=failure == "midway")
        else:
            writer.write(json_answer({"choices": [{"text": text}], "usage": {"prompt_tokens": 500}}))

    def _hold(self, body: dict[str, Any]) -> dict[str, Any]:
        assert not body["stream"]
        number = next(_NUMBERS)
        self.held[f"cmpl-{number}"] = text_of(body)
        return {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_block_ids": [[number, number + 1]],
            "remote_engine_id": self.engine_id,
            "remote_request_id": f"cmpl-{number}",
            "remote_host": "127.0.0.1",
            "remote_port": 5600,
            "tp_size": 1,
            "remote_num_tokens": 500,
            "remote_blocks_expiry_time": None,
            "transfer_mode": "pull",
        }

    def _fetch(self, params: dict[str, Any]) -> str:
        """What follows from the blocks, which the other engine frees then."""
        engine = self.cluster.engines[params["remote_engine_id"]]
        return engine.held.pop(params["remote_request_id"], WRONG)

    async def _stream(self, path: str, text: str, writer: asyncio.StreamWriter, *, breaks: bool) -> None:
        writer.write(SSE_HEAD)
        for start in range(0, len(text), 3):
            writer.write(chunk(_event(path, text[start : start + 3])))
            await writer.drain()
            if breaks and start > 9:
                writer.transport.abort()
                return
        writer.write(SSE_END if path.startswith(("/v1/chat", "/v1/comp")) else chunk(_last(path)) + b"0\r\n\r\n")

    async def _fail(self, failure: Any, phase: str, body: dict[str, Any], writer: asyncio.StreamWriter) -> bool:
        """Fails in this way; returns False where the request then goes on."""
        match failure:
            case "reset":
                writer.transport.abort()
            case "dies":
                # It has computed the prompt, or fetched the blocks, and ends.
                self._work(phase, body)
                writer.transport.abort()
            case "hangs":
                await self.go.wait()
                return False
            case "dead":
                writer.write(json_answer(DEAD, status="500 Internal Server Error"))
            case "event" | "dead event":
                self._work(phase, body)
                document = ERROR if failure == "event" else DEAD
                writer.write(SSE_HEAD + chunk(b"data: " + json.dumps(document).encode() + b"\n\n") + SSE_END)
            case int():
                writer.write(json_answer({"error": {"message": "no"}}, status=f"{failure} No"))
            case bytes():
                writer.write(failure)
            case _:
                writer.write(json_answer({"choices": [], "kv_transfer_params": failure(self._hold(body))}))
        return True

    def _work(self, phase: str, body: dict[str, Any]) -> None:
        if phase == "decode":
            self._fetch(body["kv_transfer_params"])


def _event(path: str, text: str) -> bytes:
    if path == PATHS["messages"]:
        document: dict[str, Any] = {"type": "content_block_delta", "delta": {"type": "text_delta", "text": text}}
        return b"event: content_block_delta\ndata: " + json.dumps(document).encode() + b"\n\n"
    if path == PATHS["responses"]:
        document = {"type": "response.output_text.delta", "delta": text}
        return b"event: response.output_text.delta\ndata: " + json.dumps(document).encode() + b"\n\n"
    choice = {"index": 0, "delta": {"content": text}} if "chat" in path else {"index": 0, "text": text}
    return b"data: " + json.dumps({"id": "x", "choices": [choice]}).encode() + b"\n\n"


def _last(path: str) -> bytes:
    kind = "message_stop" if path == PATHS["messages"] else "response.completed"
    return f"event: {kind}\ndata: ".encode() + json.dumps({"type": kind}).encode() + b"\n\n"


def read_stream(body: bytes) -> str:
    """The text of a stream; the error for one that ends with one."""
    text = ""
    for row in body.decode().split("\n\n"):
        data = next((line[6:] for line in row.split("\n") if line.startswith("data: ")), "")
        if not data or data == "[DONE]":
            continue
        document = json.loads(data)
        if "error" in document:
            return f"error: {document['error']}"
        choice = next(iter(document.get("choices") or ()), {})
        delta = document.get("delta", choice.get("delta") or choice)
        text += delta if isinstance(delta, str) else delta.get("content") or delta.get("text") or ""
    return text
