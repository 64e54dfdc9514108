"""A list-watch takes no refusal for an object, pauses as asked, and loses nothing: the real client, a fake server."""

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from moe_contract.api_server import ApiError, ApiServer, Document, Kind, Listing, LoginError
from moe_contract.list_watch import ListWatch, Times
from virtual_time import run_in_virtual_time

from tests.gateway.conftest import free_port, until
from tests.gateway.fake_api import FakeApi, make_slice, status_of

SLICES = Kind("discovery.k8s.io", "v1", "EndpointSlice", "endpointslices")
SELECTOR = "kubernetes.io/service-name in (tiny)"


class Copy:
    """A listener that keeps a copy of the objects and a note of each call."""

    def __init__(self) -> None:
        self.objects: dict[str, Document] = {}
        self.calls: list[str] = []

    def listed(self, listing: Listing) -> None:
        self.calls.append("listed")
        self.objects = {row["metadata"]["name"]: row for row in listing.items}

    def changed(self, document: Document) -> None:
        self.calls.append("changed")
        self.objects[document["metadata"]["name"]] = document

    def deleted(self, document: Document) -> None:
        self.calls.append("deleted")
        del self.objects[document["metadata"]["name"]]

    def absent(self) -> None:
        self.calls.append("absent")

    def lost(self, error: ApiError) -> None:
        self.calls.append(f"lost {error.status}")

    def recovered(self) -> None:
        self.calls.append("recovered")


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[FakeApi]:
    server = FakeApi(tmp_path, free_port())
    await server.start()
    yield server
    await server.stop()


@pytest.fixture
async def server(api: FakeApi) -> AsyncIterator[ApiServer]:
    connection = ApiServer(api.kubeconfig, trust_env=False)
    yield connection
    await connection.close()


@pytest.fixture
async def follow(server: ApiServer) -> AsyncIterator[Callable[..., Copy]]:
    """Begins a list-watch, and ends it with the test."""
    tasks: list[asyncio.Task[None]] = []

    def begin(kind: Kind = SLICES, **times: float) -> Copy:
        copy = Copy()
        one = ListWatch(server, kind, "models", SELECTOR, copy, Times(**times))
        tasks.append(asyncio.create_task(one.run()))
        return copy

    yield begin
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert all(task.cancelled() for task in tasks), "no answer of the API server ends a list-watch"


def row(name: str) -> dict[str, Any]:
    return make_slice(name, "tiny", {name: {"address": "10.0.0.1"}})


def refusal(code: int, **more: Any) -> web.Response:
    return web.json_response(status_of(code), status=code, **more)


async def test_objects_are_there_as_the_cluster_has_them(api: FakeApi, follow: Callable[..., Copy]) -> None:
    api.put(row("a"))
    copy = follow()
    await until(lambda: copy.objects)
    assert copy.objects["a"]["kind"] == "EndpointSlice", "a list leaves the kind out; the document has it"
    api.put(row("b"))
    api.put(row("a") | {"addressType": "IPv6"})
    await until(lambda: set(copy.objects) == {"a", "b"} and copy.objects["a"]["addressType"] == "IPv6")
    api.delete("a")
    await until(lambda: set(copy.objects) == {"b"})
    assert (api.lists, api.watches) == (1, 1)
    assert copy.calls[0] == "listed"


async def test_a_list_in_pages_is_one_list(api: FakeApi, server: ApiServer) -> None:
    for name in "abcde":
        api.put(row(name))
    api.page = 2
    listing = await server.list(SLICES, "models", SELECTOR)
    assert ([one["metadata"]["name"] for one in listing.items], listing.version) == ([*"abcde"], "5")
    assert api.lists == 3
    packed = await server.list(SLICES, "models", SELECTOR, pack=lambda one: {"name": one["metadata"]["name"]})
    assert packed.items == [{"name": name} for name in "abcde"]


REFUSED = {
    "429": lambda: refusal(429),
    "503": lambda: refusal(503),
    "500": lambda: refusal(500),
    "403": lambda: refusal(403),
    "503 in words": lambda: web.Response(status=503, text="etcd has no leader\n"),
    "429 as an event": lambda: line({"type": "ERROR", "object": status_of(429)}),
    "503 in place of an event": lambda: line(status_of(503)),
    "words in place of an event": lambda: web.Response(text="Too many requests, please try again later.\n"),
    "an event of another type": lambda: line({"type": "WHAT", "object": row("x")}),
    "an event of no object": lambda: line({"type": "ADDED", "object": None}),
    "an event of an empty object": lambda: line({"type": "ADDED", "object": {}}),
}


def line(document: Document) -> web.Response:
    return web.Response(text=json.dumps(document) + "\n", content_type="application/json")


@pytest.mark.parametrize("refuse", REFUSED.values(), ids=REFUSED.keys())
async def test_a_refused_watch_is_no_object_and_a_list_follows(
    api: FakeApi, follow: Callable[..., Copy], refuse: Callable[[], web.Response]
) -> None:
    api.put(row("a"))
    api.refusals.append(refuse())
    copy = follow()
    await until(lambda: api.watches == 1)
    api.put(row("b"))
    await until(lambda: set(copy.objects) == {"a", "b"})
    await until(lambda: api.watches == 2)
    assert api.lists == 2
    assert {call.split()[0] for call in copy.calls} <= {"listed", "lost", "recovered"}


@pytest.mark.parametrize("as_event", [False, True])
async def test_the_pause_that_the_server_asks_for_is_kept(
    api: FakeApi, follow: Callable[..., Copy], as_event: bool
) -> None:
    status = status_of(429) | {"details": {"retryAfterSeconds": 1}}
    api.refusals.append(
        line({"type": "ERROR", "object": status}) if as_event else refusal(429, headers={"Retry-After": "1"})
    )
    copy = follow()
    await until(lambda: copy.calls[:2] == ["listed", "lost 429"])
    await asyncio.sleep(0.8)
    assert (api.lists, api.watches) == (1, 1)
    await until(lambda: api.watches == 2)
    # The loss was that of watches, so it ends with the first watch that brings something.
    api.put(row("a"))
    await until(lambda: copy.calls[-1] in ("changed", "recovered") and "recovered" in copy.calls)


async def test_refusals_in_a_row_come_less_and_less_often(api: FakeApi, follow: Callable[..., Copy]) -> None:
    api.refusals += [refusal(503) for _ in range(200)]
    copy = follow()
    await asyncio.sleep(2.0)
    # 0.05 s at least, then twice as much each time.
    assert 2 <= api.watches <= 7
    assert copy.calls.count("lost 503") == 1, "one note of a row of failures"


async def test_watches_that_end_at_once_are_not_asked_for_in_a_tight_loop(
    api: FakeApi, follow: Callable[..., Copy]
) -> None:
    api.refusals += [web.Response(text="") for _ in range(200)]
    follow()
    await asyncio.sleep(2.0)
    assert 2 <= api.watches <= 7
    assert api.lists == 1


async def test_a_version_that_is_too_old_takes_a_list_and_is_no_loss(api: FakeApi, follow: Callable[..., Copy]) -> None:
    for as_event in (False, True):
        api.refusals.append(line({"type": "ERROR", "object": status_of(410)}) if as_event else refusal(410))
    copy = follow()
    await until(lambda: api.watches == 3)
    assert (api.lists, copy.calls) == (3, ["listed"] * 3)


async def test_the_next_watch_begins_at_the_newest_bookmark_without_a_list(
    api: FakeApi, follow: Callable[..., Copy]
) -> None:
    copy = follow()
    await until(lambda: api.watches == 1)
    api.bookmark(41)
    await asyncio.sleep(0.1)
    api.end_watches()
    await until(lambda: api.watches == 2)
    assert (api.lists, api.watched_from, copy.calls) == (1, [0, 41], ["listed"])


async def test_a_silent_watch_is_given_up(api: FakeApi, follow: Callable[..., Copy]) -> None:
    api.mute = True
    copy = follow(silence_s=0.3)
    await until(lambda: api.watches == 1)
    api.put(row("a"))
    await until(lambda: "a" in copy.objects)
    assert "lost 0" not in copy.calls


async def test_after_its_time_a_list_is_made_though_the_watch_lives(api: FakeApi, follow: Callable[..., Copy]) -> None:
    copy = follow(relist_s=0.3)
    await until(lambda: api.lists >= 3)
    assert set(copy.calls) == {"listed"}


def test_the_lists_of_many_kinds_spread_and_none_is_late() -> None:
    times: dict[str, list[float]] = {}

    class Still:
        """An API server where nothing changes."""

        async def list(self, kind: Kind, *_: Any, **__: Any) -> Listing:
            times.setdefault(kind.name, []).append(asyncio.get_running_loop().time())
            return Listing(items=[], version="1")

        async def watch(self, *_: Any, watch_s: float, **__: Any) -> Any:
            await asyncio.sleep(watch_s)
            for nothing in ():
                yield nothing

    async def run() -> None:
        still: Any = Still()
        kinds = [Kind("", "v1", f"Kind{number}", "kinds") for number in range(16)]
        times = Times(relist_s=600.0, watch_s=300.0)
        watches = [ListWatch(still, kind, None, "", Copy(), times) for kind in kinds]
        tasks = [asyncio.create_task(one.run()) for one in watches]
        await asyncio.sleep(7200.0)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    run_in_virtual_time(run())
    gaps = [after - before for row in times.values() for before, after in itertools.pairwise(row)]
    assert len(times) == 16
    assert max(gaps) <= 600.0 + 1.0
    assert min(gaps) >= 450.0
    second = sorted(row[1] for row in times.values())
    assert second[-1] - second[0] > 30.0, "all at once would keep the loop from all else"


async def test_a_kind_that_comes_later_is_followed_then(api: FakeApi, follow: Callable[..., Copy]) -> None:
    api.answer = 404
    copy = follow(Kind("discovery.k8s.io", "v1", "EndpointSlice", "endpointslices", optional=True), absent_s=0.2)
    await until(lambda: copy.calls.count("absent") == 2)
    api.answer = None
    await until(lambda: copy.calls[-1] == "listed")
    assert set(copy.calls) == {"absent", "listed"}


async def test_a_kind_that_has_to_be_there_and_is_not_is_a_loss(api: FakeApi, follow: Callable[..., Copy]) -> None:
    api.answer = 404
    copy = follow()
    await until(lambda: copy.calls)
    api.answer = None
    await until(lambda: "listed" in copy.calls)
    assert copy.calls == ["lost 404", "recovered", "listed"]


async def test_a_listener_that_fails_gets_the_objects_again(api: FakeApi, follow: Callable[..., Copy]) -> None:
    copy, failures = follow(), itertools.chain([True], itertools.repeat(False))
    change = copy.changed

    def fail_once(document: Document) -> None:
        if next(failures):
            raise KeyError("a field")
        change(document)

    copy.changed = fail_once  # type: ignore[method-assign]
    await until(lambda: api.watches == 1)
    api.put(row("a"))
    await until(lambda: "a" in copy.objects)


async def test_many_watches_leave_calls_a_connection(
    api: FakeApi, server: ApiServer, follow: Callable[..., Copy]
) -> None:
    copies = [follow() for _ in range(120)]
    await until(lambda: api.watches == len(copies))
    assert (await asyncio.wait_for(server.list(SLICES, "models", SELECTOR), 5)).items == []


async def test_errors_name_the_status_and_the_reason_of_the_server(api: FakeApi, server: ApiServer) -> None:
    async def error_of(call: Callable[[], Awaitable[Any]]) -> ApiError:
        with pytest.raises(ApiError) as caught:
            await call()
        return caught.value

    api.answer = 409
    refused = await error_of(lambda: server.get(SLICES, "models", "a"))
    assert (refused.status, refused.message) == (404, "404: Not Found"), "of a path that it does not have, in words"
    refused = await error_of(lambda: server.list(SLICES, "models"))
    assert (refused.status, refused.message, str(refused)) == (409, "status 409", "409: status 409")
    await api.stop()
    unreachable = await error_of(lambda: server.list(SLICES, "models"))
    assert unreachable.status == 0
    assert "ClientConnectorError" in unreachable.message


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "[]",
        "{}",
        "current-context: a\ncontexts: []\n",
        "\x00",
        "hello",
        "contexts: [",
        "contexts: 5\ncurrent-context: a",
        "clusters: x",
    ],
)
def test_a_file_that_is_no_kubeconfig_is_refused_with_a_reason(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "kubeconfig"
    if text is not None:
        path.write_text(text)
    with pytest.raises(LoginError, match=r"neither a pod's account nor a usable kubeconfig: ") as refused:
        ApiServer(path)
    said = str(refused.value)
    assert str(path) in said, "the file is named"
    assert "object" not in said.replace("Expected object", ""), "no error of Python's own"
    assert "\n" not in said


def test_the_namespace_is_that_of_the_context(api: FakeApi) -> None:
    assert ApiServer(api.kubeconfig).namespace == "default"
    document = json.loads(api.kubeconfig.read_text())
    document["contexts"][0]["context"]["namespace"] = "models"
    api.kubeconfig.write_text(json.dumps(document))
    assert ApiServer(api.kubeconfig).namespace == "models"
