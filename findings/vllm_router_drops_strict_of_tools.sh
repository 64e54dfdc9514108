#!/usr/bin/env bash
# vllm-router 0.1.17 (the vLLM project's router): `strict: true` of a tool does not reach the engine in a chat completion.
#
# vLLM 0.32 documents for `--tool-strict-level auto`, its default, that the schema of a call's arguments is enforced for each tool
# whose `strict` is true. The router parses the body into types of its own and writes it anew. Unknown fields survive at the
# top alone (`cache_salt`, `vllm_xargs`); inside of a tool and of a message they are gone, without a warning and
# with status 200. So the engine lets the model write any arguments. Gone in the same way are fields of earlier tool calls, as the
# `extra_content` that some models want back. `/v1/responses` passes as it was sent.
#
# Who is hurt: agents that trust arguments to fit their schema, once such a router stands in front of an engine that did enforce
# it. What follows: `--tool-strict-level parameter` at the engines, or a proxy that passes bodies as they are.
# Seen on 2026-11-30, Python 3.11. The engine below listens on loopback, answers as vLLM does, and keeps the body that it got.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check vllm-router==0.1.17 aiohttp==3.14.5
cat >"$folder/run.py" <<'PY'
import asyncio
import json
import socket
import sys
from pathlib import Path

from aiohttp import ClientSession, web

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"], "additionalProperties": False}
FUNCTION = {"name": "weather", "description": "Weather of a city", "parameters": SCHEMA, "strict": True}
CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": "{}"}, "extra_content": {"signature": "x"}}
CHAT = {
    "model": "demo",
    "messages": [
        {"role": "user", "content": "And tomorrow?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "1", "content": "rain"},
    ],
    "tools": [{"type": "function", "function": FUNCTION}],
    "cache_salt": "kept",
    "vllm_xargs": {"kept": 1},
}
RESPONSE = {"model": "demo", "input": "And tomorrow?", "tools": [{"type": "function", **FUNCTION}]}
bodies: dict[str, dict] = {}


async def engine(request: web.Request) -> web.Response:
    if request.method == "POST":
        bodies[request.path] = await request.json()
    choice = {"index": 0, "message": {"role": "assistant", "content": "Rain."}, "finish_reason": "stop"}
    return web.json_response({"id": "x", "object": "chat.completion", "created": 1, "model": "demo", "choices": [choice]})


def lost(sent: object, got: object, path: str = "") -> list[str]:
    """Paths of what was sent and did not arrive, or not as it was."""
    if isinstance(sent, dict) and isinstance(got, dict):
        return [row for key, value in sent.items() for row in lost(value, got.get(key), f"{path}.{key}")]
    if isinstance(sent, list) and isinstance(got, list) and len(sent) == len(got):
        return [row for index, pair in enumerate(zip(sent, got)) for row in lost(*pair, f"{path}[{index}]")]
    return [] if sent == got else [path.lstrip(".")]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


async def post(session: ClientSession, url: str, body: dict) -> int:
    for _ in range(120):
        try:
            async with session.post(url, json=body) as answer:
                if answer.status != 503:
                    return answer.status
        except OSError:
            pass
        await asyncio.sleep(0.25)
    raise TimeoutError("the router never answered")


async def main() -> None:
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", engine)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    upstream, port = f"http://127.0.0.1:{runner.addresses[0][1]}", free_port()
    command = [str(Path(sys.executable).with_name("vllm-router")), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--worker-urls", upstream, "--policy", "round_robin", "--prometheus-port", str(free_port())]
    with open(sys.argv[1], "wb") as log:
        router = await asyncio.create_subprocess_exec(*command, stdout=log, stderr=log)
        try:
            async with ClientSession() as session:
                for path, body in (("/v1/chat/completions", CHAT), ("/v1/responses", RESPONSE)):
                    status = await post(session, f"http://127.0.0.1:{port}{path}", body)
                    print(f"{path}: {status}, lost on the way: {', '.join(lost(body, bodies[path])) or 'nothing'}")
        finally:
            router.kill()
            await router.wait()
    await runner.cleanup()


asyncio.run(main())
PY
seen=$(timeout 90 "$folder/venv/bin/python" "$folder/run.py" "$folder/log") || { tail -5 "$folder/log" >&2; exit 1; }
echo "$seen"
[ "$seen" = "/v1/chat/completions: 200, lost on the way: messages[1].tool_calls[0].extra_content, tools[0].function.strict
/v1/responses: 200, lost on the way: nothing" ] || { echo "behaves otherwise now" >&2; exit 1; }
if grep -iq 'strict\|extra_content' "$folder/log"; then echo "a warning says so now" >&2; exit 1; fi
# Output seen:
# /v1/chat/completions: 200, lost on the way: messages[1].tool_calls[0].extra_content, tools[0].function.strict
# /v1/responses: 200, lost on the way: nothing
