"""`moeserving plan --advise`: what is handed over to the tools, and what is said where they are missing."""

import pytest
import typer
from moe_operator.cli import advice
from moe_operator.cli.command import app
from typer.testing import CliRunner

runner = CliRunner()
RESOURCE = """
apiVersion: moeserving.dev/v1alpha1
kind: MoEServing
metadata: {name: q}
spec: {model: {uri: "hf://Qwen/Qwen3-30B-A3B", name: q}, engine: {replicas: 2}}
"""


@pytest.fixture
def resource(tmp_path):
    path = tmp_path / "q.yaml"
    path.write_text(RESOURCE)
    return path


class Entry:
    """An entry point whose command keeps its arguments."""

    name = "bench"

    def __init__(self, status=0, missing=None):
        self.asked = []
        self.status = status
        self.missing = missing

    def load(self):
        if self.missing:
            raise ModuleNotFoundError(name=self.missing)
        tools = typer.Typer()

        @tools.command("other")
        def other():
            pass

        @tools.command("advise", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
        def advise(context: typer.Context):
            self.asked.append(context.args)
            raise typer.Exit(self.status)

        return tools


@pytest.fixture
def tools(monkeypatch):
    def install(*entries):
        monkeypatch.setattr(advice, "entry_points", lambda group: list(entries))

    return install


def test_the_options_that_are_given_are_handed_over(tools, resource):
    entry = Entry()
    tools(entry)
    done = runner.invoke(
        app,
        [
            "plan",
            "-f",
            str(resource),
            "--advise",
            "--rate",
            "4",
            "--answer-tokens",
            "9",
            "--format",
            "azure",
            "-o",
            "json",
        ],
    )
    assert done.exit_code == 0, done.output
    assert entry.asked == [
        ["-f", str(resource), "--format", "azure", "--rate", "4.0", "--answer-tokens", "9", "--output", "json"]
    ]


def test_the_status_of_the_advisor_is_the_commands(tools, resource):
    tools(Entry(status=2))
    assert runner.invoke(app, ["plan", "-f", str(resource), "--advise"]).exit_code == 2


def test_the_advisors_options_are_refused_without_it(resource):
    done = runner.invoke(app, ["plan", "-f", str(resource), "--trace", "x", "--rate", "3"])
    assert done.exit_code == 2
    assert done.output.splitlines() == ["--trace: is only with --advise", "--rate: is only with --advise"]


@pytest.mark.parametrize("entries", [[], [Entry(missing="moe_tools")]])
def test_a_missing_package_is_named_with_its_extra(tools, resource, entries):
    tools(*entries)
    done = runner.invoke(app, ["plan", "-f", str(resource), "--advise"])
    assert done.exit_code == 1
    assert "pip install 'moeserving[bench]'" in done.output
    assert done.output.startswith("moeserving plan --advise: ")
