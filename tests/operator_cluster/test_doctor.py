"""`moeserving doctor` on a real API server: with the CRD, an older one, a newer one and none, and with few rights."""

import copy
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import cluster_life
import pytest
import yaml
from cluster_api import ApiCluster
from moe_operator.cli.command import app
from operator_process import eventually
from serving_documents import CRD, serving
from typer.testing import CliRunner

Document = dict[str, Any]
DEFINITION: Document = yaml.safe_load(CRD.read_text())
TWO_NODES = {"parallelism": {"data": 16, "nodes": 2, "expert": True}}
NAME = DEFINITION["metadata"]["name"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiCluster]:
    """A cluster of its own: the CRD comes and goes here."""
    folder = tmp_path_factory.mktemp("doctor-cluster") / "state"
    started = cluster_life.up("api", folder, tied=True)
    assert isinstance(started, ApiCluster)
    yield started
    cluster_life.down(folder)


def look(kubeconfig: Path, *words: str) -> tuple[int, dict[str, Document], str]:
    """Status of the command, its checks by name, and stderr."""
    done = CliRunner(env={"KUBECONFIG": str(kubeconfig)}).invoke(app, ["doctor", "-o", "json", *words])
    report = json.loads(done.stdout)
    checks = {row["check"]: row for row in report["checks"]}
    assert report["problems"] == [row["state"] for row in report["checks"]].count("problem")
    return done.exit_code, checks, done.stderr


def install(cluster: ApiCluster, definition: Document) -> None:
    """The definition in the place of the one before, as the API server has it."""
    cluster.kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", stdin=yaml.safe_dump(definition))
    eventually(lambda: is_served(cluster), "the kind is served")


def is_served(cluster: ApiCluster) -> bool:
    return "moeservings" in cluster.kubectl("api-resources", "--api-group", "moeserving.dev", "-o", "name")


def spec_of(definition: Document) -> Document:
    schema = definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    fields: Document = schema["properties"]["spec"]["properties"]
    return fields


def test_a_cluster_without_the_crd_and_with_that_of_each_age(cluster: ApiCluster) -> None:
    status, checks, said = look(cluster.kubeconfig)
    assert (status, said) == (1, "")
    assert (checks["API server"]["state"], checks["Kubernetes"]["state"]) == ("ok", "ok")
    assert str(cluster.kubeconfig) in checks["API server"]["finding"]
    assert checks["CRD"]["state"] == "problem"
    assert "helm install" in checks["CRD"]["advice"]
    assert (checks["operator"]["state"], checks["nodes"]["state"]) == ("problem", "problem")
    assert checks["LeaderWorkerSet"]["state"] == "ok"

    install(cluster, DEFINITION)
    _, checks, _ = look(cluster.kubeconfig)
    assert checks["CRD"] == {
        "check": "CRD", "state": "ok", "finding": f"{NAME} is that of this version", "advice": None,
    }  # fmt: skip
    assert checks["MoEServings in default"]["state"] == "ok"

    older = copy.deepcopy(DEFINITION)
    del spec_of(older)["metrics"]
    install(cluster, older)
    crd = look(cluster.kubeconfig)[1]["CRD"]
    assert (crd["state"], "older" in crd["finding"], "spec.metrics" in crd["finding"]) == ("problem", True, True)

    newer = copy.deepcopy(DEFINITION)
    spec_of(newer)["later"] = {"type": "string"}
    install(cluster, newer)
    crd = look(cluster.kubeconfig)[1]["CRD"]
    assert (crd["state"], crd["finding"].endswith("it has spec.later")) == ("note", True)
    cluster.kubectl("delete", "crd", NAME)


LABELS = {"app.kubernetes.io/name": "moeserving", "app.kubernetes.io/component": "operator"}
POD_SPEC = {"containers": [{"name": "operator", "image": "operator"}]}


def operator_objects(holder: str, scope: str) -> list[Document]:
    """A Deployment as the chart's, its one pod, and its Lease."""
    renewed = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    place = {"namespace": "system", "name": "moeserving"}
    template = {"metadata": {"labels": LABELS}, "spec": POD_SPEC}
    spec = {"replicas": 1, "selector": {"matchLabels": LABELS}, "template": template}
    held = {"holderIdentity": holder, "leaseDurationSeconds": 15, "renewTime": renewed}
    lease = {"metadata": place | {"annotations": {"moeserving.dev/namespaces": scope}}, "spec": held}
    pod = {"metadata": {"namespace": "system", "name": "moeserving-1", "labels": LABELS}, "spec": POD_SPEC}
    return [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "system"}},
        {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": place | {"labels": LABELS}, "spec": spec},
        {"apiVersion": "v1", "kind": "Pod"} | pod,
        {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease"} | lease,
    ]


def test_an_operator_that_leads_and_one_that_serves_others(cluster: ApiCluster) -> None:
    cluster.kubectl("apply", "-f", "-", stdin=yaml.safe_dump_all(operator_objects("moeserving-1", "team")))
    _, checks, _ = look(cluster.kubeconfig, "-n", "team")
    assert (checks["operator"]["state"], checks["operator"]["finding"]) == (
        "problem", "system/moeserving: 0 of 1 pods are ready",
    )  # fmt: skip
    assert (checks["operator's lead"]["state"], checks["operator's namespaces"]["state"]) == ("ok", "ok")
    cluster.kubectl("apply", "-f", "-", stdin=yaml.safe_dump_all(operator_objects("another", "other")))
    _, checks, _ = look(cluster.kubeconfig, "-n", "team")
    assert (checks["operator's lead"]["state"], checks["operator's namespaces"]["state"]) == ("problem", "problem")
    cluster.kubectl("delete", "deployment,lease", "moeserving", "-n", "system")


def test_a_user_with_few_rights_learns_which_are_missing_and_their_use(cluster: ApiCluster) -> None:
    install(cluster, DEFINITION)
    cluster.kubectl("create", "namespace", "team")
    cluster.kubectl("-n", "team", "create", "role", "reads", "--verb=get,list", "--resource=moeservings.moeserving.dev")
    cluster.kubectl("-n", "team", "create", "rolebinding", "reads", "--role=reads", "--user=reader")
    cluster.kubectl(
        "-n",
        "team",
        "apply",
        "-f",
        "-",
        stdin=json.dumps(serving(engine=TWO_NODES)),
    )
    status, checks, said = look(cluster.user_kubeconfig("reader", "users"), "--namespace", "team")
    assert (status, said) == (1, "")
    assert {name.removeprefix("right: "): row["state"] for name, row in checks.items() if name.startswith("right")} == {
        "get moeservings": "ok",
        "list moeservings": "ok",
        "create moeservings": "problem",
        "list pods": "note",
        "get secrets": "note",
        "create pods/portforward": "note",
    }
    assert "a Role in team with the verb `create`" in checks["right: create moeservings"]["advice"]
    # Served, which each user may know; the rest is not known and no problem for that.
    assert (checks["CRD"]["state"], checks["operator"]["state"], checks["nodes"]["state"]) == ("note", "note", "note")
    assert "forbidden" in checks["CRD"]["finding"]
    assert (checks["LeaderWorkerSet"]["state"], "tiny needs it" in checks["LeaderWorkerSet"]["finding"]) == (
        "problem", True,
    )  # fmt: skip
    assert checks["MoEServing tiny"]["state"] == "note"


def test_a_context_that_is_not_there_and_an_api_server_that_is_gone_are_lines_and_no_tracebacks(
    cluster: ApiCluster, tmp_path: Path
) -> None:
    status, checks, said = look(cluster.kubeconfig, "--context", "absent")
    assert (status, [*checks], said) == (1, ["cluster"], "")
    assert "absent" in checks["cluster"]["finding"]
    gone = tmp_path / "kubeconfig"
    gone.write_text(cluster.kubeconfig.read_text().replace(str(cluster.endpoints.api_port), "9"))
    status, checks, said = look(gone)
    assert (status, checks["API server"]["state"], said) == (1, "problem", "")
    assert "does not answer" in checks["API server"]["finding"]
    assert [*checks] == ["API server", "kubectl"]
