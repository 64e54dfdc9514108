"""The product's images on a node, made by the steps of its Dockerfiles (`images/install.sh`).

The engine's would be too large: its environment of several GB is mounted from this machine instead.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from cluster_binaries import cache_folder, say
from cluster_debian import python_root
from cluster_images import Image
from cluster_node import NodeCluster
from cluster_problem import ClusterProblem
from filelock import FileLock

ROOT = Path(__file__).parents[2]
OPERATOR, ENGINE = "docker.io/moeserving/gateway-operator:e2e", "docker.io/moeserving/engine-cpu:e2e"
PREFIX = "/opt/moeserving"
PATH = f"{PREFIX}/bin:/usr/local/bin:/usr/bin:/bin"
LENT = ("PIP_CERT", "PIP_INDEX_URL", "UV_DEFAULT_INDEX", "SSL_CERT_FILE", "SSL_CERT_DIR")
# What the image of operator and gateway is made of: another one of these makes another image.
SOURCES = (
    "scheduling",
    "contract",
    "gateway",
    "node_agent",
    "kernels",
    "operator",
    "bench",
    "pyproject.toml",
    "constraints.txt",
    "images",
)


def import_products(cluster: NodeCluster) -> dict[str, str]:
    """Makes the images known to the node; the chart's values that name them."""
    with tempfile.TemporaryDirectory(dir=cache_folder(), prefix=".product-") as folder:
        root = Path(folder, "root")
        environment = {"PATH": PATH, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1"}
        say("making the image of operator and gateway")
        copy_root(dependencies_root(), root)
        install(root)
        cluster.load_image(
            Image(name=OPERATOR, entrypoint=["moeserving"], user="65532:65532", environment=environment), root
        )
    cluster.load_image(Image(name=ENGINE), python_root())
    repository, _, tag = OPERATOR.rpartition(":")
    engine, _, engine_tag = ENGINE.rpartition(":")
    return {
        "images.operator.repository": repository,
        "images.operator.tag": tag,
        "images.gateway.repository": repository,
        "images.gateway.tag": tag,
        "images.engineCpu.repository": engine,
        "images.engineCpu.tag": engine_tag,
        "images.pullPolicy": "Never",
    }


def dependencies_root() -> Path:
    """Debian, Python and all that the product needs, but for the product; kept until a pinned version changes."""
    pins = b"".join(
        Path(ROOT, name).read_bytes() for name in ("constraints.txt", "pyproject.toml", "images/install.sh")
    )
    kept = cache_folder() / "roots" / f"operator-{hashlib.sha256(pins).hexdigest()[:12]}"
    with FileLock(kept.with_suffix(".lock")):
        if not kept.exists():
            base = python_root()
            for old in kept.parent.glob("operator-*"):
                if old.is_dir():
                    shutil.rmtree(old)
            fresh = kept.with_suffix(".making")
            shutil.rmtree(fresh, ignore_errors=True)
            copy_root(base, fresh)
            run_inside(fresh, "python3", "-m", "venv", PREFIX)
            install(fresh)
            fresh.rename(kept)
    return kept


def install(root: Path) -> None:
    """`images/install.sh operator gateway epp`, of the checkout as it stands."""
    source = root / "src"
    source.mkdir()
    for name in (*SOURCES, "README.md", "LICENSE", "overrides.txt"):
        path = ROOT / name
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(path, source / name, ignore=ignore) if path.is_dir() else shutil.copy(path, source / name)
    run_inside(root, "sh", "/src/images/install.sh", "operator", "gateway", "epp")
    shutil.rmtree(source)


def copy_root(source: Path, target: Path) -> None:
    """A file system has device nodes: they are copied, not read."""
    subprocess.run(["cp", "--archive", source, target], check=True)


def run_inside(root: Path, *command: str) -> None:
    """Runs in the image's file system, with this machine's network and way to packages."""
    lent = lend_network(root)
    environment = {"PATH": PATH, "HOME": "/tmp", "LANG": "C.UTF-8"} | {
        name: value for name, value in os.environ.items() if name in LENT or name.lower().endswith("_proxy")
    }
    try:
        done = subprocess.run(
            ["/usr/sbin/chroot", root, *command], env=environment, capture_output=True, text=True, check=False
        )
    finally:
        for file, before in lent.items():
            file.unlink(missing_ok=True)
            if before is not None:
                file.write_bytes(before)
    if done.returncode:
        raise ClusterProblem(f"{' '.join(command)}:\n{(done.stdout + done.stderr)[-3000:]}")


def lend_network(root: Path) -> dict[Path, bytes | None]:
    """Copies what a program needs to reach packages; the files as they were before."""
    lent: dict[Path, bytes | None] = {}
    for file in ("etc/resolv.conf", "etc/hosts", "etc/pip.conf", "etc/ssl/certs/ca-certificates.crt"):
        source, target = Path("/", file), root / file
        if source.is_file():
            lent[target] = target.read_bytes() if target.is_file() else None
            shutil.copy(source, target)
    return lent


def engine_pod_template() -> dict[str, Any]:
    """The part of a pod template by which an engine finds vLLM: checkout, environment and interpreter."""
    interpreter = Path(sys.executable).resolve().parents[1]
    folders = {"checkout": ROOT, "interpreter": interpreter}
    return {
        "spec": {
            "containers": [
                {
                    "name": "engine",
                    "command": [
                        str(ROOT / ".venv/bin/moeserving"),
                        "agent",
                        "--config",
                        "/etc/moeserving/agent.json",
                    ],
                    "env": [{"name": "HOME", "value": "/tmp"}],
                    "volumeMounts": [
                        {"name": name, "mountPath": str(path), "readOnly": True} for name, path in folders.items()
                    ],
                }
            ],
            "volumes": [{"name": name, "hostPath": {"path": str(path)}} for name, path in folders.items()],
        }
    }
