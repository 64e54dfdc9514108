"""A small real OpenAI-like server: it streams exactly the tokens asked for, and misbehaves where a test says so."""

import asyncio
import json
import stat
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

Misbehaviour = Callable[[web.Request, dict[str, Any]], Awaitable[web.StreamResponse | None]]


@dataclass
class MockServer:
    """What it was asked, and how it behaves. `misbehave` may answer in place of the stream."""

    url: str = ""
    key: str = ""
    max_model_len: int | None = 1000
    token_gap_s: float = 0.0
    first_token_s: float = 0.0
    tokens_per_event: int = 1
    extra_tokens: int = 0
    asked: list[dict[str, Any]] = field(default_factory=list)
    in_flight: int = 0
    most_in_flight: int = 0
    misbehave: Misbehaviour | None = None

    async def models(self, _: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "mock", "max_model_len": self.max_model_len}]})

    async def tokenize(self, request: web.Request) -> web.Response:
        body = await request.json()
        return web.json_response({"tokens": [ord(letter) for letter in body["prompt"]]})

    async def completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.asked.append(body)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            if self.misbehave and (answer := await self.misbehave(request, body)):
                return answer
            return await self.stream(request, body)
        finally:
            self.in_flight -= 1

    async def stream(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        wanted = body["max_tokens"] + self.extra_tokens
        await asyncio.sleep(self.first_token_s)
        for sent in range(0, wanted, self.tokens_per_event):
            if sent:
                await asyncio.sleep(self.token_gap_s)
            await response.write(event({"choices": [{"text": "x", "index": 0}]}))
        await response.write(event({"choices": [], "usage": {"completion_tokens": wanted}}))
        await response.write(b"data: [DONE]\n\n")
        return response


def event(payload: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(payload).encode() + b"\n\n"


@pytest.fixture
async def server() -> AsyncIterator[MockServer]:
    mock = MockServer()

    @web.middleware
    async def check_key(request: web.Request, handler: Any) -> web.StreamResponse:
        if mock.key and request.headers.get("authorization") != f"Bearer {mock.key}":
            return web.json_response({"error": "Unauthorized"}, status=401)
        return await handler(request)

    app = web.Application(client_max_size=2**24, middlewares=[check_key])
    app.router.add_get("/v1/models", mock.models)
    app.router.add_post("/tokenize", mock.tokenize)
    app.router.add_post("/v1/completions", mock.completions)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    mock.url = site.name if not site.name.endswith(":0") else f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield mock
    await runner.cleanup()


@pytest.fixture
def scripted_command(tmp_path, monkeypatch) -> Path:
    """A `moeserving` that writes down how it was called; it refuses where a file `refuse` lies beside it."""
    script, log = tmp_path / "moeserving", tmp_path / "calls"
    script.write_text(
        f'#!/bin/sh\necho "$@" >> {log}\n[ -e {tmp_path}/refuse ] && {{ echo "no such deployment"; exit 2; }}\nexit 0\n'
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr("moe_tools.deployment.COMMAND", script)
    log.write_text("")
    return log
