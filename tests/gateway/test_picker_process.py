"""The process `moeserving epp`: for engines by address without a file, with a file, and what it refuses."""

import asyncio
import json
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from moe_gateway.endpoint_picker.cli import app
from typer.testing import CliRunner

from tests.gateway.envoy import Envoy
from tests.gateway.messages import prompt
from tests.gateway.waiting import free_port

PATIENCE_S = 60.0
SCRIPT = "from moe_gateway.endpoint_picker.cli import app; app()"


@pytest.fixture
async def launch() -> AsyncIterator[Callable[..., Any]]:
    processes: list[asyncio.subprocess.Process] = []

    async def start(*options: str) -> asyncio.subprocess.Process:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", SCRIPT, *options), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def ready(admin_port: int) -> None:
    async with asyncio.timeout(PATIENCE_S), aiohttp.ClientSession() as session:
        while True:
            try:
                async with session.get(f"http://127.0.0.1:{admin_port}/readyz") as answer:
                    if answer.status == 200:
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.05)


async def ask_and_end(process: asyncio.subprocess.Process, port: int, admin_port: int, folder: Path) -> None:
    await ready(admin_port)
    envoy = Envoy(folder, port)
    await envoy.start()
    try:
        async with asyncio.timeout(PATIENCE_S), aiohttp.ClientSession() as session:
            async with session.post(envoy.url + "/v1/completions", json=prompt()) as answer:
                assert answer.status == 200
            async with session.get(f"http://127.0.0.1:{admin_port}/v1/state") as answer:
                assert (await answer.json())["totals"]["requests"] == 1
    finally:
        await envoy.stop()
    process.send_signal(signal.SIGTERM)
    async with asyncio.timeout(PATIENCE_S):
        _out, logged = await process.communicate()
    assert (process.returncode, b"Traceback" in logged) == (0, False), logged


async def test_engines_by_address_need_no_file(launch: Any, make_engine: Any, tmp_path: Path) -> None:
    engines = [await make_engine(agent=False) for _ in range(2)]
    port, admin_port = free_port(), free_port()
    named = [part for engine in engines for part in ("--engine", engine.url)]
    process = await launch(*named, "--port", str(port), "--admin-port", str(admin_port))
    await ask_and_end(process, port, admin_port, tmp_path)


async def test_a_gateways_file_serves_without_its_port_for_clients(
    launch: Any, make_engine: Any, tmp_path: Path
) -> None:
    port, admin_port, closed = free_port(), free_port(), free_port()
    path = tmp_path / "gateway.json"
    document = {
        "listen": {"port": closed},
        "admin": {"port": admin_port},
        "engines": [(await make_engine()).address],
        "endpoint_picker": {"listen": {"port": port}},
    }
    path.write_text(json.dumps(document))
    process = await launch("--config", str(path))
    await ready(admin_port)
    with pytest.raises(OSError, match=r"."):
        await asyncio.open_connection("127.0.0.1", closed)
    await ask_and_end(process, port, admin_port, tmp_path)


def test_a_port_that_is_taken_is_a_plain_error() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        ports = ("--port", str(taken.getsockname()[1]), "--admin-port", str(free_port()))
        command = [sys.executable, "-c", SCRIPT, "--engine", "http://127.0.0.1:9", *ports]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 1
    assert "the gateway cannot listen" in done.stderr
    assert "Traceback" not in done.stderr


def _run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, arguments)
    return result.exit_code, result.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--engine: name engines, or a file with --config"),
        (["--engine", "ftp://x"], "--engine: an address such as http://127.0.0.1:8001 is needed"),
        (["--engine", "http://engine:8000"], "engines[0].url: proxies of the endpoint picker take IP addresses"),
        (["--config", "x.json", "--tls"], "--tls: is in the file of --config"),
        (["--config", "absent.json"], "absent.json"),
    ],
)
def test_options_that_do_not_fit_are_named(options: list[str], message: str) -> None:
    code, said = _run(*options)
    assert code == 2
    assert message in said.replace("\n", "")


def test_a_file_without_the_section_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "gateway.json"
    path.write_text(json.dumps({"listen": {"port": 1}, "admin": {"port": 2}}))
    code, said = _run("--config", str(path))
    assert (code, "endpoint_picker: the section is missing" in said) == (2, True)


def test_without_grpc_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_gateway.endpoint_picker.start.MODULES", ("absent_package",))
    code, said = _run("--engine", "http://127.0.0.1:9")
    assert (code, "pip install 'moeserving[epp]'" in said.replace("\n", "")) == (2, True)
