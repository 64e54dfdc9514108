"""Completion in a real bash and for kubectl, and the manifest with which krew installs the plugin."""

import hashlib
import os
import re
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import moe_operator
import psutil
import pytest
import yaml
from moe_operator.krew_manifest import LAUNCHER

SCRIPTS = Path(sys.executable).parent


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A state folder in which two deployments run."""
    for name in ("chat", "code"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.json").write_text("{}")
    return tmp_path


def complete(*words: str, **environment: str) -> list[str]:
    command = [SCRIPTS / "kubectl_complete-moeserving", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | environment)
    assert done.stderr == ""
    *found, directive = done.stdout.split("\n")[:-1]
    assert directive == ":0"
    return found


def test_kubectl_gets_commands_options_and_names(state: Path) -> None:
    assert {"doctor", "down", "drain"} <= set(complete("d"))
    assert {"--namespace", "--undo", "--force"} <= set(complete("drain", "--"))
    assert complete("experts", "roll") == ["rollback"]
    assert complete("top", "--output", "j") == ["json"]
    assert complete("top", "--state-dir", str(state), "c") == ["chat", "code"]
    assert complete("top", "--state-dir", str(state), "ch") == ["chat"]


def test_names_of_a_cluster_are_those_that_kubectl_lists(tmp_path: Path) -> None:
    script = tmp_path / "kubectl"
    script.write_text('#!/bin/sh\n[ "$2" = models ] && echo moeserving.moeserving.dev/olmoe || exit 1\n')
    script.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    assert complete("top", "-n", "models", "", PATH=path) == ["olmoe"]
    assert complete("top", "-n", "other", "", PATH=path) == []


def test_a_cluster_that_gives_no_answer_completes_nothing(tmp_path: Path) -> None:
    """Its kubectl waits, and so does the program with which it logs in, which holds the output open."""
    script = tmp_path / "kubectl"
    script.write_text(f'#!/bin/sh\nsleep 3600 & echo $! > "{tmp_path}/login"\nsleep 3600\n')
    script.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    try:
        assert complete("top", "-n", "models", "", PATH=path) == []
    finally:
        login = int((tmp_path / "login").read_text())
        gone = not psutil.pid_exists(login) or psutil.Process(login).status() == psutil.STATUS_ZOMBIE
        if not gone:
            os.kill(login, signal.SIGKILL)
    assert gone


def test_a_folder_that_cannot_be_read_completes_nothing() -> None:
    assert complete("top", "--state-dir", "x" * 300, "") == []


def test_bash_completes_the_command_by_the_printed_script(state: Path) -> None:
    text = (
        f"PATH={SCRIPTS}:$PATH; source <(moeserving completion bash)\n"
        f"COMP_WORDS=(moeserving top --state-dir {state} cha); COMP_CWORD=4\n"
        '$(complete -p moeserving | sed "s/.*-F \\([^ ]*\\) .*/\\1/") moeserving; echo "${COMPREPLY[@]}"\n'
    )
    text = text.replace("$(complete", "eval $(complete", 1)
    done = subprocess.run(["bash", "--norc", "-c", text], capture_output=True, text=True, check=True)
    assert (done.stdout.strip(), done.stderr) == ("chat", "")


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_the_other_shells_have_scripts_too(shell: str) -> None:
    command = [SCRIPTS / "moeserving", "completion", shell]
    assert "_MOESERVING_COMPLETE" in subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_krew_unpacks_the_wheel_and_links_its_launcher(tmp_path: Path) -> None:
    """Its rules for a manifest, and its way to install: unpack, then link `bin`; `make test-krew` asks krew itself."""
    root = Path(moe_operator.__file__).parent.parent
    wheel = tmp_path / "moeserving-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path in root.glob("moe_operator/**/*"):
            if path.suffix in (".py", ".sh", ".json"):
                archive.write(path, path.relative_to(root))
    uri = f"https://example.org/{wheel.name}"
    command = [sys.executable, "-m", "moe_operator.krew_manifest", wheel, "--uri", uri]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    manifest = yaml.safe_load(printed)
    spec, name = manifest["spec"], manifest["metadata"]["name"]
    assert (manifest["apiVersion"], manifest["kind"]) == ("krew.googlecontainertools.github.com/v1alpha2", "Plugin")
    assert re.fullmatch(r"[\w-]+", name)
    assert re.fullmatch(r"v\d+\.\d+\.\d+(-[\w.]+)?", spec["version"])
    assert "\n" not in spec["shortDescription"]
    assert len(spec["shortDescription"]) <= 50
    assert len({tuple(row["selector"]["matchLabels"].items()) for row in spec["platforms"]}) == 4
    for row in spec["platforms"]:
        assert (row["uri"], row["bin"]) == (uri, LAUNCHER)
        assert row["sha256"] == hashlib.sha256(wheel.read_bytes()).hexdigest()
    store = tmp_path / "store"
    with zipfile.ZipFile(wheel) as archive:
        for each in archive.infolist():
            archive.extract(each, store)
            (store / each.filename).chmod(each.external_attr >> 16)
    linked = tmp_path / f"kubectl-{name}"
    linked.symlink_to(store / LAUNCHER)
    environment = os.environ | {"MOESERVING_PYTHON": sys.executable, "PYTHONSAFEPATH": "1"}
    done = subprocess.run([linked, "top", "--help"], capture_output=True, text=True, check=True, env=environment)
    assert "Usage: moeserving top" in done.stdout
