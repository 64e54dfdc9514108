"""The chart as Helm renders it."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import cluster_binaries
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "charts/moeserving"


class Helm:
    """Helm's command with nothing of this machine's settings."""

    class Refused(Exception):
        """Helm ended with an error; the message is its own."""

    def __init__(self, home: Path) -> None:
        self._program = cluster_binaries.locate_all(("helm",))["helm"]
        self._environment = {"HOME": str(home), "PATH": "/usr/bin:/bin"}

    def run(self, *arguments: str | Path, values: dict | None = None) -> str:
        """Its output.

        Raises:
            Helm.Refused: it failed.
        """
        words = [str(self._program), *map(str, arguments)]
        if values is not None:
            words += ["--values", "-"]
        done = subprocess.run(
            words, input=json.dumps(values), capture_output=True, text=True, check=False, env=self._environment
        )
        if done.returncode:
            raise Helm.Refused(done.stderr)
        return done.stdout

    def render(self, values: dict | None = None, *, namespace: str = "moeserving-system") -> list[dict]:
        """The objects of a release `moeserving`."""
        text = self.run("template", "moeserving", CHART, "--namespace", namespace, values=values or {})
        return [document for document in yaml.safe_load_all(text) if document]


@pytest.fixture(scope="session")
def helm(tmp_path_factory) -> Helm:
    return Helm(tmp_path_factory.mktemp("helm"))


@pytest.fixture(scope="session")
def render(helm: Helm) -> Callable[..., list[dict]]:
    return helm.render


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whichever test comes first pays for building Helm where nothing is cached."""
    for item in items:
        if {"helm", "render"} & set(getattr(item, "fixturenames", ())) and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(1800.0))
