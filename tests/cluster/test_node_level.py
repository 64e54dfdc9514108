"""The node level: pods run, find each other, and leave nothing behind, however the cluster ends."""

import json
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import cluster_life
import cluster_node
import psutil
import pytest
from cluster_api import ApiCluster
from cluster_debian import python_root
from cluster_images import Image
from cluster_node import NodeCluster
from cluster_processes import Processes, has_ended

COMMAND = [sys.executable, str(Path(__file__).parent)]
PYTHON = Image(name="docker.io/moeserving/python:test")
# A Service refuses until its endpoints have come to the packet rules.
FETCH = """
import time, urllib.request
for left in reversed(range(100)):
    try:
        print(urllib.request.urlopen("{url}", timeout=5).read().decode())
        break
    except OSError:
        time.sleep(0.2)
        if not left:
            raise
"""


@pytest.fixture(scope="session")
def python_cluster(node_cluster: NodeCluster) -> NodeCluster:
    node_cluster.load_image(PYTHON, python_root())
    return node_cluster


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    if reason := cluster_node.why_not():
        pytest.skip(reason)
    yield tmp_path / "state"
    cluster_life.down(tmp_path / "state")


def run_pod(cluster: ApiCluster, namespace: str, name: str, image: str, *command: str) -> None:
    """A pod with the label `app: NAME`, ready when this returns."""
    container = {"name": "main", "image": image, "imagePullPolicy": "Never", "command": list(command)}
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": {"app": name}},
        "spec": {"containers": [container], "terminationGracePeriodSeconds": 1},
    }
    cluster.kubectl("apply", "-n", namespace, "-f", "-", stdin=json.dumps(pod))
    cluster.kubectl("wait", "-n", namespace, f"pod/{name}", "--for=condition=Ready", "--timeout=120s")


def traces() -> dict[str, object]:
    """What a cluster could leave on this machine."""
    return {
        "mounts": sorted(line.split(" ")[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()),
        "links": [row["ifname"] for row in json.loads(cluster_node.run("ip", "-json", "link"))],
        "routes": json.loads(cluster_node.run("ip", "-json", "route")),
        "packet rules": [line for line in cluster_node.run("iptables-save").splitlines() if line[:1] in "*:-"],
        "namespaces": [row["name"] for row in json.loads(cluster_node.run("ip", "-json", "netns") or "[]")],
        "cgroups": sorted(str(path) for path in Path("/sys/fs/cgroup").glob("**/moeserving-test-*")),
        "folders": [path for path in cluster_node.HIDDEN if Path(path).exists()],
        "pods": [path.name for path in Path("/var/log").glob("pods/*")],
        "shims": sorted(str(path) for path in Path("/run/containerd").glob("**/*")),
    }


@pytest.mark.smoke
def test_a_pod_is_reached_by_its_services_name_from_a_pod_and_by_its_address_from_here(
    python_cluster: NodeCluster, namespace: str
) -> None:
    kubectl = python_cluster.kubectl
    run_pod(python_cluster, namespace, "web", PYTHON.name, "python3", "-m", "http.server", "8000", "-d", "/etc")
    run_pod(python_cluster, namespace, "client", PYTHON.name, "sleep", "1000")
    kubectl("expose", "pod", "web", "-n", namespace, "--port=80", "--target-port=8000")
    address = kubectl("get", "service", "web", "-n", namespace, "-o", "jsonpath={.spec.clusterIP}")
    for host in ("web", f"web.{namespace}.svc.cluster.local", address):
        script = FETCH.format(url=f"http://{host}/debian_version")
        assert kubectl("exec", "-n", namespace, "client", "--", "python3", "-c", script).startswith("12")
    with urllib.request.urlopen(f"http://{address}/debian_version", timeout=20) as answer:
        assert answer.read().startswith(b"12")
    assert "GET /debian_version" in kubectl("logs", "-n", namespace, "web")


def test_a_deployment_replaces_a_pod_that_is_deleted(python_cluster: NodeCluster, namespace: str) -> None:
    kubectl = python_cluster.kubectl
    kubectl("create", "deployment", "idle", "-n", namespace, f"--image={cluster_node.PAUSE.name}")
    kubectl("rollout", "status", "deployment/idle", "-n", namespace, "--timeout=120s")
    kubectl("delete", "pod", "-n", namespace, "-l", "app=idle")
    kubectl("rollout", "status", "deployment/idle", "-n", namespace, "--timeout=120s")
    pods = json.loads(kubectl("get", "pods", "-n", namespace, "-l", "app=idle", "-o", "json"))["items"]
    assert len([pod for pod in pods if "deletionTimestamp" not in pod["metadata"]]) == 1


@pytest.mark.cluster_node
@pytest.mark.timeout(600)
@pytest.mark.parametrize("part", ["none", "containerd", "kubelet", "kube-apiserver", "node"])
def test_down_leaves_nothing_whichever_part_was_killed(folder: Path, part: str) -> None:
    before = traces()
    cluster = cluster_life.up("node", folder)
    cluster.kubectl("wait", "--for=create", "serviceaccount/default", "--timeout=60s")
    run_pod(cluster, "default", "idle", cluster_node.PAUSE.name, "/pause")
    processes = Processes(state_dir=folder)
    inside = processes_inside(processes)
    assert len(inside) > len(cluster.parts)
    if part != "none":
        processes.stop(part, kill=True)
        assert part in cluster_life.status(folder).down
    done = subprocess.run([*COMMAND, "down", "--state-dir", str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not list(processes.all())
    assert not [pid for pid in inside if lives(int(pid))]
    assert not folder.exists()
    assert traces() == before


@pytest.mark.cluster_node
@pytest.mark.timeout(600)
@pytest.mark.parametrize("reached", ["node", "kube-apiserver", "containerd", "kubelet"])
def test_down_leaves_nothing_when_up_is_killed_on_its_way(folder: Path, reached: str) -> None:
    before = traces()
    words = [*COMMAND, "up", "--level", "node", "--state-dir", str(folder)]
    command = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    processes = Processes(state_dir=folder)
    while not processes.find(reached):
        assert command.poll() is None
        time.sleep(0.02)
    command.send_signal(signal.SIGKILL)
    command.wait()
    assert cluster_life.down(folder)
    assert not list(processes.all())
    assert not folder.exists()
    assert traces() == before


def lives(pid: int) -> bool:
    """False for one that its parent, by then the machine's init, has yet to ask for."""
    try:
        return not has_ended(psutil.Process(pid))
    except psutil.NoSuchProcess:
        return False


def processes_inside(processes: Processes) -> list[str]:
    """Numbers of all processes in the node's namespaces, the containers' too."""
    (first,) = [process.pid for process in processes.find("node") if process.cmdline()[0] == sys.executable]
    everyone = {path.name: namespace_of(path) for path in Path("/proc").iterdir() if path.name.isdigit()}
    top = namespace_of(Path("/proc", str(first)))
    return [pid for pid, namespace in everyone.items() if namespace == top]


def namespace_of(process: Path) -> str:
    try:
        return str((process / "ns" / "pid").readlink())
    except OSError:
        return ""
