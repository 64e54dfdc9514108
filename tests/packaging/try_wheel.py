"""Installs a wheel with each of its extras into a clean environment of each Python, and runs its commands there.

`python tests/packaging/try_wheel.py WHEEL PYTHON...`; run by `make test-wheel`. Needs a package index. Extras with a
vLLM take gigabytes: for these it is found out whether all their packages exist for that Python, and none is installed.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
UV = Path(sys.executable).with_name("uv")
# Each command and the words that its output has; None: it names the extra that is missing, in one line.
COMMANDS: dict[str, tuple[tuple[str, str], ...]] = {
    "": (
        ("--version", "moeserving "),
        ("--help", "validate"),
        ("validate -f {root}/manifests/minimal.yaml", "valid"),
        ("up --help", "'moeserving[operator]'"),
        ("gateway --help", "'moeserving[gateway]'"),
        ("agent --help", "'moeserving[agent]'"),
    ),
    "gateway": (("gateway --help", "--engine"),),
    "epp": (("epp --help", "--engine"),),
    "operator": (
        ("validate -f {root}/manifests/minimal.yaml", "valid"),
        ("plan -f {root}/manifests/qwen3-30b-a3b.yaml", "kind: Deployment"),
        ("crd", "CustomResourceDefinition"),
        ("doctor --help", "--local"),
        ("up --help", "--detach"),
    ),
    "agent": (("agent --help", "--config"),),
    "bench": (("replay --help", "--api-key-file"), ("simulate --help", "--json")),
}
RESOLVED = ("gpu", "cpu", "transfer", "docs", "release")
# Part of the wheel that no module is.
DATA = (
    "moe_gateway/live_page/assets/index.html",
    "moe_operator/api/pod_schema.json",
    "moe_operator/doctor/vllm_options.json",
)


class Fault(Exception):
    """A step that went otherwise than it should; the message is for the person who made the wheel."""


def main() -> None:
    """Tries each Python; ends with status 1 and a line for each fault."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("pythons", nargs="+")
    parser.add_argument("--extras", nargs="*", default=[*COMMANDS, *RESOLVED], help="which extras; `` is none")
    options = parser.parse_args()
    faults = []
    for name in options.pythons:
        for extra in options.extras:
            began = time.monotonic()
            try:
                try_extra(options.wheel.resolve(), find_python(name), extra)
                print(f"{name} [{extra}]: ok, {time.monotonic() - began:.0f} s", flush=True)
            except Fault as fault:
                faults.append(f"{name} [{extra}]: {fault}")
                print(faults[-1], flush=True)
    sys.exit(1 if faults else 0)


def find_python(name: str) -> str:
    """Returns the path of an interpreter on PATH or of pyenv; raises `Fault` where there is none."""
    found = shutil.which(name)
    if found and subprocess.run([found, "-c", ""], capture_output=True, check=False).returncode == 0:
        return found
    minor = re.sub(r"^python", "", name)
    candidates = sorted(Path.home().glob(f".pyenv/versions/{minor}.*/bin/{name}"))
    if not candidates:
        raise Fault("no such Python on this machine; name others with PYTHONS=...")
    return str(candidates[-1])


def try_extra(wheel: Path, python: str, extra: str) -> None:
    """Raises `Fault` unless the wheel installs with the extra and its commands say what they should."""
    with tempfile.TemporaryDirectory() as folder:
        environment = Path(folder) / "environment"
        run([str(UV), "venv", "-q", "--python", python, str(environment)])
        install(wheel, environment, extra)
        for name in DATA if extra == "" else ():
            if not list(environment.glob(f"lib/python*/site-packages/{name}")):
                raise Fault(f"the wheel has no {name}")
        for command, expected in COMMANDS.get(extra, ()):
            words = command.format(root=ROOT).split()
            for program in programs(environment):
                check_output([program, *words], expected, may_fail="'moeserving[" in expected)


def install(wheel: Path, environment: Path, extra: str) -> None:
    """Installs it, or finds out that it could be."""
    options = ["--dry-run"] if extra in RESOLVED else []
    if extra == "cpu":
        options += ["--override", str(ROOT / "overrides.txt")]
    target = f"{wheel}[{extra}]" if extra else str(wheel)
    run([str(UV), "pip", "install", "-q", "--python", str(environment / "bin/python"), *options, target])


def programs(environment: Path) -> Iterator[str]:
    """The command, and its other name as a plugin of kubectl."""
    yield str(environment / "bin/moeserving")
    yield str(environment / "bin/kubectl-moeserving")


def check_output(command: list[str], expected: str, *, may_fail: bool) -> None:
    """Raises `Fault` on a traceback, on a status other than 0 (unless it may fail), and without the words."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    said = done.stdout + done.stderr
    if "Traceback" in said or expected not in said or (done.returncode != 0 and not may_fail):
        raise Fault(f"{' '.join(command[1:])}: status {done.returncode}, no {expected!r} in: {said[-600:]}")


def run(command: list[str]) -> None:
    """Raises `Fault` with the program's own words where it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1800)
    if done.returncode != 0:
        raise Fault(f"{command[1]} {command[2]}: {done.stderr.strip()[-600:]}")


if __name__ == "__main__":
    main()
