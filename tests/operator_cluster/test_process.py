"""The operator as processes: two of them, one of some namespaces alone, an API server that goes away and comes back."""

import json
import os
import signal
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cluster_life
import pytest
import yaml
from cluster_api import ApiCluster
from cluster_problem import ClusterProblem
from fresh_operator import comparable
from moe_contract.addresses import LOOPBACK, LOOPBACK_IPV6, http_url, is_bindable
from moe_operator.kubernetes.kinds import CHILDREN
from operator_process import OperatorProcess, eventually
from serving_documents import CRD, serving

from tests.contract.refusing_proxy import refusing_proxy

Document = dict[str, Any]
KINDS = ",".join(kind.plural for kind in CHILDREN if not kind.optional)
Start = Callable[..., OperatorProcess]


@pytest.fixture
def start(serving_cluster: ApiCluster, namespace: str, tmp_path: Path) -> Iterator[Start]:
    """Starts an operator of this test's namespace; ends it."""
    running: list[OperatorProcess] = []

    def begin(name: str, *options: str) -> OperatorProcess:
        place = options or ("--namespace", namespace)
        words = ("--identity", name, *place)
        running.append(OperatorProcess(serving_cluster.kubeconfig, tmp_path / name, *words, own_namespace=namespace))
        return running[-1]

    yield begin
    for operator in running:
        operator.kill()


def apply(cluster: ApiCluster, namespace: str, document: Document) -> None:
    cluster.kubectl("apply", "-n", namespace, "-f", "-", stdin=json.dumps(document))


def children(cluster: ApiCluster, namespace: str) -> dict[str, Document]:
    """What the operator made, as far as two namespaces can be alike."""
    selector = "app.kubernetes.io/managed-by=moeserving"
    found = json.loads(cluster.kubectl("get", KINDS, "-n", namespace, "-l", selector, "-o", "json"))["items"]
    rows = [row | {"metadata": row["metadata"] | {"namespace": ""}} for row in found]
    return {f"{row['kind']}/{row['metadata']['name']}": comparable(row) for row in rows}


def replicas(cluster: ApiCluster, namespace: str, name: str = "tiny-engine") -> int:
    found = cluster.kubectl("get", "deployment", name, "-n", namespace, "--ignore-not-found", "-o", "json")
    return int(json.loads(found)["spec"]["replicas"]) if found else -1


def set_replicas(cluster: ApiCluster, namespace: str, count: int) -> None:
    patch = json.dumps({"spec": {"engine": {"replicas": count}}})
    cluster.kubectl("patch", "moes/tiny", "-n", namespace, "--type=merge", "-p", patch)


def healthy(operator: OperatorProcess) -> bool:
    address = f"http://127.0.0.1:{operator.liveness_port}/healthz"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(address, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


@pytest.mark.skipif(not is_bindable(LOOPBACK_IPV6), reason="this machine has no IPv6 on loopback")
def test_probes_and_metrics_answer_in_both_families_and_no_call_goes_by_a_proxy(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    with refusing_proxy(monkeypatch) as proxy:
        operator = start("first")
        eventually(operator.leads, "it leads")
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        for host in (LOOPBACK, LOOPBACK_IPV6):
            for port, path in ((operator.liveness_port, "healthz"), (operator.metrics_port, "metrics")):
                with opener.open(f"{http_url(host, port)}/{path}", timeout=5) as answer:
                    assert answer.status == 200
        assert proxy.asked == []


def test_of_two_operators_one_writes_and_the_other_follows_when_it_dies(
    serving_cluster: ApiCluster, namespace: str, start: Start
) -> None:
    first = start("first")
    eventually(first.leads, "the first leads")
    second = start("second")
    apply(serving_cluster, namespace, serving())
    eventually(lambda: replicas(serving_cluster, namespace) == 1, "the resource is real")
    eventually(lambda: healthy(second), "the second is alive, too")
    assert first.writes() > 10
    assert second.writes() == 0
    assert not second.leads()
    first.kill()
    set_replicas(serving_cluster, namespace, 3)
    eventually(lambda: replicas(serving_cluster, namespace) == 3, "the second does what the first did")
    assert second.leads()


def test_one_that_stood_still_writes_nothing_when_it_goes_on_and_ends(
    serving_cluster: ApiCluster, namespace: str, start: Start
) -> None:
    first = start("first")
    eventually(first.leads, "the first leads")
    apply(serving_cluster, namespace, serving())
    eventually(lambda: replicas(serving_cluster, namespace) == 1, "the resource is real")
    second = start("second")
    eventually(lambda: healthy(second), "the second is alive")
    os.kill(first.pid, signal.SIGSTOP)
    eventually(second.leads, "the second leads")
    set_replicas(serving_cluster, namespace, 2)
    eventually(lambda: replicas(serving_cluster, namespace) == 2, "the second works")
    written = first.text().count("applied ")
    os.kill(first.pid, signal.SIGCONT)
    eventually(lambda: not first.lives(), "the first ends: it is started anew as a follower")
    assert "first no longer leads" in first.text()
    assert first.text().count("applied ") == written
    assert second.lives()


def test_one_that_gets_sigterm_hands_over_at_once(serving_cluster: ApiCluster, namespace: str, start: Start) -> None:
    first = start("first", "--namespace", namespace, "--lease-duration", "60")
    eventually(first.leads, "the first leads")
    second = start("second", "--namespace", namespace, "--lease-duration", "60")
    eventually(lambda: healthy(second), "the second is alive")
    assert first.stop() == 0
    # Long before the term of a minute is over.
    eventually(second.leads, "the second leads", timeout_s=30.0)


def test_an_operator_of_some_namespaces_leaves_the_others_alone(
    serving_cluster: ApiCluster, namespace: str, start: Start
) -> None:
    other = f"{namespace}-other"
    serving_cluster.kubectl("create", "namespace", other)
    for place in (namespace, other):
        apply(serving_cluster, place, serving())
    start("restricted")
    eventually(lambda: replicas(serving_cluster, namespace) == 1, "its own is real")
    set_replicas(serving_cluster, namespace, 2)
    eventually(lambda: replicas(serving_cluster, namespace) == 2, "a change is seen")
    assert children(serving_cluster, other) == {}
    untouched = json.loads(serving_cluster.kubectl("get", "moes/tiny", "-n", other, "-o", "json"))
    assert "status" not in untouched
    assert "finalizers" not in untouched["metadata"]
    serving_cluster.kubectl("delete", "namespace", other, "--wait=false")


def test_one_line_says_what_is_ready(serving_cluster: ApiCluster, namespace: str, start: Start) -> None:
    apply(serving_cluster, namespace, serving())
    start("operator")
    eventually(
        lambda: "NoGateway" in serving_cluster.kubectl("get", "moes", "-n", namespace, "--no-headers"), "a status"
    )
    head, line = serving_cluster.kubectl("get", "moes", "-n", namespace).splitlines()
    assert head.split() == ["NAME", "READY", "ENGINES", "DESIRED", "BALANCE", "TTFT", "AGE", "STATUS"]
    assert line.split()[:4] == ["tiny", "False", "0", "1"]
    assert line.endswith("NoGateway: no gateway is ready yet")
    wide = serving_cluster.kubectl("get", "events", "-n", namespace, "-o", "name")
    assert "event/tiny." in wide, "an event for each condition that holds at first"


def test_liveness_says_what_the_probe_of_the_chart_asks(start: Start) -> None:
    operator = start("operator")
    eventually(lambda: healthy(operator), "it answers")
    chart = Path(__file__).parents[2] / "charts" / "moeserving"
    assert "path: /healthz" in (chart / "templates" / "operator.yaml").read_text("utf-8")
    assert operator.stop() == 0
    assert not healthy(operator)


class Kubelet:
    """Starts the operator anew whenever it has ended."""

    def __init__(self, start: Callable[[], OperatorProcess]) -> None:
        self._start, self.operator, self.starts = start, start(), 1

    def look(self) -> bool:
        if not self.operator.lives():
            self.operator, self.starts = self._start(), self.starts + 1
        return True


def life(
    cluster: ApiCluster, namespace: str, kubelet: Kubelet, disturb: Callable[[], None]
) -> list[dict[str, Document]]:
    """Create, change and delete; the children after each. `disturb` is called while each is on its way."""
    states = []

    def settle(holds: Callable[[], bool], what: str) -> None:
        eventually(lambda: kubelet.look() and quiet(cluster, holds), what, 240.0)
        states.append(children(cluster, namespace))

    patiently(lambda: apply(cluster, namespace, serving(engine={"replicas": 2})))
    disturb()
    settle(lambda: replicas(cluster, namespace, "tiny-gateway") == 1, "it is made")
    for count in (4, 3):
        engine = {"replicas": count, "args": ["--seed=1"], "canary": {"weight": 20}}
        patch = json.dumps({"spec": {"engine": engine}})
        words = ("patch", "moes/tiny", "-n", namespace, "--type=merge", "-p", patch)
        patiently(lambda words=words: cluster.kubectl(*words))
        disturb()
    settle(
        lambda: replicas(cluster, namespace) == 3 and replicas(cluster, namespace, "tiny-engine-canary") == 1,
        "it is changed",
    )
    patiently(lambda: cluster.kubectl("delete", "moes/tiny", "-n", namespace, "--wait=false", "--ignore-not-found"))
    disturb()
    settle(lambda: not cluster.kubectl("get", "moes", "-n", namespace, "-o", "name"), "it is gone")
    return states


def quiet(cluster: ApiCluster, holds: Callable[[], bool]) -> bool:
    """Whether it holds, as far as the API server answers."""
    try:
        return holds()
    except ClusterProblem:
        return False


def patiently(do: Callable[[], object]) -> None:
    def done() -> bool:
        try:
            do()
        except ClusterProblem:
            return False
        return True

    eventually(done, "the API server takes it")


@pytest.fixture
def own_cluster(tmp_path: Path) -> Iterator[ApiCluster]:
    """A cluster whose API server this test may stop."""
    cluster = cluster_life.up("api", tmp_path / "cluster", tied=True)
    cluster.kubectl("apply", "--server-side", "-f", CRD)
    cluster.kubectl(
        "wait", f"crd/{yaml.safe_load(CRD.read_text('utf-8'))['metadata']['name']}", "--for=condition=Established"
    )
    yield cluster
    cluster_life.down(tmp_path / "cluster")


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("lives", [1, pytest.param(3, marks=pytest.mark.long)])
def test_whenever_the_api_server_restarts_it_comes_to_the_same_objects_and_leaves_none(
    own_cluster: ApiCluster, tmp_path: Path, lives: int
) -> None:
    restarts = 0

    def restart() -> None:
        nonlocal restarts
        time.sleep(0.1 * (restarts % 5))
        own_cluster.restart_api_server(kill=restarts % 2 == 0)
        restarts += 1

    words = ("--resync", "20", "--lease-duration", "15")
    kubelet = Kubelet(lambda: OperatorProcess(own_cluster.kubeconfig, tmp_path / "log", *words))
    try:
        for number in range(lives + 1):
            own_cluster.kubectl("create", "namespace", f"life-{number}")
        wanted = life(own_cluster, "life-0", kubelet, lambda: None)
        assert [len(state) for state in wanted] == [14, 17, 0]
        for number in range(lives):
            assert life(own_cluster, f"life-{number + 1}", kubelet, restart) == wanted, f"life {number}"
        assert restarts == 4 * lives
    finally:
        kubelet.operator.kill()
