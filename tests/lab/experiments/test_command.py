"""`python -m moe_lab.experiments` as a user calls it."""

from pathlib import Path

import pytest
from moe_lab.experiments import __main__ as laboratory
from typer.testing import CliRunner


def run_experiments(*arguments):
    return CliRunner().invoke(laboratory.app, [str(argument) for argument in arguments])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "rival"], "only: unknown 'rival'"),
        (["--workload", "round"], "workload: unknown 'round'"),
        (["--load", "0.33"], "only: these filters leave no run"),
    ],
)
def test_filters_of_the_experiments_are_checked(tmp_path, arguments, message):
    result = run_experiments("run", *arguments, "--raw", tmp_path / "runs.jsonl")
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_report_without_results_is_reported(tmp_path):
    result = run_experiments("report", "--raw", tmp_path / "runs.jsonl", "--out", tmp_path / "results")
    assert result.exit_code == 2
    assert "has no results" in result.stderr


def test_the_traces_folder_is_checked_before_anything_is_run(tmp_path):
    result = run_experiments(
        "run",
        "--workload",
        "azure",
        "--variant",
        "ours",
        "--raw",
        tmp_path / "runs.jsonl",
        "--traces",
        Path("/nowhere"),
    )
    assert result.exit_code == 2
    assert "azure_llm_2023_conv.csv" in result.stderr
