"""The chart against a real API server: what it makes is valid, and installing, upgrading and uninstalling it."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import cluster_life
import pytest
import yaml
from cluster_problem import ClusterProblem

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "charts/moeserving"
MATRIX = {
    "defaults": {},
    "namespaces": {"watchNamespaces": ["default", "kube-system"]},
    "several": {"replicas": 3, "podDisruptionBudget": {"enabled": True}},
    "bare": {
        "crds": {"install": False},
        "rbac": {"create": False},
        "serviceAccount": {"create": False, "name": "other"},
        "networkPolicy": {"enabled": False},
        "resources": {},
        "podSecurityContext": {},
        "securityContext": {},
    },
    "closed": {"networkPolicy": {"metricsFrom": []}},
    "dressed": {
        "fullnameOverride": "serving",
        "imagePullSecrets": [{"name": "registry"}],
        "extraEnv": [
            {"name": "A", "value": "1"},
            {"name": "B", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
        ],
        "podAnnotations": {"example.com/a": "1"},
        "podLabels": {"example.com/b": "2"},
        "nodeSelector": {"kubernetes.io/os": "linux"},
        "tolerations": [{"key": "control", "operator": "Exists", "effect": "NoSchedule"}],
        "affinity": {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": []}},
        "priorityClassName": "system-cluster-critical",
        "serviceAccount": {"annotations": {"example.com/c": "3"}},
        "resources": {"requests": {"cpu": 1, "memory": "1Gi"}, "limits": {"cpu": "2", "memory": "2Gi"}},
        "images": {"registry": "registry.example.com:5000/mirror", "operator": {"tag": "1.2.3"}},
    },
}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A cluster of its own: CRDs come and go here."""
    folder = tmp_path_factory.mktemp("chart-cluster") / "state"
    yield cluster_life.up("api", folder, tied=True)
    cluster_life.down(folder)


@pytest.fixture
def release(cluster, helm):
    """Runs Helm on a release; ends without it."""
    place = ("--namespace", "moeserving-system", "--kubeconfig", cluster.kubeconfig)

    def run(verb, *words, values=None):
        return helm.run(verb, "moeserving", *words, *place, values=values)

    yield run
    if "moeserving" in helm.run("list", "--short", *place):
        helm.run("uninstall", "moeserving", *place)
    cluster.kubectl("delete", "crd", "moeservings.moeserving.dev", "--ignore-not-found")


def names(cluster, kind, *where):
    return cluster.kubectl("get", kind, *where, "-o", "name").split()


@pytest.mark.parametrize("values", MATRIX.values(), ids=MATRIX)
def test_the_api_server_takes_what_the_chart_makes(cluster, helm, values):
    documents = helm.render(values, namespace="default")
    # A field that is unknown would be dropped without a word.
    checked = cluster.kubectl(
        "apply", "--dry-run=server", "--validate=strict", "-f", "-", stdin=yaml.safe_dump_all(documents)
    )
    assert len(checked.splitlines()) == len(documents)


def test_the_operators_pod_meets_the_restricted_standard(cluster, helm):
    cluster.kubectl("create", "namespace", "restricted")
    cluster.kubectl("label", "namespace", "restricted", "pod-security.kubernetes.io/enforce=restricted")
    (template,) = [row["spec"]["template"] for row in helm.render() if row["kind"] == "Deployment"]
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "operator"}, "spec": template["spec"]}
    apply = ("apply", "-n", "restricted", "--dry-run=server", "-f", "-")
    cluster.kubectl(*apply, stdin=json.dumps(pod))
    del pod["spec"]["securityContext"]
    with pytest.raises(ClusterProblem, match="violates PodSecurity"):
        cluster.kubectl(*apply, stdin=json.dumps(pod))


def test_the_service_monitor_has_the_fields_of_its_kind(helm):
    (monitor,) = [row for row in helm.render({"serviceMonitor": {"enabled": True}}) if row["kind"] == "ServiceMonitor"]
    assert monitor["apiVersion"] == "monitoring.coreos.com/v1"
    assert set(monitor["spec"]) == {"selector", "endpoints"}
    assert [set(endpoint) for endpoint in monitor["spec"]["endpoints"]] == [{"port", "path", "interval"}]


def test_an_install_makes_the_operator_and_a_resource_can_follow(cluster, release):
    notes = release("install", CHART, "--create-namespace")
    assert "kubectl wait moes/olmoe --for=condition=Ready" in notes
    assert names(cluster, "deployment", "-n", "moeserving-system") == ["deployment.apps/moeserving"]
    cluster.kubectl("wait", "crd/moeservings.moeserving.dev", "--for=condition=Established", "--timeout=30s")
    sample = notes.split("in moeserving.yaml:")[1].split("kubectl apply")[0]
    assert "created" in cluster.kubectl("apply", "-f", "-", stdin=sample)


def test_an_upgrade_brings_the_newer_crd(cluster, release, tmp_path):
    release("install", CHART, "--create-namespace")
    newer = tmp_path / "moeserving"
    subprocess.run(["cp", "-r", CHART, newer], check=True)
    template = newer / "templates/crd.yaml"
    text = template.read_text()
    assert "    shortNames:\n    - moes\n" in text
    template.write_text(text.replace("    - moes\n", "    - moes\n    - experts\n"))
    release("upgrade", newer)
    crd = json.loads(cluster.kubectl("get", "crd", "moeservings.moeserving.dev", "-o", "json"))
    assert crd["spec"]["names"]["shortNames"] == ["moes", "experts"]


def test_an_upgrade_with_nothing_new_changes_nothing(cluster, release):
    release("install", CHART, "--create-namespace")

    def versions():
        rows = json.loads(cluster.kubectl("get", "deployment,crd,role,clusterrole", "-A", "-o", "json"))["items"]
        return {
            (row["kind"], row["metadata"]["name"]): row["metadata"].get("generation")
            for row in rows
            if row["metadata"].get("labels", {}).get("app.kubernetes.io/managed-by") == "Helm"
        }

    before = versions()
    assert len(before) == 4
    release("upgrade", CHART)
    assert versions() == before


def test_uninstalling_leaves_the_crd_and_the_resources_alone(cluster, release):
    release("install", CHART, "--create-namespace")
    cluster.kubectl("wait", "crd/moeservings.moeserving.dev", "--for=condition=Established", "--timeout=30s")
    cluster.kubectl("apply", "-f", ROOT / "manifests/minimal.yaml")
    release("uninstall")
    left = "deployment,role,rolebinding,networkpolicy,poddisruptionbudget"
    assert names(cluster, left, "-n", "moeserving-system") == []
    assert not [name for name in names(cluster, "clusterrole,clusterrolebinding") if "moeserving" in name]
    assert names(cluster, "moeservings") == ["moeserving.moeserving.dev/olmoe"]
    release("install", CHART)
    assert names(cluster, "moeservings") == ["moeserving.moeserving.dev/olmoe"]


def test_uninstalling_takes_the_crd_where_that_was_asked_for(cluster, release):
    release("install", CHART, "--create-namespace", values={"crds": {"keep": False}})
    release("uninstall")
    cluster.kubectl("wait", "crd/moeservings.moeserving.dev", "--for=delete", "--timeout=30s")


def test_an_operator_of_one_namespace_has_no_right_in_another(cluster, release):
    for name in ("team-a", "team-b"):
        cluster.kubectl("create", "namespace", name)
    release("install", CHART, "--create-namespace", values={"watchNamespaces": ["team-a"]})
    account = cluster.service_account_kubeconfig("moeserving-system", "moeserving")

    def may(verb, kind, namespace):
        try:
            answer = cluster.kubectl("auth", "can-i", verb, kind, "-n", namespace, "--kubeconfig", account)
        except ClusterProblem:
            return False
        return answer.strip() == "yes"

    for verb, kind in [("create", "deployments.apps"), ("patch", "pods"), ("get", "secrets")]:
        assert may(verb, kind, "team-a")
        assert not may(verb, kind, "team-b")
    assert not may("create", "pods", "team-a")
    assert not may("list", "customresourcedefinitions", "team-a")
    assert not may("get", "secrets", "moeserving-system")


@pytest.fixture
def operator(cluster, free_port):
    """Runs the operator with the rights of the release's service account; says what it wrote when it ended."""
    running = []

    def run(*words):
        environment = os.environ | {
            "KUBECONFIG": str(cluster.service_account_kubeconfig("moeserving-system", "moeserving")),
            "MOESERVING_OPERATOR_NAMESPACE": "moeserving-system",
        }
        ports = ("--metrics-port=0", f"--liveness-port={free_port}", "--lease=moeserving")
        process = subprocess.Popen(
            [sys.executable, "-m", "moe_operator.cli", "operator", *ports, *words],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        running.append(process)
        return process

    yield run
    for process in running:
        process.kill()
        process.communicate()


@pytest.fixture
def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("namespaces", [[], ["team"]], ids=["whole cluster", "one namespace"])
def test_the_rights_are_enough_to_make_and_to_end_a_resource(cluster, release, operator, namespaces):
    if not names(cluster, "namespace", "team", "--ignore-not-found"):
        cluster.kubectl("create", "namespace", "team")
    release("install", CHART, "--create-namespace", values={"watchNamespaces": namespaces})
    cluster.kubectl("wait", "crd/moeservings.moeserving.dev", "--for=condition=Established", "--timeout=30s")
    process = operator(*(f"--namespace={name}" for name in namespaces))
    cluster.kubectl("apply", "-n", "team", "-f", ROOT / "manifests/minimal.yaml")
    children = {
        "deployment/olmoe-engine",
        "deployment/olmoe-gateway",
        "service/olmoe",
        "secret/olmoe-control",
        "configmap/olmoe-settings",
        "role/olmoe-gateway",
        "rolebinding/olmoe-gateway",
        "networkpolicy/olmoe-engine",
        "poddisruptionbudget/olmoe-gateway",
    }
    for child in sorted(children):
        cluster.kubectl("wait", "-n", "team", child, "--for=create", "--timeout=60s")
    status = '--for=jsonpath={.status.conditions[?(@.type=="Ready")].status}=False'
    cluster.kubectl("wait", "-n", "team", "moes/olmoe", status, "--timeout=60s")
    cluster.kubectl("delete", "-n", "team", "moes/olmoe", "--timeout=60s")
    assert names(cluster, "deployment,service,secret,networkpolicy", "-n", "team") == []
    process.terminate()
    _, output = process.communicate(timeout=30)
    assert process.returncode == 0, output
    lines = [line for line in output.splitlines() if "forbidden" in line.lower() or "error" in line.lower()]
    assert lines == []


def test_resources_left_by_a_removed_crd_are_ended_by_another_install(cluster, release, operator):
    """The way out that docs/install.md names."""
    crd = "crd/moeservings.moeserving.dev"
    release("install", CHART, "--create-namespace", values={"crds": {"keep": False}})
    cluster.kubectl("wait", crd, "--for=condition=Established", "--timeout=30s")
    first = operator()
    cluster.kubectl("apply", "-f", ROOT / "manifests/minimal.yaml")
    cluster.kubectl("wait", "service/olmoe", "--for=create", "--timeout=60s")
    first.terminate()
    first.communicate(timeout=30)
    release("uninstall")
    assert names(cluster, "moeservings") == ["moeserving.moeserving.dev/olmoe"]
    release("install", CHART, values={"crds": {"install": False}})
    operator()
    cluster.kubectl("wait", crd, "--for=delete", "--timeout=90s")
    assert names(cluster, "deployment,secret") == []
