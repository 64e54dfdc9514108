"""Installs the plugin with a real krew from a wheel and its manifest, and runs it as kubectl would.

`python tests/packaging/try_krew.py KREW WHEEL`; run by `make test-krew`. Needs no network: krew takes the wheel as its
archive, in a folder of its own.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

NAME = "moeserving"


def main() -> None:
    """Ends with status 1 where a step goes otherwise than it should."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("krew", type=Path)
    parser.add_argument("wheel", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="krew-") as folder:
        root = Path(folder)
        manifest = root / f"{NAME}.yaml"
        command = [
            sys.executable,
            "-m",
            "moe_operator.krew_manifest",
            given.wheel,
            "--uri",
            "https://example.org/a.whl",
        ]
        manifest.write_text(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        environment = os.environ | {"KREW_ROOT": str(root / "krew"), "MOESERVING_PYTHON": sys.executable}
        run(
            [given.krew, "install", "--manifest", manifest, "--archive", given.wheel],
            environment,
            f"Installed plugin: {NAME}",
        )
        bin_folder = root / "krew" / "bin"
        launcher = bin_folder / f"kubectl-{NAME}"
        run([launcher, "top", "--help"], environment, f"Usage: {NAME} top")
        if shutil.which("kubectl") is None:
            print("kubectl is not installed: the plugin's own launcher was run alone")
            return
        path = f"{bin_folder}{os.pathsep}{environment['PATH']}"
        run(["kubectl", NAME, "top", "--help"], environment | {"PATH": path}, f"Usage: {NAME} top")


def run(command: list[str | Path], environment: dict[str, str], words: str) -> None:
    """Runs a command, whose output has to have these words."""
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment, stdin=subprocess.DEVNULL
    )
    said = done.stdout + done.stderr
    if done.returncode or words not in said:
        sys.exit(f"{' '.join(map(str, command))}: status {done.returncode}, no `{words}` in:\n{said}")
    print(f"{' '.join(map(str, command))}: {words}")


if __name__ == "__main__":
    main()
