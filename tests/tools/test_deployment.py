"""Deployments that a tool starts: up before, down after, whatever happens between."""

import signal
from pathlib import Path

import pytest
from moe_contract.input_errors import InvalidInput
from moe_tools import deployment
from moe_tools.cli import app
from moe_tools.progress_printer import ProgressPrinter
from typer.testing import CliRunner


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "checkout"
    (folder / "manifests").mkdir(parents=True)
    (folder / deployment.SAMPLE).write_text("metadata:\n  name: tiny\n")
    monkeypatch.chdir(folder)
    return folder


def test_a_deployment_that_could_not_start_is_taken_down(scripted_command, checkout):
    (scripted_command.parent / "refuse").touch()
    done = CliRunner().invoke(app, ["demo", "-f", str(checkout / deployment.SAMPLE)])
    assert done.exit_code == 2
    assert "moeserving up failed" in done.stderr
    verbs = [line.split()[0] for line in scripted_command.read_text().splitlines()]
    assert verbs == ["up", "down"]


def test_a_signal_takes_the_deployment_down(scripted_command, checkout):
    plan = deployment.plan_deployment(None, "demo")
    with (
        pytest.raises(KeyboardInterrupt),
        deployment.stopped_by_signals(),
        deployment.served(plan, ProgressPrinter(), wait=no_wait),
    ):
        signal.raise_signal(signal.SIGTERM)
    assert [line.split()[0] for line in scripted_command.read_text().splitlines()] == ["up", "down"]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_its_state_is_in_the_checkout(scripted_command, checkout):
    plan = deployment.plan_deployment(None, "demo")
    with deployment.served(plan, ProgressPrinter(), wait=no_wait):
        pass
    up, down = scripted_command.read_text().splitlines()
    state = f"--state-dir {checkout}/.cache/demo"
    assert up == f"up -f {checkout / deployment.SAMPLE} --detach --port {plan.port} {state}"
    assert down == f"down tiny {state}"


@pytest.mark.parametrize("text", ["", "- a\n", "metadata: 3\n", "a: [", "metadata: {}\n"])
def test_a_manifest_without_a_name_is_refused(tmp_path, text):
    path = tmp_path / "m.yaml"
    path.write_text(text)
    with pytest.raises(InvalidInput, match="is not a resource with a metadata"):
        deployment.read_name(path)


async def test_a_server_that_never_answers_ends_the_wait():
    with pytest.raises(InvalidInput, match="cannot connect"):
        await deployment.wait_until_ready("http://127.0.0.1:9", timeout_s=0)


def no_wait(_url: str) -> None:
    return None
