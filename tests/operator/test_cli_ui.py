"""`moeserving ui`: the address of the live page, with its key, on one machine and in a cluster."""

import base64
import json
import re
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from fake_browser import make_browser
from local_place import COMMAND, TIMEOUT_S
from moe_contract.page_keys import PageKeys, derive_page_key
from moe_operator.cli.command import app
from typer.testing import CliRunner

TOKEN = "control-token"


@pytest.fixture
def kubectl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A kubectl that knows a gateway's pod, forwards its port, and gives the Secret with the control tokens.

    Of the folder that is returned, a file `status` has the status of the page, `lost` ends the way.
    """
    pods = {"items": [{"metadata": {"name": "gateway-0"}, "status": {"phase": "Running"}}]}
    secret = {"data": {"token": base64.b64encode(f"{TOKEN}\nold\n".encode()).decode()}}
    script = tmp_path / "kubectl"
    script.write_text(
        f"""#!{sys.executable}
import json, os, sys, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

FOLDER = Path({str(tmp_path)!r})

class Page(BaseHTTPRequestHandler):
    def do_GET(self):
        path = FOLDER / "status"
        self.send_response(int(path.read_text()) if path.exists() else 200)
        self.end_headers()

    def log_message(self, *_):
        pass

if "secret" in sys.argv:
    print({json.dumps(secret)!r})
elif "get" in sys.argv:
    print({json.dumps(pods)!r})
else:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(f"Forwarding from 127.0.0.1:{{server.server_port}} -> 9000", flush=True)
    # A command that is killed cannot end it.
    caller = os.getppid()
    while not (FOLDER / "lost").exists():
        if os.getppid() != caller:
            sys.exit()
        time.sleep(0.05)
    sys.exit("error: lost connection to pod")
"""
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    return tmp_path


@contextmanager
def opened(*arguments: str) -> Iterator["subprocess.Popen[str]"]:
    """`moeserving ui` on a deployment in a cluster."""
    command = [*COMMAND, "ui", "moe", "--namespace", "models", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def read_until(process: "subprocess.Popen[str]", words: str) -> list[str]:
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line.strip())
        if words in line:
            return lines
    raise AssertionError(lines)


def test_in_a_cluster_the_port_of_a_gateway_is_forwarded_until_the_end(kubectl, monkeypatch):
    browser = make_browser(kubectl, monkeypatch)
    with opened() as process:
        address, *_ = read_until(process, "open until Ctrl-C")
        given, text = browser.wait_opened()
        assert re.fullmatch(rf"http://127\.0\.0\.1:\d+/ui/#key={derive_page_key(TOKEN.encode())}", address)
        assert f'content="0;url={address}"' in text
        assert "\n-rw------- " in text
        file = Path(given.removeprefix("file://"))
        assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
        process.send_signal(signal.SIGTERM)
        assert process.wait(TIMEOUT_S) == 0
        assert not file.parent.exists()


def test_a_way_that_ends_by_itself_ends_the_command_with_its_message(kubectl):
    with opened("--no-open") as process:
        read_until(process, "open until Ctrl-C")
        (kubectl / "lost").touch()
        read_until(process, "kubectl: the way to the pod gateway-0 has ended: error: lost connection to pod")
        assert process.wait(TIMEOUT_S) == 1


@pytest.mark.parametrize(("status", "words"), [(404, "gateway.ui.enabled is false"), (503, "`make ui`")])
def test_a_gateway_without_a_page_is_named_in_place_of_an_address(kubectl, status, words):
    (kubectl / "status").write_text(str(status))
    result = CliRunner().invoke(app, ["ui", "moe", "--namespace", "models"])
    assert (result.exit_code, words in result.output, "#key=" in result.output) == (1, True, False)


def test_without_a_browser_the_address_is_printed(kubectl, monkeypatch):
    monkeypatch.delenv("BROWSER", raising=False)
    monkeypatch.setenv("PATH", str(kubectl))
    with opened() as process:
        assert "#key=" in read_until(process, "no browser was found")[0]


def test_a_deployment_that_is_not_known_is_named(tmp_path):
    result = CliRunner().invoke(app, ["ui", "moe", "--state-dir", str(tmp_path)])
    assert (result.exit_code, "moe" in result.output) == (2, True)


def test_any_token_of_a_rotated_file_derives_a_key_that_opens(tmp_path):
    path = tmp_path / "token"
    path.write_text("new\nold\n")
    keys = PageKeys(path)
    assert all(keys.allow(f"Bearer {derive_page_key(token)}") for token in (b"new", b"old"))
    assert not any(keys.allow(f"Bearer {text}") for text in ("new", "", derive_page_key(b"other"), "ö"))
    path.write_text("newer\n")
    assert not keys.allow(f"Bearer {derive_page_key(b'old')}")
    path.unlink()
    assert not keys.allow(f"Bearer {derive_page_key(b'newer')}")
