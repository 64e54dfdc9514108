"""A release has one version everywhere, and its workflow runs targets that exist and names no package index."""

import re
import tomllib
from pathlib import Path

import yaml
from moe_agent.vllm.version import UnsupportedVersion
from moe_operator.cli.command import app
from moe_operator.cli.version import describe_versions
from moe_operator.plan import Defaults
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parents[2]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
WORKFLOW = ROOT / ".github/workflows/release.yaml"


def test_wheel_chart_and_images_have_one_version() -> None:
    chart = yaml.safe_load((ROOT / "charts/moeserving/Chart.yaml").read_text("utf-8"))
    known = Defaults()
    tags = {image.partition(":")[2] for image in (known.engine_image, known.engine_cpu_image, known.gateway_image)}
    assert {chart["version"], chart["appVersion"], *tags} == {VERSION}


def test_the_workflow_runs_targets_that_exist() -> None:
    workflow = yaml.safe_load(WORKFLOW.read_text("utf-8"))
    commands = "\n".join(step.get("run", "") for job in workflow["jobs"].values() for step in job["steps"])
    known = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    named = {target for line in re.findall(r"\bmake ([a-z -]+)", commands) for target in line.split()}
    assert {"wheel", "sbom", "chart", "test-wheel"} <= named <= known
    built = re.findall(r"--file (images/\S+)", commands)
    assert all((ROOT / path.split("$")[0]).is_dir() for path in built)
    assert built


def test_the_workflow_names_no_package_index() -> None:
    text = WORKFLOW.read_text("utf-8")
    assert not re.search(r"https?://|index-url|registry=|pypi|npmjs", text)


def test_the_version_names_that_of_vllm() -> None:
    done = CliRunner().invoke(app, ["--version"])
    assert (done.exit_code, done.output.splitlines()[0]) == (0, f"moeserving {VERSION}")


def test_the_version_says_where_vllm_is_missing_or_unsupported() -> None:
    def refuse() -> str:
        raise UnsupportedVersion("vLLM 0.1.0 is installed")

    assert describe_versions(lambda: "vLLM 0.32.0, on GPUs")[1] == "vLLM 0.32.0, on GPUs"
    assert describe_versions(refuse)[1] == "vLLM 0.1.0 is installed"
    assert describe_versions(None)[1] == "vLLM: the part that runs it is not installed"
