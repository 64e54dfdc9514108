"""`kubectl moeserving`: the same program under the name by which kubectl finds it."""

import subprocess
import sys
from pathlib import Path

import pytest
from moe_operator.cli import PROGRAM, name_program

SCRIPTS = Path(sys.executable).parent


@pytest.mark.parametrize(("script", "name"), [("kubectl-moeserving", "kubectl moeserving"), (PROGRAM, PROGRAM)])
def test_the_help_has_the_name_that_the_user_types(script: str, name: str) -> None:
    done = subprocess.run([SCRIPTS / script, "doctor", "--help"], capture_output=True, text=True, check=True)
    assert done.stdout.strip().startswith(f"Usage: {name} doctor [OPTIONS]")
    assert "--namespace" in done.stdout


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/usr/local/bin/kubectl-moeserving", "kubectl moeserving"),
        ("kubectl-moeserving.exe", "kubectl moeserving"),
        ("/opt/kubectl-moeserving/bin/moeserving", "moeserving"),
        ("moeserving", "moeserving"),
        ("", "moeserving"),
    ],
)
def test_the_name_is_that_of_the_file_that_was_started(path: str, name: str) -> None:
    assert name_program(path) == name
