"""Programs of the test clusters: from KUBEBUILDER_ASSETS, else from the cache, else built there with Go.

Called by the command, the clusters and tests that need a tool such as helm. A file of the cache has its version in
its name and appears by a rename, so it is whole or absent; a lock keeps two runs from building at once.
"""

import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster_problem import ClusterProblem
from filelock import FileLock

KUBERNETES_VERSION = "1.34.4"
ASSETS = "KUBEBUILDER_ASSETS"


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """The Go package of a program, and the module that is fetched for it."""

    module: str
    package: str
    version: str

    @property
    def is_kubernetes(self) -> bool:
        return self.module == "k8s.io/kubernetes"


def kubernetes(name: str) -> Source:
    module = "k8s.io/kubernetes"
    return Source(module=module, package=f"{module}/cmd/{name}", version=KUBERNETES_VERSION)


SOURCES = {
    "etcd": Source(module="go.etcd.io/etcd/server/v3", package="go.etcd.io/etcd/server/v3", version="3.6.4"),
    "kube-apiserver": kubernetes("kube-apiserver"),
    "kubectl": kubernetes("kubectl"),
    "kube-controller-manager": kubernetes("kube-controller-manager"),
    "kube-scheduler": kubernetes("kube-scheduler"),
    "kubelet": kubernetes("kubelet"),
    "kube-proxy": kubernetes("kube-proxy"),
    "coredns": Source(module="github.com/coredns/coredns", package="github.com/coredns/coredns", version="1.12.4"),
    "helm": Source(module="helm.sh/helm/v4", package="helm.sh/helm/v4/cmd/helm", version="4.3.1"),
    "kubeconform": Source(
        module="github.com/yannh/kubeconform", package="github.com/yannh/kubeconform/cmd/kubeconform", version="0.8.0"
    ),
    "kwok": Source(module="sigs.k8s.io/kwok", package="sigs.k8s.io/kwok/cmd/kwok", version="0.8.0"),
}
API_LEVEL = ("etcd", "kube-apiserver", "kubectl")
NODE_LEVEL = (*API_LEVEL, "kube-controller-manager", "kube-scheduler", "kubelet", "kube-proxy", "coredns")


def cache_folder() -> Path:
    """Outside the checkout, shared by all of them."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moeserving"


def locate(name: str) -> Path:
    """Where this program is; builds it when it is nowhere."""
    return locate_all([name])[name]


def locate_all(names: Sequence[str]) -> dict[str, Path]:
    """Paths of several binaries, as `locate` finds them."""
    check_names(names)
    if missing := [name for name in names if not find(name)]:
        with FileLock(bin_folder() / ".lock"):
            build_all([name for name in missing if not find(name)])
    return {name: found for name in names if (found := find(name))}


def check_names(names: Iterable[str]) -> None:
    for name in names:
        if name not in SOURCES:
            raise ClusterProblem(f"unknown program '{name}'; known: {', '.join(sorted(SOURCES))}")


def find(name: str) -> Path | None:
    """The program where it already is."""
    if assets := os.environ.get(ASSETS):
        given = Path(assets).absolute() / name
        if os.access(given, os.X_OK):
            return given
    cached = cached_path(name)
    return cached if cached.exists() else None


def bin_folder() -> Path:
    folder = cache_folder() / "bin"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def cached_path(name: str) -> Path:
    return bin_folder() / f"{name}-{SOURCES[name].version}"


def folders(names: Sequence[str]) -> list[Path]:
    """The folders where these programs stand under their plain names, in the order of a PATH."""
    return list(dict.fromkeys(path.parent for path in locate_all(names).values()))


def build_all(names: Sequence[str]) -> None:
    """Builds these into the cache, module by module."""
    if not names:
        return
    go = shutil.which("go")
    if not go:
        raise ClusterProblem(
            f"no {', '.join(names)} here and no Go to build it: install Go 1.26 or newer (https://go.dev/dl), "
            f"or set {ASSETS} to a folder that has it"
        )
    for number, name in enumerate(names, 1):
        say(f"building {name} {SOURCES[name].version} ({number} of {len(names)}; minutes when nothing is cached)")
        build(go, name)


def build(go: str, name: str) -> None:
    source = SOURCES[name]
    with tempfile.TemporaryDirectory(dir=bin_folder(), prefix=".build-") as folder:
        run = functools.partial(run_go, go, Path(folder))
        Path(folder, "go.mod").write_text(go_module(run, source))
        Path(folder, "tools.go").write_text("//go:build tools\n\npackage tools\n")
        run("get", "-tool", f"{source.package}@v{source.version}")
        made = Path(folder, "made")
        run("build", "-trimpath", "-ldflags", linker_flags(source), "-o", str(made), source.package)
        made.rename(cached_path(name))
        link = Path(folder, "link")
        link.symlink_to(cached_path(name).name)
        link.rename(bin_folder() / name)


def go_module(run: functools.partial[str], source: Source) -> str:
    """A module for this program alone: two programs in one would move each other's dependencies."""
    text = "module testcluster\n\ngo 1.26.0\n"
    if not source.is_kubernetes:
        return text
    # Kubernetes points to its libraries by paths in its repository; published, they are modules v0.MINOR.PATCH.
    Path(run.args[1], "go.mod").write_text(text)
    described = json.loads(run("mod", "download", "-json", f"{source.module}@v{source.version}"))
    modules = json.loads(run("mod", "edit", "-json", described["GoMod"]))["Replace"] or []
    library = f"v0.{source.version.removeprefix('1.')}"
    lines = [f"replace {row['Old']['Path']} => {row['Old']['Path']} {library}\n" for row in modules]
    return text + f"require {source.module} v{source.version}\n" + "".join(lines)


def linker_flags(source: Source) -> str:
    flags = ["-s", "-w"]
    if source.is_kubernetes:
        major, minor, _ = source.version.split(".")
        version = "k8s.io/component-base/version"
        flags += [f"-X {version}.gitVersion=v{source.version}", f"-X {version}.gitMajor={major}"]
        flags += [f"-X {version}.gitMinor={minor}", f"-X k8s.io/client-go/pkg/version.gitVersion=v{source.version}"]
    return " ".join(flags)


def run_go(go: str, folder: Path, *arguments: str) -> str:
    """Output of `go ARGUMENTS` in this folder."""
    environment = os.environ | {"CGO_ENABLED": "0", "GOFLAGS": "-mod=mod", "GOWORK": "off"}
    done = subprocess.run([go, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ClusterProblem(f"go {' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
    return done.stdout


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
