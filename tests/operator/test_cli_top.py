"""`moeserving top`, `roles` and `drain` against a deployment that runs, here and through kubectl."""

import asyncio
import io
import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from fake_fleet import Fleet, run
from local_place import COMMAND, TIMEOUT_S
from moe_contract.live_page import EngineRow, HeldGroup, LiveSnapshot, PageFinding, TimePoint
from moe_operator.cli import drain, top
from moe_operator.cli.gateways import GatewayWays, ReachedGateways
from moe_operator.cli.output import NAME_WIDTH, shorten
from moe_operator.cli.stopping import describe_stop
from moe_operator.cli.top import LiveTop
from moe_operator.cli.top_view import choose_rows, merge_engines, render_top
from moe_operator.experts.reach import Cluster
from moe_operator.local.failure import Failure
from rich.console import Console

ENGINES = ["a-engine-0", "a-engine-1"]
PLACES = ["machine", "cluster"]


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    made = Fleet(tmp_path_factory.mktemp("fleet"), replicas=2)
    yield made
    made.end()


@pytest.fixture(params=PLACES)
def where(request: pytest.FixtureRequest, fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Options by which a command reaches the fleet, its gateway's name there, and its engines' names."""
    if request.param == "machine":
        return ("a", *fleet.local), "gateway", ENGINES
    fleet.make_kubectl(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    return ("a", "-n", "ns"), "way-0", ["pod-0", "pod-1"]


def test_top_has_the_rates_of_a_second_and_ends_where_the_output_is_no_terminal(where):
    options, gateway, _ = where
    said = run("top", *options)
    assert "TTFT 170.0 ms  TPOT -  12.5 req/s" in said
    assert "nothing is wrong" in said
    assert all(f"{name} ready " in said for name in ENGINES)
    assert run("top", "--once", *options) == said
    document = json.loads(run("top", *options, "-o", "json"))
    assert document[gateway]["point"]["requests_per_s"] == 12.5
    assert yaml.safe_load(run("top", *options, "-o", "yaml")) == document
    assert "TTFT factor" in run("top", *options, "-o", "wide")


def test_top_without_a_page_names_the_switch(fleet):
    switch = fleet.switch("gateway", "no-page")
    switch.write_text("404")
    try:
        assert "gateway.ui.enabled is false" in run("top", "a", *fleet.local, code=1)
    finally:
        switch.unlink()


def test_in_a_terminal_top_goes_on_until_ctrl_c_and_connects_again(fleet):
    """The fake's stream ends after two snapshots."""
    leader, follower = pty.openpty()
    command = [*COMMAND, "top", "a", *fleet.local]
    with subprocess.Popen(command, stdin=follower, stdout=follower, stderr=follower) as process:
        os.close(follower)
        try:
            text = read_until(leader, "tried again each second")
            assert "a-engine-1" in text
            os.write(leader, b"\x03")
            process.send_signal(2)
            assert process.wait(TIMEOUT_S) == 0
        finally:
            process.kill()
            os.close(leader)


async def test_top_ends_where_the_way_to_its_last_gateway_has_ended():
    """kubectl ends with the pod: nobody connects again, and old figures must not look like live ones."""
    gateways = ReachedGateways(
        name="a",
        urls={"way-0": "http://127.0.0.1:1", "way-1": "http://127.0.0.1:1"},
        read_tokens=lambda: ("secret",),
        describe_end=lambda pod: f"kubectl: the way to the pod {pod} has ended: gone",
    )
    screen = LiveTop(gateways, wide=False)
    screen._newest["way-0"] = snapshot(row(0))
    async with asyncio.timeout(60):
        with pytest.raises(Failure, match="way-0 has ended: gone; start it again"):
            await screen.run()
    assert screen._newest == {}


async def test_top_follows_the_gateways_that_come_and_go(monkeypatch):
    monkeypatch.setattr(top, "LOOK_EVERY_S", 0.01)
    found: list[object] = [{"new": "http://127.0.0.1:2"}, Failure("a: no gateway runs there")]
    gateways = ReachedGateways(
        name="a",
        urls={"old": "http://127.0.0.1:1"},
        read_tokens=lambda: ("secret",),
        describe_end=lambda pod: f"the gateway {pod} is gone",
        refresh=lambda: answer(found),
    )
    screen = LiveTop(gateways, wide=False)
    screen._newest["old"] = snapshot(row(0))
    running = asyncio.create_task(screen.run())
    async with asyncio.timeout(60):
        while "" not in screen._problems:
            await asyncio.sleep(0.01)
    assert (screen._watchers.keys(), screen._newest) == ({"new"}, {})
    assert screen._problems[""].startswith("a: no gateway runs there; looked for again")
    assert not running.done(), "another one may come"
    screen._end()
    await running


async def test_a_new_way_at_the_address_of_the_one_that_ended_is_followed():
    gateways = ReachedGateways(
        name="a",
        urls={"way-0": "http://127.0.0.1:1"},
        read_tokens=lambda: ("secret",),
        describe_end=lambda pod: "it is gone",
        refresh=lambda: {"way-0": "http://127.0.0.1:1"},
    )
    screen = LiveTop(gateways, wide=False)
    screen._follow(gateways.urls)
    _, first = screen._watchers["way-0"]
    async with asyncio.timeout(60):
        await first
    assert screen._problems == {"way-0": "it is gone"}
    screen._follow(gateways.urls)
    _, second = screen._watchers["way-0"]
    assert not second.done()
    assert screen._problems == {}
    second.cancel()


def answer(found: list[object]) -> dict[str, str]:
    first = found.pop(0) if len(found) > 1 else found[0]
    if isinstance(first, Failure):
        raise first
    assert isinstance(first, dict)
    return first


def test_ways_to_gateways_are_opened_and_closed_with_their_pods(fleet, tmp_path, monkeypatch):
    fleet.make_kubectl(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    kubectl = tmp_path / "kubectl"
    with GatewayWays("a", Cluster(namespace="ns", context=None)) as ways:
        first = ways.refresh()
        assert first.keys() == {"way-0"}
        assert ways.refresh() == first
        old, _ = ways._ways["way-0"]
        assert ways.describe_end("way-0") == ""
        kubectl.write_text(kubectl.read_text().replace("way-0", "way-1"))
        assert ways.refresh().keys() == {"way-1"}
        assert old.has_ended()
        assert ways.describe_end("way-0") == "the gateway way-0 is gone"
        new, _ = ways._ways["way-1"]
        new.process.kill()
        new.process.wait()
        assert "has ended" in ways.describe_end("way-1")
        ways.refresh()
        assert ways.describe_end("way-1") == "", "a way that ended is opened anew"
        kubectl.write_text(kubectl.read_text().replace("'Running'", "'Pending'"))
        with pytest.raises(Failure, match="no gateway runs there"):
            ways.refresh()


def test_ctrl_z_gives_the_terminal_back_and_fg_draws_anew(fleet):
    leader, follower = pty.openpty()
    command = [*COMMAND, "top", "a", *fleet.local]
    # A group of its own: one without a parent outside of it would not be stopped.
    with subprocess.Popen(command, stdin=follower, stdout=follower, stderr=follower, process_group=0) as process:
        os.close(follower)
        try:
            read_until(leader, "a-engine-1")
            process.send_signal(signal.SIGTSTP)
            assert os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT).si_status == signal.SIGTSTP
            assert "\x1b[?1049l" in read_until(leader, "\x1b[?1049l"), "the other screen is left"
            process.send_signal(signal.SIGCONT)
            assert "a-engine-1" in read_until(leader, "\x1b[?1049h") + read_until(leader, "a-engine-1")
            process.send_signal(signal.SIGINT)
            assert process.wait(TIMEOUT_S) == 0
        finally:
            process.kill()
            os.close(leader)


def test_a_terminal_without_utf_8_shows_the_screen(fleet):
    command = [*COMMAND, "top", "--once", "a", *fleet.local]
    environment = os.environ | {"PYTHONIOENCODING": "iso-8859-1"}
    done = subprocess.run(command, capture_output=True, env=environment, timeout=TIMEOUT_S, check=True)
    assert b"a-engine-0 ready" in done.stdout
    name = "a" * 40
    program = (
        "import sys; from moe_operator.cli import completion, command, main; import typer\n"
        "from moe_operator.cli.output import OutputFormat, print_document, print_table, shorten\n"
        f"command.app = lambda **_: (print_table(shorten({name!r})),"
        " print_document({'a': '\u2026'}, OutputFormat.JSON), print_document({'a': '\u2026'}, OutputFormat.YAML))\n"
        "main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, env=environment, timeout=TIMEOUT_S, check=True
    )
    lines = done.stdout.decode("iso-8859-1").splitlines()
    assert lines[0] == shorten(name).replace("\u2026", "?")
    assert json.loads("\n".join(lines[1:4])) == yaml.safe_load(lines[4]) == {"a": "\u2026"}


def read_until(descriptor: int, words: str) -> str:
    text = ""
    while words not in text:
        text += os.read(descriptor, 65536).decode(errors="replace")
    return text


def test_roles_are_those_of_the_gateway_with_transfers_and_fall_backs(where, fleet):
    options, _, _ = where
    assert "no request is split: every engine computes prompts and answers" in run("roles", *options)
    fleet.switch("gateway", "split").touch()
    try:
        said = run("roles", *options)
        assert "a  1 decode, 1 prefill" in said
        assert "5 transfers of KV blocks, 1 fall-backs (decode_error 1)" in said
        document = json.loads(run("roles", *options, "-o", "json"))
        assert [row["role"] for row in document["engines"]] == ["prefill", "decode"]
        assert (document["split"], document["transfers"], document["fallBacks"]) == (True, 5, {"decode_error": 1})
    finally:
        fleet.switch("gateway", "split").unlink()


def test_an_engine_is_drained_and_serves_again_and_the_last_one_is_refused(where):
    options, _, (first, second) = where
    assert f"ENGINE: {first} is not drained: its phase is ready" in run("drain", first, *options, "--undo", code=2)
    said = run("drain", first, *options)
    assert f"{first}: drains, " in said
    assert f"{first}: drained after " in said
    assert ", no stream was cut" in said
    assert "is drained already" in run("drain", first, *options)
    refused = run("drain", second, *options, code=2)
    assert f"ENGINE: {second} is the last engine that takes requests; nothing was changed" in refused
    assert "drained after" in run("drain", second, *options, "--force")
    for name in (first, second):
        assert f"{name}: starts again now" in run("drain", name, *options, "--undo")
    assert "3 requests left" in run("drain", first, *options, "--no-wait")
    run("drain", first, *options, "--undo")


def test_in_a_cluster_the_pod_names_its_deployment(fleet, tmp_path, monkeypatch):
    fleet.make_kubectl(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert "ENGINE: pod-0 is not drained" in run("drain", "pod-0", "-n", "ns", "--undo", code=2)


def test_an_unknown_engine_is_named_with_the_known_ones(where):
    options, _, names = where
    assert run("drain", "b", *options, code=2) == f"ENGINE: unknown 'b'; known: {', '.join(names)}\n"


@pytest.mark.parametrize(
    ("left", "most", "elapsed_s", "text"),
    [
        (8, 8, 3.0, "e: drains, 8 of 8 requests left after 3 s"),
        (2, 8, 30.0, "e: drains, 2 of 8 requests left after 30 s, about 10 s to go"),
        (0, 8, 61.0, "e: no request left, the engine stops (1 min 1 s)"),
    ],
)
def test_a_drain_says_how_many_are_left_and_how_long_still(left, most, elapsed_s, text):
    assert drain.describe_drain("e", left, most, elapsed_s) == text


def test_a_drain_names_the_limit_and_what_it_cut():
    said = drain.describe_drain("e", 1, 1, 100.0, 120.0)
    assert said == "e: drains, 1 of 1 requests left after 1 min 40 s, at most 20 s"
    assert drain.describe_cut(2, 121.0, 120.0) == ", 2 requests were cut: engine.drainTimeout is 2 min 0 s"
    assert drain.describe_cut(2, 3.0, 120.0) == drain.describe_cut(0, 121.0, 120.0) == ", no stream was cut"


async def test_a_stop_says_how_many_requests_are_left_until_the_gateway_has_ended(fleet):
    record = replace(fleet.record(), drain_timeout_s=60.0)
    assert await describe_stop(record, 45.0) == ("a: 0 requests left after 45 s, at most 15 s to go", "requests")
    gone = tuple(replace(row, url="http://127.0.0.1:1") for row in record.processes)
    said, phase = await describe_stop(replace(record, processes=gone), 61.0)
    assert (said, phase) == ("a: the gateway has ended, engines stop (1 min 1 s)", "engines")


def draw(snapshots: dict[str, LiveSnapshot], **options) -> list[str]:
    console = Console(width=80, file=io.StringIO(), highlight=False)
    with console.capture() as capture:
        console.print(render_top("moe", snapshots, **options))
    return [line.rstrip() for line in capture.get().splitlines()]


def row(number: int, **changes) -> EngineRow:
    values = {"name": f"moe-engine-7d9f8b6c5d-{number:05}", "status": "ready", "role": "unified"}
    values |= {"running": 128, "waiting": 1024, "kv_usage": 1.0}
    values |= {"step_s": 0.1234, "tokens_per_s": 123456.0, "in_flight": 1024}
    return EngineRow(**(values | changes))


def snapshot(*rows: EngineRow, **changes) -> LiveSnapshot:
    point = TimePoint(at_s=1e9, ttft_s=1.5, ttft_p95_s=2.25, step_s=0.1, requests_per_s=99.5, held=3)
    return LiveSnapshot(at_s=1e9, point=point, engines=rows, models=("m",), **changes)


def test_the_screen_of_large_numbers_fits_into_80_columns_and_its_lines():
    finding = PageFinding(kind="x", severity="error", message="Engines fail.", advice="Look.")
    held = (HeldGroup(priority=0, tenant="abcdef01", requests=3, prompt_tokens=9, oldest_s=2.0),)
    rows = (row(number, status="ready" if number else "unreachable") for number in range(64))
    shown = snapshot(*rows, findings=(finding,), held=held, ttft_target_s=1.0)
    lines = draw({"one": shown, "two": shown}, height=24, last="Ctrl-C ends")
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    assert "one: TTFT 1.50 s (p95 2.25 s, bound 1.00 s)  TPOT 100.0 ms  99.5 req/s" in lines
    assert "error: Engines fail. Look." in lines
    assert "held: 3 of class 0 of tenant abcdef01, the oldest for 2.00 s" in lines
    # No cell of a row is cut.
    (first,) = [line for line in lines if line.endswith("-00000") or "-00000 " in line]
    assert first.split()[1:] == ["unreachable", "unified", "128", "1024", "100%", "123.4", "ms", "123456", "2048"]
    assert any(line.startswith("and 54 more") for line in lines)


def test_gateways_that_see_one_start_a_second_apart_say_it_once():
    def seen(words: str, kind: str = "engine_starting") -> LiveSnapshot:
        finding = PageFinding(kind=kind, severity="info", message=f"e-0 starts: {words}.", advice="")
        return snapshot(row(0), findings=(finding,))

    lines = draw({"one": seen("compiling, for 42 s"), "two": seen("compiling, for 43 s")})
    assert [line for line in lines if line.startswith("info")] == ["info: e-0 starts: compiling, for 42 s."]
    lines = draw({"one": seen("a", "other"), "two": seen("b", "other")})
    assert len([line for line in lines if line.startswith("info")]) == 2


def test_of_too_many_rows_those_that_are_not_ready_come_first_then_the_busiest():
    rows = [row(0, waiting=0), row(1, waiting=5), row(2, status="unreachable", waiting=0)]
    assert [each.name[-1] for each in choose_rows(rows, 2)] == ["2", "1"]
    assert choose_rows(rows, 3) == rows
    assert choose_rows(rows, None) == rows


def test_requests_that_several_gateways_sent_to_an_engine_are_added():
    both = merge_engines([snapshot(row(1, in_flight=2)), snapshot(row(0, in_flight=1), row(1, in_flight=3))])
    assert [(each.name[-1], each.in_flight) for each in both] == [("0", 1), ("1", 5)]


@pytest.mark.parametrize(
    ("name", "text"), [("short", "short"), ("moe-engine-7d9f8b6c5d-x2x4z9", "moe-engi…9f8b6c5d-x2x4z9")]
)
def test_a_long_name_keeps_its_end(name, text):
    assert shorten(name) == text
    assert len(shorten("x" * 300)) == NAME_WIDTH
