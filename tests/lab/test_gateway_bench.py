"""The comparison with vllm-router; its load, its mock engines and our gateway are real here.

In the place of vllm-router stands another copy of the gateway, started by vllm-router's command line.
"""

import asyncio
import json
import math
import os
import stat
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import orjson
import pytest
from moe_lab.gateway import processes
from moe_lab.gateway.comparison import (
    GatewayComparison,
    Measurement,
    MeasurementPair,
    build_document,
    compare,
    describe,
    estimate_ratio,
    read_machine,
    render_comparison,
    warn_if_busy,
)
from moe_lab.gateway.engine import ANSWER, STEP_S, Batch, Connection
from moe_lab.gateway.floor import FloorRow, render_floor
from moe_lab.gateway.load import TURN_REQUESTS, WrongAnswer, ask_in_turns, ask_repeatedly, stream_at_once
from moe_lab.gateway.processes import GatewayProcess, running, share_cores
from moe_lab.gateway.relay import RelayKind
from moe_lab.gateway.streams import TIMED_STREAMS, build_large_request, grow_idle, private_bytes, time_events
from rich.console import Console

COMMAND = [sys.executable, "-m", "moe_lab.gateway"]
STAND_IN = """#!{python}
import json, os, pathlib, sys, tempfile
given = sys.argv[1:]
value = lambda name: given[given.index(name) + 1]
folder = pathlib.Path(tempfile.mkdtemp(dir={folder!r}))
(folder / "token").write_text("stand-in")
engines = [{{"name": f"e{{i}}", "url": url}} for i, url in enumerate(given[given.index("--worker-urls") + 1 :])]
config = {{
    "listen": {{"port": int(value("--port"))}},
    "admin": {{"port": int(value("--prometheus-port"))}},
    "token_file": str(folder / "token"),
    "engines": engines,
}}
(folder / "gateway.json").write_text(json.dumps(config))
os.execv(sys.executable, [sys.executable, "-m", "moe_gateway", "--config", str(folder / "gateway.json")])
"""


@pytest.fixture
def stand_in(tmp_path) -> Path:
    program = tmp_path / "vllm-router"
    program.write_text(STAND_IN.format(python=sys.executable, folder=str(tmp_path)))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return program


def pairs(*ratios: float) -> tuple[MeasurementPair, ...]:
    return tuple(MeasurementPair(ours=100.0 * ratio, theirs=100.0) for ratio in ratios)


def compared(measurement: Measurement, *ratios: float) -> GatewayComparison:
    return GatewayComparison(measurement=measurement, pairs=pairs(*ratios), ratio=estimate_ratio(pairs(*ratios)))


def in_group_of(pid: int) -> set[int]:
    """Processes that descend from it, by the parents in /proc."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int(folder.joinpath("stat").read_text().rsplit(")", 1)[1].split()[1])
        except OSError:
            continue
    found, todo = set(), [pid]
    while todo:
        parent = todo.pop()
        children = {child for child, its in parents.items() if its == parent}
        found |= children
        todo.extend(children)
    return found


async def serve(answer) -> asyncio.Server:
    """A server that writes the same to whoever says anything."""

    class Canned(asyncio.Protocol):
        def connection_made(self, transport):
            self.transport = transport

        def data_received(self, data):
            self.transport.write(answer)

    return await asyncio.get_running_loop().create_server(Canned, "127.0.0.1", 0)


async def serve_engine() -> asyncio.Server:
    batch = Batch()
    return await asyncio.get_running_loop().create_server(lambda: Connection(batch), "127.0.0.1", 0)


def port_of(server: asyncio.Server) -> int:
    return server.sockets[0].getsockname()[1]


async def test_the_load_counts_each_right_answer_of_the_engine():
    async with await serve_engine() as engine:
        answers = await ask_repeatedly(port_of(engine), connections=3, seconds=0.1)
    assert answers.count == len(answers.took_s) >= 3
    assert min(answers.took_s) > 0


async def test_a_load_at_a_rate_asks_no_more_than_that():
    async with await serve_engine() as engine:
        answers = await ask_repeatedly(port_of(engine), connections=2, seconds=0.2, rate=100.0)
    # Each connection begins with a request; the places of the schedule follow.
    assert 2 < answers.count <= 2 + 20


async def test_every_stream_brings_its_events_whole():
    async with await serve_engine() as engine:
        answers = await stream_at_once(port_of(engine), streams=4, events=7, seconds=0.1)
    assert answers.count == 4 * 7


async def test_turns_go_round_the_ports_and_each_has_its_own_answers():
    async with await serve_engine() as first, await serve_engine() as second:
        answers = await ask_in_turns([port_of(first), port_of(second)], seconds=0.05)
    counts = [each.count for each in answers]
    assert min(counts) >= TURN_REQUESTS
    assert 0 <= counts[0] - counts[1] <= TURN_REQUESTS


@pytest.mark.parametrize("large_bodies", [False, True])
async def test_the_events_of_each_stream_are_timed(large_bodies):
    async with await serve_engine() as engine:
        gaps_s = await time_events(port_of(engine), seconds=0.1, large_bodies=large_bodies)
    # Events that come together count once.
    assert 0 < len(gaps_s) <= TIMED_STREAMS * round(0.1 / STEP_S)
    assert min(gaps_s) >= 0.0


async def test_a_stream_that_ends_early_is_not_timed():
    async with await serve(b"HTTP/1.1 200 OK\r\n\r\ndata: {}\n\n0\r\n\r\n") as server:
        with pytest.raises(WrongAnswer, match="not 20"):
            await time_events(port_of(server), seconds=0.1, large_bodies=False)


async def test_idle_streams_stay_open_and_their_memory_is_that_of_the_router():
    async with await serve_engine() as engine:
        process = SimpleNamespace(pid=os.getpid())
        grown = await grow_idle([GatewayProcess(name="other", port=port_of(engine), process=process)], 2)
    assert [set(row.bytes_each) for row in grown] == [{"other"}, {"other"}]
    assert all(row.bytes_each["other"] >= 1.0 for row in grown)


def test_private_memory_grows_with_what_a_process_writes():
    before = private_bytes(os.getpid())
    kept = bytearray(b"x" * (32 << 20))
    assert private_bytes(os.getpid()) - before > len(kept) // 2


@pytest.mark.parametrize(
    ("answer", "seen"),
    [
        (ANSWER.replace(b"200 OK", b"503 Service Unavailable"), "status 503"),
        (ANSWER.replace(b"A token", b"B token"), "B token"),
        (b"this is not HTTP\r\n\r\n", "not HTTP"),
    ],
)
async def test_a_wrong_answer_ends_the_measurement(answer, seen):
    async with await serve(answer) as server:
        with pytest.raises(WrongAnswer, match=seen):
            await ask_repeatedly(port_of(server), connections=1, seconds=0.1)


async def test_a_stream_that_lacks_an_event_is_no_measurement():
    event = b"data: {}\n\n"
    body = event + b"data: [DONE]\n\n"
    head = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body)
    async with await serve(head + body) as server:
        with pytest.raises(WrongAnswer, match="1 of 2 events"):
            await stream_at_once(port_of(server), streams=1, events=2, seconds=0.1)


def test_the_ratio_is_the_median_of_the_pairs_and_always_the_same():
    ratio = estimate_ratio(pairs(1.5, 2.0, 40.0))
    assert ratio.value == pytest.approx(2.0)
    assert 1.5 - 1e-9 <= ratio.low <= ratio.value <= ratio.high <= 40.0 + 1e-9
    assert estimate_ratio(pairs(1.5, 2.0, 40.0)) == ratio


@pytest.mark.parametrize(
    ("measurement", "ratios", "says"),
    [
        (Measurement.REQUESTS, (2.1, 2.2, 2.3), "ours is better; the goal of 2 is reached"),
        (Measurement.REQUESTS, (1.1, 1.2, 1.3), "ours is better; the goal of 2 is not reached"),
        (Measurement.REQUESTS, (0.7, 0.8, 0.9), "vllm-router is better; the goal of 2 is not reached"),
        (Measurement.LATENCY, (0.4, 0.45, 0.5), "ours is better; the goal of 0.5 is reached"),
        (Measurement.LATENCY, (1.4, 1.45, 1.5), "vllm-router is better; the goal of 0.5 is not reached"),
        (Measurement.EVENTS, (0.9, 1.0, 1.2), "no difference shown: the interval covers 1"),
    ],
)
def test_a_line_says_which_is_better_whether_that_is_certain_and_whether_the_goal_is_reached(measurement, ratios, says):
    assert says in describe(compared(measurement, *ratios))


def test_the_table_shows_medians_ratio_interval_goal_versions_and_sample_sizes():
    rows = [compared(Measurement.REQUESTS, 1.9, 2.0, 2.1)]
    console = Console(width=120, record=True, file=open(os.devnull, "w"))  # noqa: SIM115 - closed with the console
    with console.file:
        console.print(render_comparison(rows, read_machine("9.9.9", "random")))
    text = " ".join(console.export_text().split())
    for part in (
        "200 100 2.00 [1.90, 2.10] 2",
        "Medians of 3",
        "vllm-router 9.9.9",
        "policy random",
        "uvloop",
        "Python",
    ):
        assert part in text


@pytest.mark.parametrize(("load", "lines"), [(0.2, 0), (5.0, 1)])
def test_a_busy_machine_is_reported(load, lines):
    assert len(warn_if_busy({"load_average": load, "cores": 2})) == lines


def test_the_routers_have_a_core_that_nothing_else_runs_on_where_there_are_two():
    assert not share_cores([0, 1, 2]).router & share_cores([0, 1, 2]).rest
    assert share_cores([5]).router == share_cores([5]).rest == {5}


def test_the_clock_of_a_router_is_that_of_its_cpu_time_and_of_all_its_threads():
    busy = "import threading, time\nt = [threading.Thread(target=lambda: sum(range(10**7))) for _ in range(2)]\n"
    script = busy + "[x.start() for x in t]; [x.join() for x in t]; print(time.process_time(), flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        own_s = float(process.stdout.readline())
        seen_s = GatewayProcess(name="busy", port=0, process=process).cpu_s()
        process.communicate(b"\n")
    assert own_s <= seen_s < own_s + 0.5


def test_both_routers_are_measured_end_to_end_and_everything_ends(stand_in, tmp_path):
    lines = []
    before = in_group_of(os.getpid())
    with running(stand_in, tmp_path) as testbed:
        found = compare(testbed, pairs=2, seconds=0.5, progress=lines.append)
        started = in_group_of(os.getpid()) - before
        document = json.loads(json.dumps(build_document(found, read_machine("0", "random"), 0.5)))
    assert [row["name"] for row in document["measurements"]] == [
        *("requests", "latency", "events"),
        *("idle", "gaps", "large_gaps"),
    ]
    assert all(pair["ours"] > 0 and pair["theirs"] > 0 for row in document["measurements"] for pair in row["pairs"])
    assert all(math.isfinite(row.ratio.high) for row in found)
    assert len(lines) == 2 * 5 + 1
    # Both are our gateway here, which has a process of its own for large bodies.
    assert len(started) == processes.ENGINES + 4
    assert not started & in_group_of(os.getpid())


@pytest.mark.parametrize("kind", RelayKind)
def test_a_relay_passes_on_what_the_engines_write(kind, tmp_path):
    cores = share_cores(sorted(os.sched_getaffinity(0)))
    with (
        processes._engine(cores.rest) as first,
        processes._engine(cores.rest) as second,
        processes._relay(kind, [first, second], cores.router, tmp_path) as relay,
    ):
        # Whoever gets anything else raises `WrongAnswer`.
        answers = asyncio.run(ask_repeatedly(relay.port, connections=3, seconds=0.1))
        streamed = asyncio.run(stream_at_once(relay.port, streams=4, events=7, seconds=0.1))
        large = ask_repeatedly(relay.port, connections=1, seconds=0.1, request=build_large_request())
        assert min(answers.count, asyncio.run(large).count) > 0
        assert streamed.count == 4 * 7


def test_the_floor_shows_each_proxy_beside_vllm_router():
    rounds = [{"relay, unread": 300.0, "moeserving": 100.0 * part, "vllm-router": 100.0} for part in (0.9, 1.0, 1.1)]
    rows = [FloorRow(measurement=Measurement.REQUESTS, rounds=tuple(rounds))]
    console = Console(width=160, record=True, file=open(os.devnull, "w"))  # noqa: SIM115 - closed with the console
    with console.file:
        console.print(render_floor(rows, read_machine("9.9.9", "round_robin")))
    text = " ".join(console.export_text().split())
    for part in (
        "relay, unread 300 3.00 [3.00, 3.00]",
        "moeserving 100 1.00 [0.90, 1.10]",
        "Medians of 3 rounds",
        "9.9.9",
    ):
        assert part in text


def test_the_signal_that_ends_the_command_ends_what_it_started(stand_in):
    command = [*COMMAND, "--vllm-router", str(stand_in)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert "are up" in process.stdout.readline()
        started = in_group_of(process.pid)
        process.terminate()
        process.communicate(timeout=30)
    assert len(started) == processes.ENGINES + 2
    until_s = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in started) and time.monotonic() < until_s:
        time.sleep(0.05)
    assert not [pid for pid in started if Path(f"/proc/{pid}").exists()]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--vllm-router", "nowhere"], "--vllm-router: no such file: nowhere; `make bench-gateway` installs it"),
        (["--vllm-router", "/dev/null/x"], "--vllm-router: no such file"),
        (["--vllm-router", sys.executable, "--policy", "best"], "--policy: unknown 'best'; known: cache_aware"),
    ],
)
def test_wrong_input_is_one_line_that_names_what_is_wrong(arguments, line):
    ended = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr.startswith(line)
    assert ended.stderr.count("\n") == 1


def test_a_program_that_is_no_router_is_reported_with_its_last_words(tmp_path):
    program = tmp_path / "vllm-router"
    program.write_text("#!/bin/sh\necho I am something else >&2\nexit 3\n")
    program.chmod(0o755)
    ended = subprocess.run([*COMMAND, "--vllm-router", str(program)], capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "vllm-router does not serve" in ended.stderr
    assert "I am something else" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_the_mock_engine_has_what_the_gateway_scrapes():
    from moe_gateway.engines.signals import read_metrics
    from moe_lab.gateway.engine import PAGES

    assert [rank for rank, _ in read_metrics(PAGES[b"/metrics"].partition(b"\r\n\r\n")[2].decode())] == [0]
    models = orjson.loads(PAGES[b"/v1/models"].partition(b"\r\n\r\n")[2])
    assert models["data"][0]["id"] == "mock"
