#!/usr/bin/env bash
# kubernetes 37.0.2 (Python), kubernetes.aio.watch: a refused watch is handed on as an event, and nothing is raised.
#
# kube-apiserver answers a request that priority and fairness rejects with status 429, a Retry-After header and one line of
# plain text. `Watch` never looks at the status of the answer: it reads lines. A line that is not JSON is returned as it is,
# as if it were an event, but as a str instead of a dict. With a JSON Status as the body of the same refusal it raises
# ApiException. So a reader that takes `event["type"]` ends with a TypeError that says nothing of the refusal, and the
# Retry-After header cannot be reached.
#
# What follows for users of the client: check the type of each event, and pause by yourself.
# Seen on 2026-11-29, Python 3.11. The server below listens on loopback and answers as kube-apiserver does.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check kubernetes==37.0.2 aiohttp==3.14.5
cat >"$folder/run.py" <<'PY'
import asyncio

from aiohttp import web
from kubernetes.aio import client, watch

TEXT = "Too many requests, please try again later.\n"
STATUS = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "TooManyRequests", "message": "busy", "code": 429}


async def refuse(request: web.Request) -> web.Response:
    headers = {"Retry-After": "1"}
    if request.match_info["namespace"] == "text":
        return web.Response(status=429, text=TEXT, headers=headers)
    return web.json_response(STATUS, status=429, headers=headers)


async def first_event(api: client.CoreV1Api, namespace: str) -> object:
    async with watch.Watch() as watcher:
        async for event in watcher.stream(api.list_namespaced_pod, namespace, timeout_seconds=5):
            return event
    return None


async def main() -> None:
    app = web.Application()
    app.router.add_get("/api/v1/namespaces/{namespace}/pods", refuse)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = site._server.sockets[0].getsockname()[1]
    async with client.ApiClient(client.Configuration(host=f"http://127.0.0.1:{port}")) as connection:
        api = client.CoreV1Api(connection)
        event = await first_event(api, "text")
        print("429 with text:", type(event).__name__, repr(event))
        assert event == TEXT
        try:
            await first_event(api, "json")
        except client.exceptions.ApiException as error:
            print("429 with a Status:", type(error).__name__, error.status)
        else:
            raise AssertionError("429 with a Status raised nothing")
        try:
            await api.list_namespaced_pod("text")
        except client.exceptions.ApiException as error:
            print("the same list without a watch:", type(error).__name__, error.status)
        else:
            raise AssertionError("the list raised nothing")
    await runner.cleanup()


asyncio.run(main())
PY
timeout 60 "$folder/venv/bin/python" "$folder/run.py"
# Output seen:
# 429 with text: str 'Too many requests, please try again later.\n'
# 429 with a Status: ApiException 429
# the same list without a watch: ApiException 429
