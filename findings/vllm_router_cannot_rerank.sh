#!/usr/bin/env bash
# vllm-router 0.1.17 (the vLLM project's router): `/v1/rerank` never works in front of vLLM, `/v2/rerank` does.
#
# For this path the router speaks another engine's dialect. It renames the model to "default", which vLLM answers with 404 unless
# a model is served under that name; it drops `top_n`; and it reads vLLM's answer, an object with `results`, as a list of
# scores. So even an engine that answered 200 with the ranking leaves the client with 500, "Failed to build rerank response".
# `/v2/rerank`, which vLLM serves with the same meaning, is passed as it is.
#
# Who is hurt: retrieval in front of a fleet of rerankers; the engines compute, and their metrics count successes.
# What follows: send to `/v2/rerank` through this router.
# Seen on 2026-11-30, Python 3.11. The engine below listens on loopback and answers as vLLM 0.32 does for a served model.
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

REQUEST = {"model": "reranker", "query": "rain", "documents": ["snow", "drizzle"], "top_n": 1}
FIELDS = ("model", "query", "documents", "top_n")
got: dict[str, dict] = {}


async def engine(request: web.Request) -> web.Response:
    if request.method != "POST":
        return web.json_response({"object": "list", "data": [{"id": "reranker", "object": "model"}]})
    got.update(await request.json())
    result = {"index": 1, "document": {"text": "drizzle", "multi_modal": None}, "relevance_score": 0.9}
    usage = {"prompt_tokens": 8, "total_tokens": 8}
    return web.json_response({"id": "rerank-1", "model": "reranker", "usage": usage, "results": [result]})


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


async def post(session: ClientSession, url: str) -> tuple[int, str]:
    for _ in range(120):
        try:
            async with session.post(url, json=REQUEST) as answer:
                if answer.status != 503:
                    return answer.status, await answer.text()
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
                for path in ("/v1/rerank", "/v2/rerank"):
                    got.clear()
                    status, text = await post(session, f"http://127.0.0.1:{port}{path}")
                    kept = {name: got[name] for name in FIELDS if name in got}
                    print(f"{path}: the engine got {json.dumps(kept)}, the client {status} {text if status != 200 else 'a ranking'}")
        finally:
            router.kill()
            await router.wait()
    await runner.cleanup()


asyncio.run(main())
PY
seen=$(timeout 90 "$folder/venv/bin/python" "$folder/run.py" "$folder/log") || { tail -5 "$folder/log" >&2; exit 1; }
echo "$seen"
[ "$seen" = '/v1/rerank: the engine got {"model": "default", "query": "rain", "documents": ["snow", "drizzle"]}, the client 500 Failed to build rerank response
/v2/rerank: the engine got {"model": "reranker", "query": "rain", "documents": ["snow", "drizzle"], "top_n": 1}, the client 200 a ranking' ] \
  || { echo "behaves otherwise now" >&2; exit 1; }
# Output seen:
# /v1/rerank: the engine got {"model": "default", "query": "rain", "documents": ["snow", "drizzle"]}, the client 500 Failed to build rerank response
# /v2/rerank: the engine got {"model": "reranker", "query": "rain", "documents": ["snow", "drizzle"], "top_n": 1}, the client 200 a ranking
