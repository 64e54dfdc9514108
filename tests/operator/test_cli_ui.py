"""`moeserving ui`: the address of the live page, with its key, on one machine and in a cluster."""

import base64
import json
import sys
import webbrowser
from pathlib import Path

import pytest
from moe_contract.page_keys import PageKeys, derive_page_key
from moe_operator.cli import ui as ui_command
from moe_operator.cli.command import app
from typer.testing import CliRunner

TOKEN = "control-token"


@pytest.fixture
def kubectl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kubectl that knows a gateway's pod, forwards its port, and gives the Secret with the control tokens."""
    pods = {"items": [{"metadata": {"name": "gateway-0"}, "status": {"phase": "Running"}}]}
    secret = {"data": {"token": base64.b64encode(f"{TOKEN}\nold\n".encode()).decode()}}
    script = tmp_path / "kubectl"
    script.write_text(
        f"""#!{sys.executable}
import json, sys, time
if "secret" in sys.argv:
    print({json.dumps(secret)!r})
elif "get" in sys.argv:
    print({json.dumps(pods)!r})
else:
    print("Forwarding from 127.0.0.1:4321 -> 9000", flush=True)
    time.sleep(60)
"""
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")


def test_in_a_cluster_the_port_of_a_gateway_is_forwarded_until_the_end(kubectl, monkeypatch):
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", lambda address: not opened.append(address))
    monkeypatch.setattr(ui_command, "_wait_for_the_end", lambda: None)
    result = CliRunner().invoke(app, ["ui", "moe", "--namespace", "models"])
    address = f"http://127.0.0.1:4321/ui/#key={derive_page_key(TOKEN.encode())}"
    assert (result.exit_code, opened) == (0, [address])
    assert address in result.output


def test_without_a_browser_the_address_is_printed(kubectl, monkeypatch):
    monkeypatch.setattr(webbrowser, "open", lambda address: False)
    monkeypatch.setattr(ui_command, "_wait_for_the_end", lambda: None)
    result = CliRunner().invoke(app, ["ui", "moe", "--namespace", "models"])
    assert (result.exit_code, "no browser" in result.output) == (0, True)
    quiet = CliRunner().invoke(app, ["ui", "moe", "--namespace", "models", "--no-open"])
    assert (quiet.exit_code, "no browser" in quiet.output, "#key=" in quiet.output) == (0, False, True)


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
