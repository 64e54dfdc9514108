"""An operator of some namespaces, with the chart's rights: what becomes of one of them concerns no other."""

import json
import subprocess
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cluster_binaries
import pytest
import yaml
from controlled import ControlledCluster
from operator_process import OperatorProcess, eventually
from serving_documents import CRD, serving

Document = dict[str, Any]
CHART = CRD.parents[1] / "charts" / "moeserving"
SYSTEM = "moeserving-system"


@pytest.fixture
def names(controlled_cluster: ControlledCluster) -> tuple[str, str]:
    """Names of two namespaces; only the second is there."""
    ending = uuid.uuid4().hex[:6]
    controlled_cluster.kubectl("create", "namespace", f"b-{ending}")
    return f"a-{ending}", f"b-{ending}"


def render(*namespaces: str, release: str = "moeserving", **values: Any) -> list[Document]:
    """The rights of a release, without its CRD."""
    helm = cluster_binaries.locate_all(("helm",))["helm"]
    words = [str(helm), "template", release, str(CHART), "-n", SYSTEM, "--values", "-"]
    words += ["--show-only", "templates/access.yaml"]
    text = json.dumps({"watchNamespaces": namespaces, **values})
    done = subprocess.run(words, input=text, capture_output=True, text=True, check=True)
    return [row for row in yaml.safe_load_all(done.stdout) if row]


@pytest.fixture
def grant(controlled_cluster: ControlledCluster) -> Iterator[Callable[..., Path]]:
    """Gives the rights of a release that serves these namespaces; a kubeconfig with them."""
    cluster = controlled_cluster
    if not cluster.kubectl("get", "namespace", SYSTEM, "--ignore-not-found"):
        cluster.kubectl("create", "namespace", SYSTEM)
    made: list[Document] = []

    def give(*namespaces: str, absent: tuple[str, ...] = (), **values: Any) -> Path:
        rows = [row for row in render(*namespaces, **values) if row["metadata"].get("namespace") not in absent]
        made.extend(rows)
        cluster.kubectl("apply", "-f", "-", stdin=yaml.safe_dump_all(rows))
        return cluster.service_account_kubeconfig(SYSTEM, "moeserving")

    yield give
    cluster.kubectl("delete", "--ignore-not-found", "-f", "-", stdin=yaml.safe_dump_all(made))


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., OperatorProcess]]:
    """Starts an operator of these namespaces with a kubeconfig."""
    running: list[OperatorProcess] = []

    def begin(kubeconfig: Path, *namespaces: str, lease: str = "moeserving") -> OperatorProcess:
        words = [word for name in namespaces for word in ("--namespace", name)]
        log = tmp_path / f"log-{len(running)}"
        identity = f"operator-{len(running)}"
        # A watch that is open outlasts the rights that it began with: a list shows that they are gone.
        words += ["--resync", "5", "--identity", identity, "--lease", lease]
        running.append(OperatorProcess(kubeconfig, log, *words, own_namespace=SYSTEM))
        return running[-1]

    yield begin
    for operator in running:
        operator.kill()


def apply(cluster: ControlledCluster, namespace: str, document: Document) -> None:
    cluster.kubectl("apply", "-n", namespace, "-f", "-", stdin=json.dumps(document))


def exists(cluster: ControlledCluster, namespace: str, place: str) -> bool:
    return bool(cluster.kubectl("get", place, "-n", namespace, "--ignore-not-found", "-o", "name"))


def condition(cluster: ControlledCluster, namespace: str, kind: str) -> Document:
    rows = json.loads(cluster.kubectl("get", "moes/tiny", "-n", namespace, "-o", "json")).get("status", {})
    return next((dict(row) for row in rows.get("conditions", []) if row["type"] == kind), {})


def readiness(operator: OperatorProcess) -> tuple[int, Document]:
    address = f"http://127.0.0.1:{operator.metrics_port}/readyz"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(address, timeout=5) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())
    except OSError:
        return 0, {}


def change(cluster: ControlledCluster, namespace: str, replicas: int) -> None:
    """Changes the resource and waits until the operator has made that real."""
    patch = json.dumps({"spec": {"engine": {"replicas": replicas}}})
    cluster.kubectl("patch", "moes/tiny", "-n", namespace, "--type=merge", "-p", patch)
    words = ("get", "deployment/tiny-engine", "-n", namespace, "-o", "jsonpath={.spec.replicas}")
    eventually(lambda: cluster.kubectl(*words) == str(replicas), f"{namespace} is served")


def test_a_namespace_that_is_deleted_goes_and_the_others_are_served_on(
    controlled_cluster: ControlledCluster, names: tuple[str, str], grant: Any, start: Any
) -> None:
    cluster, (first, second) = controlled_cluster, names
    cluster.kubectl("create", "namespace", first)
    operator = start(grant(*names), *names)
    for name in names:
        apply(cluster, name, serving())
    for name in names:
        eventually(lambda name=name: exists(cluster, name, "deployment/tiny-gateway"), f"{name} is served")
    cluster.kubectl("delete", "namespace", first, "--wait=false")
    eventually(lambda: not cluster.kubectl("get", "namespace", first, "--ignore-not-found"), "it is gone", 180.0)
    change(cluster, second, 3)
    assert operator.lives()
    assert operator.leads()
    eventually(lambda: f'unreadable{{kind="pods",namespace="{first}"}}' in str(operator.metrics()), "it says so")
    assert operator.stop() == 0


def test_a_namespace_that_comes_later_is_served_once_its_role_is_there(
    controlled_cluster: ControlledCluster, names: tuple[str, str], grant: Any, start: Any
) -> None:
    cluster, (first, second) = controlled_cluster, names
    operator = start(grant(*names, absent=(first,)), *names)
    apply(cluster, second, serving())
    eventually(lambda: exists(cluster, second, "deployment/tiny-gateway"), "the one that is there is served")
    cluster.kubectl("create", "namespace", first)
    apply(cluster, first, serving())
    eventually(lambda: condition(cluster, first, "Degraded").get("reason") == "NotPermitted", "the resource says so")
    assert f" in {first}: " in condition(cluster, first, "Degraded")["message"]
    assert condition(cluster, first, "Ready")["status"] == "Unknown"
    status, said = readiness(operator)
    assert (status, said["role"]) == (200, "leads")
    assert {"kind": "pods", "namespace": first} in said["unreadable"]
    grant(*names)
    eventually(lambda: exists(cluster, first, "deployment/tiny-gateway"), "it is served")
    eventually(lambda: condition(cluster, first, "Degraded").get("status") == "False", "and says so")
    assert readiness(operator)[1]["unreadable"] == []


def test_one_kind_that_is_refused_in_one_namespace_is_reported_there_alone(
    controlled_cluster: ControlledCluster, names: tuple[str, str], grant: Any, start: Any
) -> None:
    cluster, (first, second) = controlled_cluster, names
    cluster.kubectl("create", "namespace", first)
    kubeconfig = grant(*names)
    role = json.loads(cluster.kubectl("get", "role/moeserving", "-n", first, "-o", "json"))
    role["rules"] = [
        row | {"resources": [name for name in row["resources"] if name != "secrets"]} for row in role["rules"]
    ]
    cluster.kubectl("replace", "-f", "-", stdin=json.dumps(role))
    start(kubeconfig, *names)
    for name in names:
        apply(cluster, name, serving())
    eventually(lambda: exists(cluster, second, "deployment/tiny-gateway"), "the other is served")
    eventually(lambda: "secrets" in condition(cluster, first, "Degraded").get("message", ""), "the resource names it")
    assert not exists(cluster, first, "deployment/tiny-gateway")


def test_two_releases_of_one_namespace_that_serve_different_ones_both_serve(
    controlled_cluster: ControlledCluster, names: tuple[str, str], grant: Any, start: Any
) -> None:
    cluster, (first, second) = controlled_cluster, names
    cluster.kubectl("create", "namespace", first)
    one = start(grant(first), first, lease="moeserving")
    # Of the other release only the names of its roles differ.
    other = start(
        grant(second, release="other", serviceAccount={"name": "moeserving"}), second, lease="other-moeserving"
    )
    for name in names:
        apply(cluster, name, serving())
        eventually(lambda name=name: exists(cluster, name, "deployment/tiny-gateway"), f"{name} is served")
    assert readiness(one)[0] == readiness(other)[0] == 200


def test_a_second_release_that_serves_the_same_namespace_says_so_and_is_not_ready(
    controlled_cluster: ControlledCluster, names: tuple[str, str], grant: Any, start: Any
) -> None:
    _, second = names
    kubeconfig = grant(second)
    first = start(kubeconfig, second)
    eventually(first.leads, "the first leads")
    follower = start(kubeconfig, second)
    grant(second, release="other", serviceAccount={"name": "moeserving"})
    rival = start(kubeconfig, second, lease="other-moeserving")
    eventually(lambda: readiness(rival)[1].get("role") == "rivalled", "it says so")
    status, said = readiness(rival)
    assert (status, said["rivals"]) == (503, [f"{SYSTEM}/moeserving (serves {second})"])
    assert "operator-2 stands by" in rival.text()
    eventually(lambda: readiness(follower) == (200, {"role": "standsBy", "rivals": [], "unreadable": []}), "a standby")
    assert not rival.leads()


def test_without_rights_across_namespaces_the_chart_makes_roles_alone() -> None:
    kinds = {row["kind"] for row in render("a", rbac={"acrossNamespaces": False})}
    assert kinds == {"ServiceAccount", "Role", "RoleBinding"}
