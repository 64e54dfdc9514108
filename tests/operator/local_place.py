"""A deployment through the command line, with fakes of agent and gateway as real processes."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moe_operator.local.record import Alive, find_process

COMMAND = [sys.executable, str(Path(__file__).with_name("moeserving_with_fakes.py"))]
TIMEOUT_S = 120.0


class Place:
    """A state folder with a resource to serve."""

    def __init__(self, folder: Path, replicas: int) -> None:
        self.state, self.file, self.started = folder / "state", folder / "a.yaml", []
        model = folder / "model"
        model.mkdir()
        (model / "config.json").write_text("{}")
        self.file.write_text(
            "apiVersion: moeserving.dev/v1alpha1\nkind: MoEServing\nmetadata: {name: a}\n"
            "spec:\n  model: {uri: file://model}\n  engine:\n    runtime: vllm-cpu\n    drainTimeout: 10s\n"
            f"    replicas: {replicas}\n    resources: {{kvCacheMemory: 1Mi}}\n"
        )

    def arguments(self, verb: str, *rest: str) -> list[str]:
        return [*COMMAND, verb, *rest, "--state-dir", str(self.state)]

    def run(self, verb: str, *rest: str, code: int = 0) -> str:
        result = subprocess.run(
            self.arguments(verb, *rest), capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
        said = result.stdout + result.stderr
        assert result.returncode == code, said
        assert "Traceback" not in said
        return said

    def up(self, *rest: str, code: int = 0) -> str:
        return self.run("up", "-f", str(self.file), "--detach", *rest, code=code)

    def status(self) -> dict[str, Any]:
        return json.loads(self.run("status", "--json"))

    def record(self, name: str = "a") -> dict[str, Any]:
        return json.loads((self.state / name / "state.json").read_text())

    def process(self, name: str) -> dict[str, Any]:
        return next(row for row in self.record()["processes"] if row["name"] == name)

    def kill(self) -> None:
        """Ends what a test that failed left."""
        for path in self.state.glob("*/state.json"):
            record = json.loads(path.read_text())
            for row in [record["supervisor"], *(row["process"] for row in record["processes"])]:
                if row is not None and lives(row):
                    os.kill(row["pid"], signal.SIGKILL)

    @contextmanager
    def foreground(self, *rest: str) -> Iterator["subprocess.Popen[str]"]:
        """`up` in the foreground, ready."""
        arguments = self.arguments("up", "-f", str(self.file), *rest)
        with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as command:
            try:
                assert command.stdout is not None
                assert any("ready at" in line for line in command.stdout), "it ended before it was ready"
                yield command
            finally:
                if command.poll() is None:
                    command.kill()


def lives(row: dict[str, Any]) -> bool:
    return find_process(Alive(**row)) is not None
