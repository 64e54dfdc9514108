"""What Debian gives to the node level and to the images: packages, and a root file system with Python.

No mirror is named here: apt knows it.
"""

import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from cluster_binaries import cache_folder, say
from cluster_problem import ClusterProblem
from filelock import FileLock

# Package and one of its files, absolute or found by PATH.
NODE_PACKAGES = {
    "containerd": "containerd",
    "runc": "runc",
    "iptables": "iptables",
    "conntrack": "conntrack",
    "containernetworking-plugins": "/usr/lib/cni/bridge",
    "iproute2": "ip",
    "gcc": "gcc",
    "libc6-dev": "libc.a",
}
IMAGE_PACKAGES = {"debootstrap": "debootstrap"}
ROOT_PACKAGES = ("python3", "python3-venv", "libgomp1", "libnuma1", "ca-certificates")
ADMIN_PATH = "/usr/local/sbin:/usr/sbin:/sbin"
SUITE = "bookworm"


def require(packages: Mapping[str, str]) -> None:
    """Installs missing packages where that is allowed, else names them in one line."""
    missing = [name for name, file in packages.items() if not is_there(file)]
    if not missing:
        return
    if os.geteuid() or not shutil.which("apt-get"):
        raise ClusterProblem(f"missing on this machine: apt-get install {' '.join(missing)}")
    say(f"installing {' '.join(missing)}")
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update", "-q"], ["install", "-qy", "--no-install-recommends", *missing]):
        done = subprocess.run(["apt-get", *command], env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ClusterProblem(f"apt-get {' '.join(command)} failed:\n{(done.stdout + done.stderr)[-2000:]}")


def is_there(file: str) -> bool:
    if file == "libc.a":
        return any(Path("/usr/lib").glob("*-linux-gnu/libc.a"))
    return shutil.which(file, path=f"{os.environ.get('PATH', '')}:{ADMIN_PATH}") is not None


def mirror() -> str:
    """Where apt fetches this suite's main packages from."""
    command = ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages", f"Codename: {SUITE}"]
    done = subprocess.run([*command, "Component: main"], capture_output=True, text=True, check=False)
    if not (found := done.stdout.split()):
        raise ClusterProblem(f"apt has no sources of Debian {SUITE}: add them and run apt-get update")
    return found[0]


def python_root() -> Path:
    """A root file system with Python, made once for this machine; not to be changed."""
    root = cache_folder() / "roots" / f"{SUITE}-{platform.machine()}-python"
    root.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(root.with_suffix(".lock")):
        if not root.exists():
            require(IMAGE_PACKAGES)
            say(f"making {root} with debootstrap (about a minute)")
            make_root(root)
    return root


def make_root(root: Path) -> None:
    include = ",".join(ROOT_PACKAGES)
    with tempfile.TemporaryDirectory(dir=root.parent, prefix=".making-") as folder:
        fresh = Path(folder, "root")
        command = ["debootstrap", "--variant=minbase", f"--include={include}", SUITE, str(fresh), mirror()]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ClusterProblem(f"debootstrap failed:\n{done.stdout[-2000:]}")
        for archive in (fresh / "var/cache/apt/archives").glob("*.deb"):
            archive.unlink()
        fresh.chmod(0o755)
        fresh.rename(root)
