#!/usr/bin/env bash
# kubernetes 37.0.2 (Python), kubernetes.aio.leaderelection: LeaseLock cannot create its Lease, and writes local time as UTC.
#
# 1. `LeaseLock.create` passes `pretty=True` to a generated method that takes text alone: pydantic refuses the argument, the
#    error is none that `create` expects, and the election ends with it. So an election that finds no Lease never starts; with
#    a Lease made by somebody else it works.
# 2. The election takes `datetime.now()` without a time zone, and the lock adds "Z" to it. East or west of Greenwich
#    `renewTime` is off by the offset of the zone: a holder that renews each second looks like one that has been dead for
#    hours, or renews in the future, to everyone who reads the Lease (kubectl, alerts on renewTime, other clients' tools).
# 3. `Config` takes a float as `lease_duration`; the lock turns its text into an int, which raises for 15.5, also for 15.0.
#
# What follows for users of the client: create the Lease yourself, run in UTC, give whole seconds; or bring your own election.
# Seen on 2026-11-29, Python 3.11. The server below listens on loopback and keeps one Lease.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check kubernetes==37.0.2 aiohttp==3.14.5
cat >"$folder/run.py" <<'PY'
import asyncio
import logging
from datetime import datetime, timezone

from aiohttp import web
from kubernetes.aio import client
from kubernetes.aio.leaderelection.electionconfig import Config
from kubernetes.aio.leaderelection.leaderelection import LeaderElection
from kubernetes.aio.leaderelection.resourcelock.leaselock import LeaseLock

logging.disable(logging.CRITICAL)
PATH = "/apis/coordination.k8s.io/v1/namespaces/default/leases"
LEASE = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": "demo", "resourceVersion": "1"}, "spec": {}}
ABSENT = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "message": "absent", "code": 404}
seen: dict[str, object] = {"lease": None, "creates": 0, "renewed": asyncio.Event()}


async def read(_: web.Request) -> web.Response:
    return web.json_response(ABSENT, status=404) if seen["lease"] is None else web.json_response(seen["lease"])


async def create(_: web.Request) -> web.Response:
    seen["creates"] += 1
    return web.json_response(LEASE, status=201)


async def replace(request: web.Request) -> web.Response:
    seen["lease"] = await request.json()
    seen["renewed"].set()
    return web.json_response(seen["lease"])


async def work() -> None:
    await asyncio.sleep(60)


def election(api: client.ApiClient, lease_duration: float = 15) -> LeaderElection:
    lock = LeaseLock("demo", "default", "candidate", api)
    terms = {"lease_duration": lease_duration, "renew_deadline": 10, "retry_period": 2}
    return LeaderElection(Config(lock=lock, onstarted_leading=work, onstopped_leading=work, **terms))


async def raised(coroutine: object) -> str:
    try:
        await asyncio.wait_for(coroutine, 20)
    except Exception as error:
        return type(error).__name__
    return "nothing"


async def main() -> None:
    app = web.Application()
    app.router.add_get(PATH + "/demo", read)
    app.router.add_post(PATH, create)
    app.router.add_put(PATH + "/demo", replace)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = site._server.sockets[0].getsockname()[1]
    async with client.ApiClient(client.Configuration(host=f"http://127.0.0.1:{port}")) as api:
        error = await raised(election(api).run())
        print(f"1. no Lease is there: {error}, {seen['creates']} create calls")
        assert (error, seen["creates"]) == ("ValidationError", 0)

        seen["lease"] = LEASE
        leading = asyncio.create_task(election(api).run())
        await asyncio.wait_for(seen["renewed"].wait(), 20)
        leading.cancel()
        renewed = datetime.fromisoformat(seen["lease"]["spec"]["renewTime"].replace("Z", "+00:00"))
        hours = (datetime.now(timezone.utc) - renewed).total_seconds() / 3600
        print(f"2. just renewed, in a zone nine hours behind UTC: renewTime is {hours:.0f} hours old")
        assert round(hours) == 9

        seen["lease"] = LEASE
        error = await raised(election(api, lease_duration=15.0).run())
        print(f"3. lease_duration=15.0: {error}")
        assert error == "ValueError"
    await runner.cleanup()


asyncio.run(main())
PY
# POSIX zones count westwards: this one is nine hours behind UTC.
TZ=XXX9 timeout 90 "$folder/venv/bin/python" "$folder/run.py"
# Output seen:
# 1. no Lease is there: ValidationError, 0 create calls
# 2. just renewed, in a zone nine hours behind UTC: renewTime is 9 hours old
# 3. lease_duration=15.0: ValueError
