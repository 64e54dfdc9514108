"""The process `python -m moe_gateway`: its configuration file, its signals, its logs."""

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator, Callable
from typing import Any

import aiohttp
import pytest
from moe_gateway.cli import app
from typer.testing import CliRunner

from tests.gateway.clients import Client
from tests.gateway.messages import SSE_END, SSE_HEAD, event, post, prompt
from tests.gateway.peers import answer_ok
from tests.gateway.waiting import free_port, until


@pytest.fixture
async def clients() -> AsyncIterator[list[Client]]:
    """Connections of a test, closed after it."""
    connected: list[Client] = []
    yield connected
    for client in connected:
        client.writer.close()


@pytest.fixture
async def launch(tmp_path, clients) -> AsyncIterator[Callable[..., Any]]:
    """Starts the process with this document, or this text, as its configuration."""
    processes = []

    async def start(document: Any, *options: str, token: str | None = "secret\n") -> asyncio.subprocess.Process:
        path, token_path = tmp_path / f"gateway-{len(processes)}.json", tmp_path / "token"
        if token is not None:
            token_path.write_text(token)
        if isinstance(document, dict):
            document = json.dumps({"token_file": str(token_path)} | document).encode()
        if document is not None:
            path.write_bytes(document)
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "moe_gateway", "--config", str(path), *options),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        if process.returncode is None:
            process.kill()
        await process.communicate()


def ports() -> dict[str, Any]:
    return {"listen": {"port": free_port()}, "admin": {"port": free_port()}}


async def connect(clients: list[Client], port: int) -> Client:
    while True:
        try:
            clients.append(Client(*await asyncio.open_connection("127.0.0.1", port)))
            return clients[-1]
        except ConnectionRefusedError:
            await asyncio.sleep(0.02)


async def ready(clients: list[Client], port: int) -> Client:
    """A connection to a gateway that serves."""
    client = await connect(clients, port)
    while True:
        client.send(b"GET /health HTTP/1.1\r\n\r\n")
        if (await client.answer()).status == 200:
            return client
        await asyncio.sleep(0.02)


async def readiness(config: dict[str, Any]) -> int:
    url = f"http://127.0.0.1:{config['admin']['port']}/readyz"
    async with aiohttp.ClientSession() as session, session.get(url) as answer:
        return answer.status


@pytest.mark.parametrize(
    ("document", "line"),
    [
        (None, "file: cannot read"),
        (b"", "not JSON"),
        (b"\x00\xff\x00", "not JSON"),
        (b"[1]", "a JSON object is needed"),
        ({}, "admin: required, but absent"),
        ({"listen": {"port": 0}, "admin": {"port": 9}}, "listen.port: "),
        ({"listen": {"port": 9, "hots": 1}, "admin": {"port": 9}}, "listen.hots: unknown field; nearest known: host"),
        ({"listen": {"port": 9}, "admin": {"port": 9}, "token_file": "/no/such"}, "token_file: cannot read /no/such"),
        ({"listen": {"port": 9}, "admin": {"port": 9}, "token_file": "a\u0000b"}, "token_file: "),
        ({"listen": {"port": 9}, "admin": {"port": 9}, "dispatch": {"policy": "x"}}, "dispatch.policy: unknown 'x'"),
    ],
)
def test_a_bad_configuration_is_one_line_of_error(tmp_path, document, line):
    path, token_path = tmp_path / "gateway.json", tmp_path / "token"
    token_path.write_text("secret\n")
    if isinstance(document, dict):
        document = json.dumps({"token_file": str(token_path)} | document).encode()
    if document is not None:
        path.write_bytes(document)
    result = CliRunner().invoke(app, ["--config", str(path)])
    assert (result.exit_code, result.stdout) == (2, "")
    assert line in result.stderr
    assert len(result.stderr.splitlines()) <= 2


def test_an_empty_token_is_no_token(tmp_path):
    path, token_path = tmp_path / "gateway.json", tmp_path / "token"
    token_path.write_text(" \n")
    path.write_text(json.dumps(ports() | {"token_file": str(token_path)}))
    result = CliRunner().invoke(app, ["--config", str(path)])
    assert (result.exit_code, result.stderr) == (2, f"token_file: {token_path} is empty\n")


async def test_a_port_that_is_taken_is_one_line_of_error(launch, make_engine):
    engine = await make_engine()
    process = await launch(ports() | {"admin": {"port": engine.port}})
    _, errors = await process.communicate()
    assert process.returncode == 1
    assert "cannot listen" in errors.decode()
    assert len(errors.splitlines()) == 1


async def test_sigterm_ends_streams_whole_refuses_new_connections_and_then_the_process(launch, make_engine, clients):
    go_on = asyncio.Event()

    async def stream(_request, writer):
        writer.write(SSE_HEAD + event("a"))
        await go_on.wait()
        writer.write(event("b") + SSE_END)

    engine = await make_engine(stream)
    config = ports() | {"engines": [engine.address]}
    process = await launch(config, "--access-log")
    idle = await ready(clients, config["listen"]["port"])
    fresh = await connect(clients, config["listen"]["port"])
    busy = await connect(clients, config["listen"]["port"])
    busy.send(post(prompt(stream=True), extra=b"X-Request-Id: seen-1\r\n"))
    await busy.reader.readuntil(event("a"))
    assert await readiness(config) == 200
    process.send_signal(signal.SIGTERM)
    while await readiness(config) == 200:
        await asyncio.sleep(0.01)
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", config["listen"]["port"])
    # What was on its way to a connection that is open is answered, with the notice of its end.
    fresh.send(b"GET /v1/models HTTP/1.1\r\nhost: h\r\n\r\n")
    assert (answer := await fresh.answer()).status == 200
    assert answer.headers[b"connection"] == b"close"
    assert await fresh.ended()
    assert await idle.ended()
    assert process.returncode is None
    go_on.set()
    assert await busy.rest() == event("b") + SSE_END
    _, errors = await process.communicate()
    assert process.returncode == 0
    # The log has a line of JSON for the request.
    (row,) = [row for row in map(json.loads, errors.splitlines()) if row.get("request_id") == "seen-1"]
    assert (row["status"], row["route"], row["engine"], row["rank"]) == (200, "completions", engine.name, 0)
    assert 0 < row["ttft_s"] <= row["duration_s"]


async def test_a_gateway_that_is_replaced_under_load_fails_no_request(launch, make_engine, clients):
    """Clients keep their connections, as those of a Service do whose pod is about to end."""

    async def answer(request, writer):
        await asyncio.sleep(0.02)
        await answer_ok(request, writer)

    engine = await make_engine(answer)
    configs = [ports() | {"engines": [engine.address]} for _ in range(2)]
    leaving, _ = [await launch(config) for config in configs]
    open_ports = [config["listen"]["port"] for config in configs]
    for port in open_ports:
        await ready(clients, port)
    end, statuses, closed = asyncio.Event(), [], []

    async def ask_and_ask(number: int) -> None:
        client = None
        while not end.is_set():
            if client is None or client.reader.at_eof():
                client = await connect(clients, open_ports[number % len(open_ports)])
            client.send(post(prompt()))
            answer = await client.answer()
            statuses.append(answer.status)
            if answer.headers.get(b"connection") == b"close":
                closed.append(client)
                client = None
            await asyncio.sleep(0.05 * (number % 4))

    asking = asyncio.gather(*(ask_and_ask(number) for number in range(8)))
    await until(lambda: len(statuses) > 50)
    del open_ports[0]
    leaving.send_signal(signal.SIGTERM)
    assert await asyncio.wait_for(leaving.wait(), 20) == 0
    since = len(statuses)
    await until(lambda: len(statuses) > since + 50)
    end.set()
    await asyncio.wait_for(asking, 20)
    assert set(statuses) == {200}
    assert closed


async def test_a_second_signal_cuts_the_end_short(launch, make_engine, clients):
    async def endless(_request, writer):
        writer.write(SSE_HEAD + event("a"))
        await asyncio.Event().wait()

    engine = await make_engine(endless)
    config = ports() | {"engines": [engine.address]}
    process = await launch(config)
    client = await ready(clients, config["listen"]["port"])
    client.send(post(prompt(stream=True)))
    await client.reader.readuntil(event("a"))
    process.send_signal(signal.SIGTERM)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.shield(process.wait()), 0.2)
    process.send_signal(signal.SIGINT)
    assert await asyncio.wait_for(process.wait(), 20) == 0
    assert engine.requests[0].gone.is_set() or await asyncio.wait_for(engine.requests[0].gone.wait(), 1)
    # The client and the log say that it was the gateway, and not the client or the engine.
    assert b'"code":"gateway_ended"' in await client.rest()
    _, errors = await process.communicate()
    (row,) = [row for row in map(json.loads, errors.splitlines()) if row["message"] == "request"]
    assert (row["status"], row["reason"]) == (503, "the gateway was stopped by force")


async def test_what_came_while_the_gateway_was_suspended_is_read_before_times_are_up(launch, make_engine, clients):
    engine = await make_engine()
    config = ports() | {"engines": [engine.address], "limits": {"idle_timeout_s": 4.0}}
    process = await launch(config)
    client = await ready(clients, config["listen"]["port"])
    process.send_signal(signal.SIGSTOP)
    client.send(post(prompt()))
    await asyncio.sleep(5.0)
    process.send_signal(signal.SIGCONT)
    assert (await client.answer()).status == 200


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "--engine: name engines, or a file with --config"),
        (["--engine", "127.0.0.1:8001"], "--engine: an address such as http://127.0.0.1:8001 is needed"),
        (["--engine", "http://[1"], "--engine: an address such as http://127.0.0.1:8001 is needed"),
        (["--engine", "http://a:1/v1"], "--engine: an address such as http://127.0.0.1:8001 is needed"),
        (["--engine", "http://a:1", "--engine", "http://A:1"], "--engine: http://A:1 is given twice"),
        (["--config", "x.json", "--engine", "http://a:1"], "--engine: is in the file of --config"),
        (["--config", "x.json", "--port", "1"], "--port: is in the file of --config"),
    ],
)
def test_engines_that_are_named_wrongly_are_one_line_of_error(arguments, line):
    result = CliRunner().invoke(app, arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(line)
    assert len(result.stderr.splitlines()) == 1


async def all_accept(session: aiohttp.ClientSession, admin: str) -> bool:
    async with session.get(f"{admin}/v1/state") as answer:
        return all(row["accepting"] for row in (await answer.json())["engines"])


async def test_plain_engines_are_served_without_a_file_and_no_token_changes_settings(make_engine, clients):
    engines = [await make_engine(agent=False), await make_engine(agent=False)]
    port, admin_port = free_port(), free_port()
    named = [word for engine in engines for word in ("--engine", engine.url)]
    options = ["--port", str(port), "--admin-port", str(admin_port), *named]
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "moe_gateway", *options)
    try:
        client = await ready(clients, port)
        async with aiohttp.ClientSession() as session:
            admin = f"http://127.0.0.1:{admin_port}"
            while not await all_accept(session, admin):
                await asyncio.sleep(0.02)
            for number in range(8):
                client.send(post({"prompt": f"request {number}"}))
                assert (await client.answer()).status == 200
            assert all(engine.requests for engine in engines)
            async with session.put(f"{admin}/v1/config", json={}, headers={"Authorization": "Bearer None"}) as answer:
                assert answer.status == 401
    finally:
        process.terminate()
        await process.wait()
