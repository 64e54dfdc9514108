"""The Dockerfiles, as far as they can be checked where nothing can be pulled."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from moe_agent.vllm.version import SUPPORTED
from moe_operator.plan.pods import Defaults

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILES = sorted(ROOT.glob("images/*/Dockerfile"))
INSTALL = ROOT / "images/install.sh"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def instructions(path):
    """(name, words) of each instruction, lines joined."""
    text = re.sub(r"\\\n\s*", "", path.read_text())
    for line in text.splitlines():
        if line and not line.startswith("#"):
            name, words = line.split(None, 1)
            yield name, words


def context():
    """Top names that .dockerignore lets in."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    return {line.removeprefix("!") for line in lines if line.startswith("!")}


def test_there_is_one_for_each_default_image():
    known = Defaults()
    built = {re.search(r"--tag (\S+)", path.read_text())[1] for path in DOCKERFILES}
    assert built == {known.engine_image, known.engine_cpu_image, known.gateway_image}


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.parent.name)
def test_each_installs_by_the_script_that_is_tested(path):
    runs = [words for name, words in instructions(path) if name == "RUN" and "install.sh" in words]
    assert runs
    for words in runs:
        extras = words.split("install.sh")[1].split("&&")[0].split()
        assert extras
        assert set(extras) <= set(PROJECT["optional-dependencies"])


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.parent.name)
def test_what_is_copied_exists(path):
    stages = {words.split(" AS ")[1] for name, words in instructions(path) if name == "FROM" and " AS " in words}
    for name, words in instructions(path):
        if name == "COPY":
            *sources, _ = words.split()
            if sources[0].startswith("--from="):
                assert sources[0].removeprefix("--from=") in stages
            else:
                assert all((ROOT / source).exists() for source in sources)


def test_the_context_has_all_that_the_wheel_is_built_from():
    included = {entry.split("/")[0] for entry in PROJECT["license-files"]} | {PROJECT["readme"]}
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    included |= {entry.split("/")[0] for entry in packages["packages"]}
    included |= {"pyproject.toml", "constraints.txt", "overrides.txt", "images"}
    assert included <= context()
    assert all((ROOT / name).exists() for name in context())
    assert not {name for name in context() if name.startswith(".")}


def test_the_operators_image_has_a_user_that_is_not_root_and_pods_name_none():
    import yaml

    values = yaml.safe_load((ROOT / "charts/moeserving/values.yaml").read_text())
    path = ROOT / "images/operator/Dockerfile"
    (user,) = [words for name, words in instructions(path) if name == "USER"]
    assert user == "65532:65532", "kubelet takes a number alone for a user that is not root"
    security = values["podSecurityContext"]
    assert security["runAsNonRoot"] is True
    assert not {"runAsUser", "runAsGroup", "fsGroup"} & security.keys(), "OpenShift assigns them"


def test_the_engines_base_is_the_version_of_vllm_that_is_supported():
    (base,) = [words for name, words in instructions(ROOT / "images/engine/Dockerfile") if name == "FROM"]
    version = re.fullmatch(r"vllm/vllm-openai:v(\d+\.\d+)\.\d+", base)[1]
    assert version in SUPPORTED
    first, last = ([int(part) for part in each.split(".")] for each in (SUPPORTED[0], SUPPORTED[-1]))
    after = f"{last[0]}.{last[1] + 1}"
    assert PROJECT["optional-dependencies"]["gpu"] == [f"vllm>={first[0]}.{first[1]},<{after}"]


def test_the_script_is_one_that_a_shell_can_read():
    subprocess.run(["sh", "-n", INSTALL], check=True)
