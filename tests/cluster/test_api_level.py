"""The API level: what the operator's tests rely on."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import cluster_binaries
import cluster_life
import psutil
import pytest
from cluster_api import ApiCluster
from cluster_problem import ClusterProblem
from cluster_processes import Processes

COMMAND = [sys.executable, str(Path(__file__).parent)]


def run(*words: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *map(str, words)], env=os.environ | environment, capture_output=True, text=True, check=False
    )


@pytest.fixture
def folder(tmp_path: Path):
    yield tmp_path / "state"
    cluster_life.down(tmp_path / "state")


def test_objects_outlive_a_killed_api_server_at_the_same_address(api_cluster: ApiCluster, namespace: str) -> None:
    server = api_cluster.server
    api_cluster.kubectl("create", "configmap", "kept", "-n", namespace, "--from-literal=a=1")
    api_cluster.stop_api_server(kill=True)
    with pytest.raises(ClusterProblem, match="refused"):
        api_cluster.kubectl("get", "namespaces")
    api_cluster.start_api_server()
    kept = json.loads(api_cluster.kubectl("get", "configmap", "kept", "-n", namespace, "-o", "json"))
    assert kept["data"] == {"a": "1"}
    assert api_cluster.server == server


def test_an_api_server_that_is_asked_to_stop_can_be_started_again(api_cluster: ApiCluster, namespace: str) -> None:
    api_cluster.restart_api_server()
    assert namespace in api_cluster.kubectl("get", "namespaces")


def test_a_new_user_has_the_rights_that_rbac_gives_and_no_others(api_cluster: ApiCluster, namespace: str) -> None:
    kubeconfig = api_cluster.user_kubeconfig("reader", "readers")
    command = [cluster_binaries.locate("kubectl"), "--kubeconfig", kubeconfig, "-n", namespace]
    assert subprocess.run([*command, "get", "secrets"], capture_output=True, check=False).returncode == 1
    api_cluster.kubectl("create", "role", "read", "-n", namespace, "--verb=list", "--resource=secrets")
    api_cluster.kubectl("create", "rolebinding", "read", "-n", namespace, "--role=read", "--group=readers")
    assert subprocess.run([*command, "get", "secrets"], capture_output=True, check=False).returncode == 0
    assert subprocess.run([*command, "get", "pods"], capture_output=True, check=False).returncode == 1


def test_a_service_account_is_known_by_its_token(api_cluster: ApiCluster, namespace: str) -> None:
    kubeconfig = api_cluster.service_account_kubeconfig(namespace, "worker")
    command = [cluster_binaries.locate("kubectl"), "--kubeconfig", kubeconfig, "auth", "whoami", "-o", "json"]
    answer = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert answer["status"]["userInfo"]["username"] == f"system:serviceaccount:{namespace}:worker"


def test_two_clusters_run_side_by_side(api_cluster: ApiCluster, folder: Path) -> None:
    other = cluster_life.up("api", folder, tied=True)
    other.kubectl("create", "namespace", "only-here")
    assert "only-here" not in api_cluster.kubectl("get", "namespaces")


def test_up_prints_the_kubeconfig_and_a_second_up_the_same(folder: Path) -> None:
    first, second = run("up", "--state-dir", folder), run("up", "--state-dir", folder)
    assert (first.returncode, second.returncode) == (0, 0)
    assert Path(first.stdout.strip()).exists()
    assert second.stdout == first.stdout
    assert "already up" in second.stderr
    assert run("status", "--state-dir", folder).returncode == 0


def test_down_leaves_nothing_after_a_killed_part_and_again_does_nothing(folder: Path) -> None:
    cluster_life.up("api", folder)
    Processes(state_dir=folder).stop("etcd", kill=True)
    state = run("status", "--state-dir", folder)
    assert (state.returncode, "etcd down" in state.stdout) == (1, True)
    assert "down" in run("down", "--state-dir", folder).stderr
    assert not list(Processes(state_dir=folder).all())
    assert not folder.exists()
    assert "nothing was up" in run("down", "--state-dir", folder).stderr


def test_up_repairs_what_a_killed_part_left(folder: Path) -> None:
    cluster_life.up("api", folder)
    Processes(state_dir=folder).stop("kube-apiserver", kill=True)
    assert cluster_life.up("api", folder).is_ready()


def test_down_leaves_nothing_when_up_itself_is_killed(folder: Path) -> None:
    command = subprocess.Popen([*COMMAND, "up", "--state-dir", str(folder)], stdout=subprocess.DEVNULL)
    processes = Processes(state_dir=folder)
    while not processes.find("etcd"):
        assert command.poll() is None
    command.send_signal(signal.SIGKILL)
    command.wait()
    assert cluster_life.down(folder)
    assert not list(processes.all())
    assert not folder.exists()


def test_a_tied_cluster_ends_with_its_process_even_if_that_one_is_killed(folder: Path) -> None:
    script = (
        "import cluster_life, sys, pathlib\n"
        "cluster_life.up('api', pathlib.Path(sys.argv[1]), tied=True)\n"
        "print(flush=True)\n"
        "input()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", script, str(folder)], cwd=COMMAND[1], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout
    assert holder.stdin
    with holder.stdout, holder.stdin:
        holder.stdout.readline()
        parts = [process for _, process in Processes(state_dir=folder).all()]
        assert len(parts) == 2
        holder.kill()
        holder.wait()
    assert not psutil.wait_procs(parts, timeout=10)[1]


def test_a_folder_with_other_things_is_refused_and_kept(folder: Path) -> None:
    folder.mkdir()
    (folder / "thesis.txt").write_text("precious")
    for action in ("up", "down"):
        answer = run(action, "--state-dir", folder)
        assert (answer.returncode, answer.stderr.count("\n")) == (1, 1), answer.stderr
        assert str(folder) in answer.stderr
    (folder / "thesis.txt").unlink()


def test_binaries_are_taken_from_the_folder_of_envtest_first(tmp_path: Path) -> None:
    (tmp_path / "kubectl").write_text("#!/bin/sh\n")
    (tmp_path / "kubectl").chmod(0o755)
    answer = run("binaries", "kubectl", "etcd", KUBEBUILDER_ASSETS=str(tmp_path))
    assert answer.stdout.strip().split(":") == [str(tmp_path), str(cluster_binaries.bin_folder())]


def test_without_binaries_and_go_one_line_says_what_gets_them(tmp_path: Path) -> None:
    answer = run("binaries", "etcd", XDG_CACHE_HOME=str(tmp_path), PATH="/nowhere")
    assert (answer.returncode, answer.stdout) == (1, "")
    assert answer.stderr.count("\n") == 1
    assert "install Go" in answer.stderr
    assert "KUBEBUILDER_ASSETS" in answer.stderr


def test_an_unknown_program_is_reported_with_the_known_ones() -> None:
    answer = run("binaries", "kubectll")
    assert answer.returncode == 1
    assert answer.stderr.startswith("unknown program 'kubectll'; known: coredns, etcd")
