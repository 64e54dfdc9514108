"""The operator stands for election, and answers its liveness probe, once every kind was read or refused."""

import asyncio
from typing import Any

import kopf
import pytest
from moe_contract.api_server import FORBIDDEN, NOT_FOUND, ApiError, Kind, Listing
from moe_operator.kubernetes import operator as module
from moe_operator.kubernetes import watches
from moe_operator.kubernetes.kinds import LEASE, SECRET, SERVING
from moe_operator.kubernetes.operator import Operator
from moe_operator.kubernetes.reconciler import Reconciler
from moe_operator.kubernetes.settings import OperatorSettings
from moe_operator.kubernetes.store import Key


class FakeServer:
    """An API server without objects, whose lists of Secrets fail with `secrets` while that is set."""

    def __init__(self) -> None:
        self.secrets = 503
        self.closed = ""
        self.leases: list[str] = []
        self.servings: list[Any] = []

    async def list(self, kind: Kind, namespace: str | None, selector: str = "", **_: Any) -> Listing:
        if namespace is not None and namespace == self.closed:
            raise ApiError(FORBIDDEN, f"no {kind.plural} in {namespace}")
        if kind == SECRET and self.secrets:
            raise ApiError(self.secrets, "no secrets")
        return Listing(items=self.servings if kind == SERVING else [], version="1")

    async def watch(self, *_: Any, **__: Any) -> Any:
        await asyncio.Event().wait()
        yield {}

    async def get(self, kind: Kind, namespace: str, name: str) -> Any:
        assert kind == LEASE
        self.leases.append(name)
        raise ApiError(NOT_FOUND, "no such lease")

    async def create(self, kind: Kind, document: Any, *, strict: bool = False) -> Any:
        return document

    async def replace(self, kind: Kind, document: Any, **_: Any) -> Any:
        return document

    async def close(self) -> None:
        pass


class FakeKopf:
    """Counts its starts, and runs until it is stopped."""

    def __init__(self) -> None:
        self.starts = 0

    async def __call__(self, *, stop_flag: asyncio.Event, **_: Any) -> None:
        self.starts += 1
        await stop_flag.wait()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> FakeServer:
    server = FakeServer()
    monkeypatch.setattr(module, "ApiServer", lambda: server)
    return server


@pytest.fixture
def frame(monkeypatch: pytest.MonkeyPatch) -> FakeKopf:
    frame = FakeKopf()
    monkeypatch.setattr(kopf, "operator", frame)
    return frame


async def until(condition: Any) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


async def test_an_operator_that_has_not_read_a_kind_neither_leads_nor_is_live(
    server: FakeServer, frame: FakeKopf
) -> None:
    operator = Operator(OperatorSettings(liveness_port=0, metrics_port=0))
    running = asyncio.create_task(operator.run())
    await asyncio.sleep(0.3)
    assert (server.leases, frame.starts) == ([], 0)
    server.secrets = 0
    await until(lambda: server.leases and frame.starts)
    operator.stop()
    await asyncio.wait_for(running, 10)


async def test_an_operator_that_waits_for_a_kind_ends_when_it_is_stopped(server: FakeServer, frame: FakeKopf) -> None:
    operator = Operator(OperatorSettings(liveness_port=0, metrics_port=0))
    running = asyncio.create_task(operator.run())
    await asyncio.sleep(0.1)
    operator.stop()
    await asyncio.wait_for(running, 10)
    assert server.leases == []


async def test_a_kind_that_is_refused_keeps_nobody_waiting(server: FakeServer, frame: FakeKopf) -> None:
    server.secrets = FORBIDDEN
    await leads(server, frame)


async def test_a_kind_that_fails_again_and_again_keeps_the_work_waiting_for_a_while_alone(
    server: FakeServer, frame: FakeKopf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watches, "PATIENCE_S", 0.0)
    await leads(server, frame)


async def leads(server: FakeServer, frame: FakeKopf) -> None:
    operator = Operator(OperatorSettings(liveness_port=0, metrics_port=0))
    running = asyncio.create_task(operator.run())
    await until(lambda: server.leases and frame.starts)
    operator.stop()
    await asyncio.wait_for(running, 10)


async def test_a_namespace_that_is_closed_keeps_no_other_waiting(server: FakeServer, frame: FakeKopf) -> None:
    server.secrets, server.closed = 0, "a"
    operator = Operator(OperatorSettings(liveness_port=0, metrics_port=0, namespaces=("a", "b")))
    running = asyncio.create_task(operator.run())
    await until(lambda: server.leases and frame.starts)
    sight = operator._watches.sight
    assert (sight.blind_spot("a") != "", sight.blind_spot("b")) == (True, "")
    assert {namespace for _, namespace in sight.unreadable()} == {"a"}
    operator.stop()
    await asyncio.wait_for(running, 10)


@pytest.mark.parametrize("resync_s", [600.0, 0.02], ids=["as it takes over", "as it looks at everything again"])
async def test_a_change_waits_for_none_of_the_resources_that_are_only_looked_at(
    server: FakeServer, frame: FakeKopf, monkeypatch: pytest.MonkeyPatch, resync_s: float
) -> None:
    names, passes = [f"r{number:04d}" for number in range(500)], list[str]()
    server.secrets, server.servings = 0, [serving(name, version=1) for name in names]

    gate = asyncio.Event()

    async def reconcile(_: Reconciler, key: Key) -> None:
        await gate.wait()
        passes.append(key.name)

    monkeypatch.setattr(Reconciler, "reconcile", reconcile)
    operator = Operator(OperatorSettings(liveness_port=0, metrics_port=0, resync_s=resync_s))
    running = asyncio.create_task(operator.run())
    if resync_s < 1.0:
        gate.set()
        await until(lambda: {*names} <= {*passes})
        gate.clear()
    await until(lambda: server.leases)
    waiting = len(names) - operator._settings.workers
    await until(lambda: operator._election.leading.is_set() and len(operator._queue) == waiting)
    before, changed = len(passes), names[-1]
    await operator._see({"type": "MODIFIED", "object": serving(changed, version=2)})
    gate.set()
    await until(lambda: changed in passes[before:])
    # Those that its workers have, and it may be one of them.
    assert passes[before:].index(changed) <= operator._settings.workers
    await until(lambda: {*names} <= {*passes})
    operator.stop()
    await asyncio.wait_for(running, 30)


def serving(name: str, version: int) -> Any:
    return {"metadata": {"namespace": "n", "name": name, "uid": name, "resourceVersion": str(version)}}
