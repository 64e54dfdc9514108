"""The wheel: two builds of the same sources are equal byte by byte, and it has all that a user needs."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
PACKAGES = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
PAGE = "gateway/moe_gateway/live_page/assets/index.html"


def copy_sources(folder: Path, *, mode: int, is_reversed: bool) -> Path:
    """A copy of the sources as another machine would have them: other times, other modes, another order of files."""
    names = ["pyproject.toml", "README.md", "LICENSE"]
    for package in PACKAGES:
        names += [str(path.relative_to(ROOT)) for path in (ROOT / package).rglob("*") if is_source(path)]
    for name in sorted(set(names), reverse=is_reversed):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / name)
        (folder / name).chmod(mode)
    page = folder / PAGE
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("<!doctype html>")
    return folder


def is_source(path: Path) -> bool:
    return path.is_file() and "__pycache__" not in path.parts and path.suffix != ".so" and "assets" not in path.parts


def build(sources: Path, epoch: str) -> Path:
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", "dist"],
        cwd=sources,
        env=os.environ | {"SOURCE_DATE_EPOCH": epoch},
        check=True,
        capture_output=True,
    )
    (wheel,) = (sources / "dist").glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    one = copy_sources(tmp_path_factory.mktemp("one"), mode=0o644, is_reversed=False)
    other = copy_sources(tmp_path_factory.mktemp("other"), mode=0o600, is_reversed=True)
    return build(one, "1700000000"), build(other, "1700000000")


def test_two_builds_of_the_same_sources_are_equal(wheels: tuple[Path, Path]) -> None:
    one, other = wheels
    assert one.name == other.name == f"moeserving-{PROJECT['project']['version']}-py3-none-any.whl"
    assert one.read_bytes() == other.read_bytes()


def test_it_has_every_package_the_live_page_and_the_programs(wheels: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(wheels[0]) as archive:
        names = set(archive.namelist())
        (points,) = (name for name in names if name.endswith("entry_points.txt"))
        programs = archive.read(points).decode()
    assert {name.split("/")[0] for name in names} >= {Path(package).name for package in PACKAGES}
    assert "moe_gateway/live_page/assets/index.html" in names
    assert "moe_operator/api/pod_schema.json" in names
    assert "moeserving = " in programs
    assert "kubectl-moeserving = " in programs
    assert not [name for name in names if name.endswith((".so", ".pyc")) or "node_modules" in name]


def test_its_program_runs_from_an_installed_wheel(wheels: tuple[Path, Path], tmp_path: Path) -> None:
    """Its own files alone, with the packages of this environment; `make test-wheel` installs all in clean ones."""
    with zipfile.ZipFile(wheels[0]) as archive:
        archive.extractall(tmp_path)
    script = (
        "import sys, moe_operator, moe_gateway.live_page.routes as routes\n"
        "from moe_operator.cli import main\n"
        "assert moe_operator.__file__.startswith(sys.path[1]) and (routes.ASSETS / 'index.html').is_file()\n"
        "sys.argv[0] = 'moeserving'\n"
        "main()\n"
    )
    for words in (["--version"], ["crd"], ["validate", "-f", str(ROOT / "manifests/minimal.yaml")]):
        done = subprocess.run(
            [sys.executable, "-c", script, *words],
            env=os.environ | {"PYTHONPATH": str(tmp_path)},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
