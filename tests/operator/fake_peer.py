"""Stands in for an agent or a gateway: speaks their contract over real HTTP, computes nothing.

`python fake_peer.py agent|gateway --config FILE`. A file `FILE.refuse` makes the control route refuse, `FILE.crash`
ends the process at its start, `FILE.starting` keeps an engine from becoming ready. `GET /stream` at the gateway's
client port streams numbers for a second.
"""

import asyncio
import json
import signal
import sys
from pathlib import Path

from aiohttp import web

ROLE, PATH = sys.argv[1], Path(sys.argv[3])
CONFIG = json.loads(PATH.read_text())
TOKEN = Path(CONFIG["token_file"]).read_text().strip()
CHUNKS = 20


def switch(name: str) -> bool:
    return PATH.with_name(f"{PATH.name}.{name}").exists()


def agent_state() -> dict:
    ready = not switch("starting")
    engine = {"url": "", "model": CONFIG["engine"]["served_name"], "pid": 1, "restarts": 0, "last_exit": ""}
    rank = {"rank": 0, "running": 2, "waiting": 1, "kv_usage": 0.25}
    return {
        "name": CONFIG["name"],
        "phase": "ready" if ready else "starting",
        "accepting": ready,
        "engine": engine,
        "config": {"version": 1, "request": CONFIG["request"]},
        "ranks": [rank] if ready else [],
    }


def gateway_state() -> dict:
    return {
        "accepting": True,
        "held": 0,
        "config": {"dispatch": CONFIG["dispatch"], "request": CONFIG["request"]},
        "engines": [{"name": row["name"], "in_flight": 1} for row in CONFIG["engines"]],
        "totals": {"requests": 7, "failed": 0, "retried": 0},
    }


async def get_state(request: web.Request) -> web.Response:
    return web.json_response(agent_state() if ROLE == "agent" else gateway_state())


async def put_config(request: web.Request) -> web.Response:
    if request.headers.get("Authorization") != f"Bearer {TOKEN}":
        return web.json_response({"errors": [{"path": "Authorization", "message": "needed"}]}, status=401)
    if switch("refuse"):
        return web.json_response({"errors": [{"path": "request", "message": "not today"}]}, status=422)
    for section, values in (await request.json()).items():
        CONFIG[section] = {**CONFIG[section], **values}
    return web.json_response({})


async def get_stream(request: web.Request) -> web.StreamResponse:
    stream = web.StreamResponse()
    await stream.prepare(request)
    for number in range(CHUNKS):
        await stream.write(b"%d\n" % number)
        await asyncio.sleep(0.05)
    return stream


async def serve(listen: dict, routes: list) -> web.AppRunner:
    app = web.Application()
    app.add_routes(routes)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=10.0)
    await runner.setup()
    await web.TCPSite(runner, listen["host"], listen["port"]).start()
    return runner


async def main() -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    control = [
        web.get("/v1/state", get_state),
        web.get("/readyz", get_state),
        web.put("/v1/config", put_config),
    ]
    runners = [await serve(CONFIG["admin" if ROLE == "gateway" else "listen"], control)]
    if ROLE == "gateway":
        runners.insert(0, await serve(CONFIG["listen"], [web.get("/stream", get_stream)]))
    print(f"{ROLE} serves", flush=True)
    await stop.wait()
    print(f"{ROLE} drains", flush=True)
    for runner in runners:
        await runner.cleanup()


if switch("crash"):
    sys.exit("ValueError: no such thing")
asyncio.run(main())
