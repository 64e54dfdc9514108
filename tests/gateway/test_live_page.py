"""The live page: its key, its switch, the events that it gets, and no work while nobody watches."""

import asyncio
import json
import socket
from contextlib import asynccontextmanager
from dataclasses import replace

import aiohttp
import pytest
from moe_contract.page_keys import derive_page_key
from moe_contract.tenancy import hash_tenant
from moe_gateway.live_page import publisher as publisher_module
from moe_gateway.live_page import routes as routes_module
from moe_gateway.live_page.publisher import LivePublisher
from moe_gateway.live_page.routes import LivePage
from moe_gateway.request.recent_requests import TERMS_PERIOD_S
from moe_scheduling.engine.disaggregation import LatencyTargets

from tests.gateway.clients import TOKEN, get
from tests.gateway.messages import SSE_END, SSE_HEAD, event, post, prompt
from tests.gateway.peers import always, never
from tests.gateway.waiting import until

PAGE_KEY = derive_page_key(TOKEN.encode())
PATIENCE_S = 60.0


@pytest.fixture
def made(monkeypatch):
    """The publishers of the gateways that start."""
    found = []

    class Noted(LivePublisher):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            found.append(self)

    monkeypatch.setattr("moe_gateway.gateway.LivePublisher", Noted)
    return found


class Events:
    """The stream of a page."""

    def __init__(self, answer):
        self.answer = answer

    async def next(self, kind):
        """The next event of a kind."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                text = (await self.answer.content.readuntil(b"\n\n")).decode()
                if text.startswith(":"):
                    continue
                name, data = text.strip().split("\n", 1)
                if name == f"event: {kind}":
                    return json.loads(data.removeprefix("data: "))

    async def until(self, condition, kind="snapshot"):
        while not condition(document := await self.next(kind)):
            pass
        return document


@asynccontextmanager
async def watching(served, query="", key=PAGE_KEY):
    headers = {"Authorization": f"Bearer {key}"}
    async with (
        aiohttp.ClientSession(read_bufsize=2**22) as session,
        session.get(served.admin_url + "/ui/events" + query, headers=headers) as answer,
    ):
        assert (answer.status, answer.content_type) == (200, "text/event-stream")
        yield Events(answer)


async def fetch(served, path, authorization=None):
    headers = {} if authorization is None else {"Authorization": authorization}
    async with (
        aiohttp.ClientSession() as session,
        session.get(served.admin_url + path, headers=headers, allow_redirects=False) as answer,
    ):
        return answer.status, dict(answer.headers), await answer.read()


@pytest.mark.parametrize(
    "authorization", [None, "", "Bearer", f"Bearer {TOKEN}", f"Basic {PAGE_KEY}", f"Bearer {PAGE_KEY}x", "Bearer é"]
)
async def test_nothing_of_requests_is_shown_without_the_page_key(make_engine, serve, authorization):
    served = await serve(await make_engine())
    await served.ask(post(prompt(), extra=b"x-request-id: mine\r\n"))
    for path in ("/ui/events", "/ui/requests/mine"):
        status, _, body = await fetch(served, path, authorization)
        assert (status, b"mine" in body, b"page key" in body) == (401, False, True)
    status, _, body = await fetch(served, "/ui/requests/mine", f"Bearer {PAGE_KEY}")
    assert (status, json.loads(body)["request_id"]) == (200, "mine")


async def test_the_page_key_opens_no_control_route(make_engine, serve):
    served = await serve(await make_engine())
    headers = {"Authorization": f"Bearer {PAGE_KEY}"}
    url = served.admin_url + "/v1/config"
    async with aiohttp.ClientSession() as session, session.put(url, headers=headers, json={}) as answer:
        assert answer.status == 401


@pytest.mark.parametrize("sections", [{"ui": False}, {"token_file": None}])
async def test_a_page_that_is_off_is_not_there(make_engine, serve, sections):
    served = await serve(await make_engine(), **sections)
    for path in ("/ui", "/ui/", "/ui/events", "/ui/requests/mine"):
        assert (await fetch(served, path, f"Bearer {PAGE_KEY}"))[0] == 404
    assert (await get(served, "/healthz"))[0] == 200


async def test_a_page_that_is_not_built_says_how(make_engine, serve, monkeypatch, tmp_path):
    monkeypatch.setattr(LivePage, "_list_files", lambda self: {})
    served = await serve(await make_engine())
    assert (await fetch(served, "/ui"))[1]["Location"] == "/ui/"
    status, headers, body = await fetch(served, "/ui/")
    assert status == 503
    assert b"make ui" in body
    assert "default-src 'none'" in headers["Content-Security-Policy"]


async def test_the_files_of_the_page_are_served_and_no_others(make_engine, serve, monkeypatch, tmp_path):
    assets = tmp_path / "assets"
    (assets / "folder").mkdir(parents=True)
    (assets / "index.html").write_text("<p>page</p>")
    (assets / "index-1.js").write_text("1")
    monkeypatch.setattr(LivePage, "_list_files", lambda self: {path.name: path for path in assets.glob("*.*")})
    served = await serve(await make_engine())
    status, headers, body = await fetch(served, "/ui/")
    assert (status, body, headers["Content-Type"]) == (200, b"<p>page</p>", "text/html; charset=utf-8")
    assert (await fetch(served, "/ui/index-1.js"))[1]["Content-Type"] == "text/javascript; charset=utf-8"
    for name in ("..%2ftoken", "%2e%2e", "folder", "index-2.js"):
        assert (await fetch(served, f"/ui/{name}"))[0] == 404


async def test_a_page_sees_where_requests_went_and_why(make_engine, serve):
    stream = always(SSE_HEAD + event("a") + SSE_END)
    loaded, free = await make_engine(stream, name="loaded"), await make_engine(stream, name="free")
    served = await serve(loaded, free, dispatch={"targets": {"ttft_s": 0.5, "inter_token_s": 0.05}})
    loaded.agent.say_rank(waiting_prefill_tokens=50_000, waiting=3)
    await until(lambda: served.target_state("loaded").signal.waiting_prefill_tokens)
    await served.ask(post(prompt(stream=True), extra=b"x-request-id: first\r\n"))
    async with watching(served) as events:
        history = await events.next("history")
        assert len(history["points"]) == 1, "the stream that ended before is remembered"
        # Terms are recorded once in 10 ms at most.
        await asyncio.sleep(2 * TERMS_PERIOD_S)
        await served.ask(post(prompt(stream=True), extra=b"x-request-id: second\r\n"))
        snapshot = await events.until(
            lambda document: len(document["newest"]) == 2 and document["newest"][0]["record"]["status"]
        )
        row = snapshot["newest"][0]
        assert (row["record"]["request_id"], row["record"]["status"]) == ("second", 200)
        assert [attempt["name"] for attempt in row["record"]["attempts"]] == ["free"]
        assert (row["chosen"]["name"], row["other"]["name"], row["engines"]) == ("free", "loaded", 2)
        assert row["other"]["predicted_s"] > row["chosen"]["predicted_s"]
        assert abs(row["arrived_at_s"] - snapshot["at_s"]) < PATIENCE_S
        assert (snapshot["ttft_target_s"], snapshot["step_target_s"]) == (0.5, 0.05)
        assert {row["name"]: (row["status"], row["waiting"]) for row in snapshot["engines"]} == {
            "loaded": ("ready", 3),
            "free": ("ready", 0),
        }


async def test_requests_for_a_model_that_is_not_there_are_no_silent_ones(make_engine, serve):
    served = await serve(await make_engine())
    for _ in range(3):
        assert (await served.ask(post({"model": "none", "prompt": "x"}))).status == 404
    async with watching(served) as events:
        snapshot = await events.next("snapshot")
        assert (snapshot["requests"], snapshot["failed"], snapshot["refused"]) == (3, 0, 3)
        (found,) = [row for row in snapshot["findings"] if row["kind"] == "refused_requests"]
        assert found["message"] == "3 of 3 requests since the gateway's start were refused, most with 404."
        assert f"Served here: {', '.join(snapshot['models'])}" in found["advice"]


async def test_the_hold_queue_is_shown_by_class_and_tenant(make_engine, serve):
    engine = await make_engine()
    engine.agent.say(accepting=False)
    served = await serve(engine, ready=False)
    for tenant in ("<b>a</b>", "<b>a</b>", "x" * 200):
        client = await served.connect()
        client.send(post(prompt(), extra=f"x-gateway-inference-fairness-id: {tenant}\r\n".encode()))
    await served.held(3)
    async with watching(served) as events:
        # Its agent answers a moment after the gateway's start.
        wanted = {"none_accepts", "engine_notReady"}
        snapshot = await events.until(lambda document: wanted <= {row["kind"] for row in document["findings"]})
        groups = {row["tenant"]: row["requests"] for row in snapshot["held"]}
        assert groups == {hash_tenant(b"<b>a</b>"): 2, hash_tenant(b"x" * 200): 1}
        assert snapshot["point"]["held"] == 3
        rows = [(row["record"]["status"], row["record"]["attempts"], row["held_s"] > 0) for row in snapshot["newest"]]
        assert rows == [(None, [], True)] * 3
        assert [row["held_s"] for row in snapshot["newest"]] == sorted(
            (row["held_s"] for row in snapshot["newest"]), reverse=True
        )
        engine.agent.say(accepting=True)
        later = await events.until(lambda document: not document["held"] and not document["findings"])
        assert any(row["message"].startswith("Over: No engine takes requests") for row in later["events"])
        assert {row["held_s"] for row in later["newest"]} == {None}


async def test_held_requests_with_one_id_are_one_row_as_the_page_finds_rows_by_id(make_engine, serve):
    engine = await make_engine()
    engine.agent.say(accepting=False)
    served = await serve(engine, ready=False)
    for _ in range(2):
        client = await served.connect()
        client.send(post(prompt(), extra=b"x-request-id: same\r\n"))
    await served.held(2)
    async with watching(served) as events:
        snapshot = await events.until(lambda document: document["point"]["held"] == 2)
        assert [row["record"]["request_id"] for row in snapshot["newest"]] == ["same"]


async def test_tenants_with_keys_are_named(make_engine, serve, tmp_path):
    engine = await make_engine()
    engine.agent.say(accepting=False)
    secret = "k" * 32
    (keys := tmp_path / "keys").mkdir()
    (keys / "acme").write_text(secret)
    served = await serve(engine, ready=False, auth={"key_dirs": [str(keys)]})
    client = await served.connect()
    client.send(post(prompt(), extra=f"Authorization: Bearer {secret}\r\n".encode()))
    await served.held(1)
    async with watching(served) as events:
        snapshot = await events.next("snapshot")
        assert [row["tenant"] for row in snapshot["held"]] == ["acme"]


async def test_a_start_is_shown_with_how_far_it_is_and_a_failure_with_its_cause(make_engine, serve):
    engine, other = await make_engine(name="slow"), await make_engine(name="broken")
    start = {"phase": "loading weights", "progress": "3 of 8 files", "age_s": 42.0}
    engine.agent.say(phase="starting", accepting=False, start=start)
    process = other.agent.state["engine"] | {"restarts": 2, "last_exit": "exit status 1: no memory"}
    other.agent.say(phase="backoff", accepting=False, engine=process)
    served = await serve(engine, other, ready=False)
    async with watching(served) as events:
        wanted = {"engine_starting", "engine_failed"}
        snapshot = await events.until(lambda document: wanted <= {row["kind"] for row in document["findings"]})
        assert {row["name"]: (row["status"], row["words"]) for row in snapshot["engines"]} == {
            "slow": ("starting", "loading weights 3 of 8 files, for 42 s"),
            "broken": ("failed", "ended 2 times, the last time with: exit status 1: no memory"),
        }


async def test_changed_settings_are_among_the_changes(make_engine, serve):
    served = await serve(await make_engine())
    in_force = served.gateway.in_force
    served.gateway.apply(replace(in_force, dispatch=replace(in_force.dispatch, targets=LatencyTargets(ttft_s=2.0))))
    async with watching(served) as events:
        snapshot = await events.next("snapshot")
        said = "Setting dispatch.targets.ttft_s: none → 2.0"
        assert [row["message"] for row in snapshot["events"]] == [f"{said}, while no page was open."]
        served.gateway.apply(in_force)
        later = await events.until(lambda document: len(document["events"]) == 2)
        assert later["events"][0]["message"] == "Setting dispatch.targets.ttft_s: 2.0 → none."


async def test_a_rate_is_measured_over_the_second(make_engine, serve):
    engine = await make_engine(always(SSE_HEAD + event("a") + SSE_END))
    engine.agent.say_rank(running=1, step=10, computed_tokens=100)
    served = await serve(engine)
    async with watching(served) as events:
        for second in range(1, int(PATIENCE_S)):
            point = (await events.next("snapshot"))["point"]
            if point["step_s"]:
                break
            engine.agent.say_rank(running=1, step=10 + 50 * second, computed_tokens=100 + 1000 * second)
        # However long the second was: 1000 tokens in 50 steps.
        assert point["step_s"] * point["tokens_per_s"] == pytest.approx(20.0, rel=0.01)


async def test_no_watcher_means_no_work(make_engine, serve, made):
    served = await serve(await make_engine())
    for _ in range(5):
        await served.ask(post(prompt()))
    (publisher,) = made
    assert (publisher.made, publisher._task) == (0, None)
    async with watching(served) as first, watching(served) as second:
        one, other = await first.next("snapshot"), await second.next("snapshot")
        while one["at_s"] != other["at_s"]:
            if one["at_s"] < other["at_s"]:
                one = await first.next("snapshot")
            else:
                other = await second.next("snapshot")
        assert one == other, "one snapshot for all"
    await until(lambda: publisher._task is None, "the end of the last watcher")
    assert not publisher._watchers
    made_then = publisher.made
    await served.ask(post(prompt()))
    assert publisher.made == made_then
    async with watching(served) as events:
        assert (await events.next("snapshot"))["requests"] == 6


async def test_no_request_of_a_client_stops_the_page(make_engine, serve):
    served = await serve(await make_engine())
    async with watching(served) as events:
        await events.next("snapshot")
        await served.ask(post(prompt(priority="9" * 30)))
        await events.until(lambda document: document["newest"])
        await events.next("snapshot")


async def test_a_second_that_fails_is_logged_and_the_next_one_is_shown(make_engine, serve, made, monkeypatch, caplog):
    served = await serve(await make_engine())
    async with watching(served) as events:
        before = await events.next("snapshot")
        with monkeypatch.context() as patched:
            patched.setattr(publisher_module, "build_snapshot", lambda *_, **__: 1 / 0)
            await until(lambda: "no snapshot" in caplog.text, "the failure's line")
        await events.until(lambda document: document["at_s"] > before["at_s"])
    assert "ZeroDivisionError" in caplog.text
    assert caplog.text.count("Traceback") == 1, "a failure that lasts is one line"


async def test_a_page_opens_again_after_the_task_has_ended(make_engine, serve, made):
    served = await serve(await make_engine())
    async with watching(served) as first:
        await first.next("snapshot")
        made[0]._task.cancel()
        await until(made[0]._task.done, "the end of the task")
        async with watching(served) as second:
            for _ in range(2):
                await second.next("snapshot")


async def test_a_task_that_failed_does_not_fail_the_end(make_engine, serve, made):
    served = await serve(await make_engine())
    async with watching(served) as events:
        await events.next("snapshot")
        (publisher,) = made
        publisher._task.cancel()

        async def fail():
            raise ValueError("as no code should")

        publisher._task = asyncio.create_task(fail())
        await served.gateway.close()


async def test_many_pages_are_refused(make_engine, serve, monkeypatch):
    monkeypatch.setattr(publisher_module, "MOST_WATCHERS", 1)
    served = await serve(await make_engine())
    async with watching(served) as events:
        await events.next("snapshot")
        status, _, body = await fetch(served, "/ui/events", f"Bearer {PAGE_KEY}")
        assert (status, b"too many" in body) == (503, True)


@asynccontextmanager
async def unread(served, publisher):
    """A page that asks for the events and then reads none, with more of them than the sockets hold."""
    with socket.socket() as page:
        page.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        page.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(page, ("127.0.0.1", served.config.admin.port))
        head = f"GET /ui/events HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {PAGE_KEY}\r\n\r\n"
        await loop.sock_sendall(page, head.encode())
        await until(lambda: publisher._watchers, "the watcher")
        publisher._text = b"event: snapshot\ndata: " + b"x" * 16_000_000 + b"\n\n"
        for watcher in publisher._watchers:
            watcher.changed.set()
        yield page


async def test_a_page_that_does_not_read_is_cut_off_and_costs_nothing_more(make_engine, serve, made, monkeypatch):
    monkeypatch.setattr(routes_module, "LONGEST_WRITE_S", 0.2)
    served = await serve(await make_engine())
    (publisher,) = made
    async with unread(served, publisher):
        await until(lambda: not publisher._watchers and publisher._task is None, "the end of the watcher")


async def test_a_page_that_does_not_read_does_not_delay_the_end(make_engine, serve, made, monkeypatch):
    monkeypatch.setattr(routes_module, "LONGEST_WRITE_S", 1e6)
    served = await serve(await make_engine())
    async with unread(served, made[0]):
        # Far below the two minutes that a server gives its handlers.
        await asyncio.wait_for(served.gateway.close(), PATIENCE_S)


async def test_a_gateway_that_stops_ends_the_streams(make_engine, serve):
    engine = await make_engine(never)
    served = await serve(engine)
    async with watching(served) as events:
        await events.next("snapshot")
        await asyncio.wait_for(served.gateway.close(), PATIENCE_S)
        async with asyncio.timeout(PATIENCE_S):
            await events.answer.content.read()
