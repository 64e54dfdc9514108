"""`moeserving doctor`: each check by a table, and the report."""

import copy
import io
import re
import tomllib
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from moe_contract.api_server import ApiError, Document, Kind
from moe_contract.input_errors import InputError, InvalidInput
from moe_operator.api.crd import build_crd
from moe_operator.cli import doctor as command
from moe_operator.cli.command import app
from moe_operator.doctor import control_plane, crd, machine, rights, workloads
from moe_operator.doctor.check import Check, CheckState, note, ok, problem
from moe_operator.doctor.fetch import ClusterView, ControlPlane
from moe_operator.doctor.report import build_report, check_cluster, render_sum, render_table
from moe_operator.kubernetes.kinds import INFERENCE_POOL, LEADER_WORKER_SET, POD_MONITOR, SERVICE_MONITOR, SERVING
from rich.console import Console
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parents[2]
OK, NOTE, PROBLEM = CheckState.OK, CheckState.NOTE, CheckState.PROBLEM
NOW = datetime(2026, 5, 4, 12, 0, 0, tzinfo=UTC)
FORBIDDEN, ABSENT = ApiError(403, "forbidden"), ApiError(404, "not found")
GONE, REFUSED = ApiError(0, "connection refused"), ApiError(401, "Unauthorized")


def found(check: Check, state: CheckState, *words: str) -> None:
    """The check has this state and its texts these words; a problem always says what to do."""
    assert check.state is state, check
    assert all(word in f"{check.finding}\n{check.advice}" for word in words), check
    assert check.advice or state is not PROBLEM


# The control plane.


@pytest.mark.parametrize(
    ("answer", "state", "word", "reachable"),
    [
        ({"gitVersion": "v1.34.1"}, OK, "context kind", True),
        (GONE, PROBLEM, "does not answer", False),
        (REFUSED, PROBLEM, "refuses the credentials", False),
        (FORBIDDEN, NOTE, "not to /version", True),
    ],
)
def test_the_api_server(answer: Document | ApiError, state: CheckState, word: str, reachable: bool) -> None:
    found(control_plane.check_reachable("context kind of config", answer), state, word, "context kind of config")
    assert control_plane.is_reachable(answer) is reachable


@pytest.mark.parametrize(
    ("answer", "state"),
    [
        ({"gitVersion": "v1.30.0"}, OK),
        ({"gitVersion": "v1.34.1-eks-113cf36"}, OK),
        ({"gitVersion": "v2.0.0"}, OK),
        ({"gitVersion": "v1.29.14+k3s1"}, PROBLEM),
        ({"gitVersion": "v1.9.0"}, PROBLEM),
        ({"gitVersion": "unknown"}, NOTE),
        ({}, NOTE),
        (FORBIDDEN, NOTE),
    ],
)
def test_the_version_of_kubernetes(answer: Document | ApiError, state: CheckState) -> None:
    found(control_plane.check_version(answer), state)


def test_the_least_version_and_the_labels_are_those_of_the_chart() -> None:
    chart = yaml.safe_load((ROOT / "charts/moeserving/Chart.yaml").read_text("utf-8"))
    assert chart["kubeVersion"] == f">={'.'.join(map(str, control_plane.LEAST_KUBERNETES))}.0-0"
    names = (ROOT / "charts/moeserving/templates/_names.tpl").read_text("utf-8")
    for label in control_plane.SELECTOR.replace("moeserving", "{{ .Chart.Name }}").split(","):
        assert label.replace("=", ": ") in names
    operator = (ROOT / "charts/moeserving/templates/operator.yaml").read_text("utf-8")
    assert '--lease={{ include "moeserving.name" . }}' in operator


def deployment(replicas: int = 1, ready: int = 1) -> Document:
    return {
        "metadata": {"name": "moeserving", "namespace": "system"},
        "spec": {"replicas": replicas},
        "status": {"readyReplicas": ready},
    }


@pytest.mark.parametrize(
    ("rows", "state"),
    [
        ([deployment()], OK),
        ([deployment(2, 1)], NOTE),
        ([deployment(1, 0)], PROBLEM),
        ([deployment(0, 0)], PROBLEM),
        ([], PROBLEM),
        (FORBIDDEN, NOTE),
    ],
)
def test_the_operators_deployment(rows: list[Document] | ApiError, state: CheckState) -> None:
    (check,) = control_plane.check_deployments(rows)
    found(check, state)


def lease(holder: str = "moeserving-1", age_s: float = 2.0, scope: str | None = None) -> Document:
    renewed = (NOW - timedelta(seconds=age_s)).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    annotations = {} if scope is None else {"moeserving.dev/namespaces": scope}
    spec = {"holderIdentity": holder, "leaseDurationSeconds": 15, "renewTime": renewed}
    return {"metadata": {"name": "moeserving", "annotations": annotations}, "spec": spec}


PODS = [{"metadata": {"name": "moeserving-1"}}]


@pytest.mark.parametrize(
    ("held", "pods", "state", "word"),
    [
        (lease(), PODS, OK, "moeserving-1 leads"),
        (lease(), FORBIDDEN, OK, "moeserving-1 leads"),
        (lease(age_s=-30), PODS, OK, "leads"),
        (lease(age_s=300), PODS, PROBLEM, "has not renewed"),
        (lease(""), PODS, PROBLEM, "nobody holds"),
        (lease("old"), PODS, PROBLEM, "is no pod of the operator"),
        (ABSENT, PODS, PROBLEM, "cannot be read"),
        (FORBIDDEN, PODS, NOTE, "cannot be read"),
        ({"metadata": {}, "spec": {"holderIdentity": "moeserving-1"}}, PODS, OK, "leads"),
    ],
)
def test_the_operators_lead(
    held: Document | ApiError, pods: list[Document] | ApiError, state: CheckState, word: str
) -> None:
    found(control_plane.check_lead(deployment(), held, pods, NOW), state, word)


@pytest.mark.parametrize(
    ("scopes", "state"), [((None,), OK), (("*",), OK), (("a,team",), OK), (("a", "team"), OK), (("a", "b"), PROBLEM)]
)
def test_the_namespaces_that_operators_serve(scopes: tuple[str | None, ...], state: CheckState) -> None:
    found(control_plane.check_scope("team", [lease(scope=scope) for scope in scopes]), state, "team")


# The definition of the kind.


def definition(**changes: Any) -> Document:
    """The definition of this version with fields of `spec` added or, with None, taken away."""
    document = copy.deepcopy(build_crd())
    fields = document["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]
    for name, value in changes.items():
        if value is None:
            del fields[name]
        else:
            fields[name] = value
    return document


def other_version() -> Document:
    document = definition()
    document["spec"]["versions"][0]["name"] = "v1"
    return document


def reworded() -> Document:
    document = definition()
    document["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["description"] = "Other words."
    return document


TEXT = {"type": "string"}


@pytest.mark.parametrize(
    ("answer", "served", "state", "words"),
    [
        (definition(), True, OK, ("is that of this version",)),
        (reworded(), True, OK, ("is that of this version",)),
        (definition(metrics=None), True, PROBLEM, ("older", "it lacks spec.metrics", "helm upgrade")),
        (definition(later=TEXT), True, NOTE, ("newer", "it has spec.later")),
        (definition(metrics=None, later=TEXT), True, PROBLEM, ("another", "spec.metrics", "spec.later")),
        (definition(metrics={"type": "object"}), True, PROBLEM, ("it lacks spec.metrics.",)),
        (other_version(), True, PROBLEM, ("no version v1alpha1",)),
        (ABSENT, False, PROBLEM, ("helm install",)),
        (FORBIDDEN, False, PROBLEM, ("helm install",)),
        (FORBIDDEN, True, NOTE, ("not compared",)),
        (FORBIDDEN, FORBIDDEN, PROBLEM, ("not known",)),
    ],
)
def test_the_definition(
    answer: Document | ApiError, served: bool | ApiError, state: CheckState, words: tuple[str, ...]
) -> None:
    found(crd.check_crd(answer, served), state, *words)


def test_a_default_or_a_bound_that_differs_is_a_note() -> None:
    document = definition()
    schema = document["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    schema["properties"]["spec"]["properties"]["paused"]["default"] = True
    document["metadata"]["labels"] = {"app.kubernetes.io/version": "0.2.0"}
    found(crd.check_crd(document, True), NOTE, "of 0.2.0", "other bounds or defaults")


def test_paths_name_lists_and_maps_and_a_field_of_the_name_description_stays() -> None:
    inner = {"type": "object", "properties": {"description": {"type": "string", "description": "A text."}}}
    schema = {"properties": {"rows": {"items": inner}, "map": {"additionalProperties": inner}}}
    assert crd.field_paths(schema) == {"rows", "rows[].description", "map", "map[].description"}
    kept = crd.without_descriptions(inner)
    assert kept == {"type": "object", "properties": {"description": {"type": "string"}}}


# Rights.


@pytest.mark.parametrize("right", rights.RIGHTS, ids=lambda right: right.name)
def test_each_right(right: rights.Right) -> None:
    found(rights.check_right(right, "team", True), OK, "team")
    missing = rights.check_right(right, "team", False)
    found(missing, PROBLEM if right.required else NOTE, right.purpose, f"`{right.verb}` on `{right.resource}`")
    found(rights.check_right(right, "team", FORBIDDEN), NOTE, "not known")


def test_a_subresource_is_asked_for_by_itself() -> None:
    attributes = rights.review_of(rights.RIGHTS[-1], "team")["spec"]["resourceAttributes"]
    assert attributes == {
        "namespace": "team", "verb": "create", "group": "", "resource": "pods", "subresource": "portforward",
    }  # fmt: skip


# Kinds, nodes and resources.


def resource(name: str = "tiny", conditions: list[Document] | None = None, **spec: Any) -> Document:
    status = {} if conditions is None else {"conditions": conditions}
    metadata = {"name": name, "creationTimestamp": "2026-05-04T11:00:00Z"}
    return {"metadata": metadata, "spec": spec, "status": status}


NEEDS = {
    LEADER_WORKER_SET: {"engine": {"parallelism": {"nodes": 2}}},
    INFERENCE_POOL: {"gateway": {"inferencePool": {}}},
}


@pytest.mark.parametrize("kind", NEEDS, ids=lambda kind: kind.name)
def test_a_kind_that_a_cluster_may_lack(kind: Kind) -> None:
    plain, needs = resource(), resource("big", **NEEDS[kind])
    found(workloads.check_kind(kind, True, [needs]), OK, "there")
    found(workloads.check_kind(kind, False, [plain]), OK, "absent")
    found(workloads.check_kind(kind, False, [plain, needs]), PROBLEM, "big needs it", "install")
    found(workloads.check_kind(kind, FORBIDDEN, [needs]), NOTE, "not known")
    assert not workloads.needs_kind(kind, {"engine": None, "gateway": None, "metrics": None})


@pytest.mark.parametrize(("kind", "whose"), [(SERVICE_MONITOR, "engines"), (POD_MONITOR, "gateways")])
def test_monitors_are_made_by_default_so_that_a_cluster_without_their_kinds_has_no_problem(
    kind: Kind, whose: str
) -> None:
    default = resource(metrics={"serviceMonitor": True})
    found(workloads.check_kind(kind, False, [default]), NOTE, "absent", whose, "all else works")
    found(workloads.check_kind(kind, False, [resource(metrics={"serviceMonitor": False})]), OK, "absent")
    found(workloads.check_kind(kind, True, [default]), OK, "there", whose)
    found(workloads.check_kind(kind, FORBIDDEN, [default]), NOTE, "not known")


def node(name: str, ready: str = "True", **allocatable: str) -> Document:
    devices = {key.replace("__", ".").replace("_", "/"): value for key, value in allocatable.items()}
    status = {"conditions": [{"type": "Ready", "status": ready}], "allocatable": {"cpu": "8", **devices}}
    return {"metadata": {"name": name}, "spec": {}, "status": status}


@pytest.mark.parametrize(
    ("rows", "state", "word"),
    [
        ([node("a"), node("b")], OK, "2 are ready"),
        ([node("a"), node("b") | {"spec": {"unschedulable": True}}], NOTE, "cordoned): b"),
        ([node("a"), node("b", "Unknown")], PROBLEM, "1 of 2 are not ready: b"),
        ([{"metadata": {"name": "new"}}], PROBLEM, "new"),
        ([], PROBLEM, "none"),
        (FORBIDDEN, NOTE, "not known"),
    ],
)
def test_nodes(rows: list[Document] | ApiError, state: CheckState, word: str) -> None:
    (check,) = workloads.check_nodes(rows)
    found(check, state, word)


@pytest.mark.parametrize(
    ("rows", "spec", "state", "word"),
    [
        ([node("a", nvidia__com_gpu="8"), node("b", nvidia__com_gpu="8")], {}, OK, "16 nvidia.com/gpu"),
        ([node("a", amd__com_gpu="4")], {}, PROBLEM, "tiny needs nvidia.com/gpu"),
        ([node("a", amd__com_gpu="4")], {"engine": {"resources": {"gpuResource": "amd.com/gpu"}}}, OK, "4 amd.com/gpu"),
        ([node("a", nvidia__com_gpu="0")], {}, PROBLEM, "no node offers any"),
        ([node("a", "False", nvidia__com_gpu="8")], {}, PROBLEM, "no node offers any"),
        ([node("a")], {"engine": {"runtime": "vllm-cpu"}}, NOTE, "no node offers any"),
        ([node("a")], {"engine": {"replicas": 0}}, NOTE, "no node offers any"),
    ],
)
def test_gpus(rows: list[Document], spec: Document, state: CheckState, word: str) -> None:
    found(workloads.check_devices(rows, [resource(**spec)]), state, word)


def condition(kind: str, status: str, reason: str = "Reason", message: str = "words") -> Document:
    time = "2026-05-04T11:30:00Z"
    return {"type": kind, "status": status, "reason": reason, "message": message, "lastTransitionTime": time}


@pytest.mark.parametrize(
    ("conditions", "state", "words"),
    [
        ([condition("Ready", "True", "Serving")], OK, ("Serving",)),
        ([condition("Ready", "False", "NoEngine")], NOTE, ("NoEngine", "describe moes tiny")),
        (
            [condition("Ready", "True", "Serving"), condition("Degraded", "True", "Unschedulable", "no room")],
            PROBLEM, ("Degraded: Unschedulable: no room", "docs/troubleshooting.md"),
        ),
        ([condition("Degraded", "False", "AsExpected")], NOTE, ("no condition `Ready`",)),
        ([], PROBLEM, ("no operator has looked at it since 2026-05-04 11:00 UTC",)),
    ],
)  # fmt: skip
def test_a_resource(conditions: list[Document], state: CheckState, words: tuple[str, ...]) -> None:
    (check,) = workloads.check_serving(resource(conditions=conditions), NOW)
    found(check, state, *words)


def test_each_condition_that_needs_a_person_is_a_line_and_a_new_resource_is_waited_for() -> None:
    bad = [condition("Degraded", "True"), condition("AutoscalingLimited", "True")]
    assert [check.state for check in workloads.check_serving(resource(conditions=bad), NOW)] == [PROBLEM, PROBLEM]
    (check,) = workloads.check_serving(resource(), NOW - timedelta(minutes=59))
    found(check, NOTE, "new")


# This machine.


@pytest.mark.parametrize(
    ("version", "state"), [((3, 10, 14), PROBLEM), ((3, 11, 0), OK), ((3, 13, 9), OK), ((3, 14, 0), PROBLEM)]
)
def test_python(version: tuple[int, ...], state: CheckState) -> None:
    found(machine.check_python(version), state, ".".join(map(str, version)))


def test_the_versions_of_python_are_those_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    least, before = ("{}.{}".format(*row) for row in (machine.LEAST_PYTHON, machine.BEFORE_PYTHON))
    assert project["requires-python"] == f">={least},<{before}"
    for extra, package in machine.PACKAGES.items():
        names = [re.split(r"[\[>=~]", row)[0].replace("-", "_") for row in project["optional-dependencies"][extra]]
        assert package in names


def refuse() -> str:
    raise InvalidInput([InputError("", "vLLM 0.31.0 is installed")])


def test_packages_vllm_devices_and_memory() -> None:
    found(machine.check_packages(()), OK)
    found(machine.check_packages({"gateway", "agent"}), PROBLEM, "moeserving[agent,gateway]")
    found(machine.check_vllm(lambda: "vLLM 0.32.0, on CPUs"), OK, "vLLM 0.32.0, on CPUs")
    found(machine.check_vllm(refuse), PROBLEM, "vLLM 0.31.0 is installed")
    found(machine.check_vllm(None), PROBLEM, "moeserving[agent,gpu]")
    found(machine.check_gpus(("0", "1"), 8), OK, "2 GPUs, 8 CPUs")
    found(machine.check_gpus((), 8), OK, "no GPU", "vllm-cpu")
    found(machine.check_memory(20 << 30, 32 << 30), OK, "20.0 of 32.0 GiB")
    found(machine.check_memory(1 << 30, 32 << 30), NOTE, "1.0 of 32.0 GiB")


# The report.


def running(name: str, ready: bool = True, waiting: str = "") -> Document:
    state = {"waiting": {"reason": waiting}} if waiting else {"running": {}}
    container = {"image": "registry.test/it:1", "imageID": "" if waiting else "sha256:1", "state": state}
    conditions = [{"type": "Ready", "status": "True" if ready else "False"}]
    status = {"phase": "Running", "conditions": conditions, "containerStatuses": [container]}
    return {"metadata": {"name": name}, "spec": {}, "status": status}


def test_a_cluster_in_order_has_no_problem_and_one_that_is_gone_has_one_line() -> None:
    serving = resource(conditions=[condition("Ready", "True", "Serving")], engine={"runtime": "vllm-cpu"})
    view = ClusterView(
        source="context kind", namespace="team", version={"gitVersion": "v1.34.0"}, crd=definition(),
        kinds={SERVING: True, **dict.fromkeys(workloads.OPTIONAL, False)},
        rights=dict.fromkeys(rights.RIGHTS, True), deployments=[deployment()],
        control_planes=[ControlPlane(deployment=deployment(), lease=lease(), pods=PODS)],
        nodes=[node("a", nvidia__com_gpu="8")], servings=[serving], pods=[running("a")], dns_pods=[running("dns")],
    )  # fmt: skip
    checks = check_cluster(view, NOW)
    assert {check.state for check in checks} == {OK}
    assert len(checks) == 21
    assert [check.name for check in check_cluster(ClusterView(source="x", namespace="y", version=GONE), NOW)] == [
        "API server"
    ]


CHECKS = [ok("nodes", "3 are ready"), note("GPUs", "none"), problem("CRD", "absent", "install the chart " * 8)]


def test_the_table_fits_80_columns_and_has_the_advice_below_its_problem() -> None:
    text = io.StringIO()
    Console(width=80, file=text).print(render_table(CHECKS))
    lines = [line.rstrip() for line in text.getvalue().splitlines()]
    assert max(map(len, lines)) <= 80
    assert [line.split()[0] for line in lines[:3]] == ["ok", "note", "problem"]
    assert lines[3].strip().startswith("-> install the chart")


def test_the_report_for_programs_and_the_sum() -> None:
    report = build_report(CHECKS)
    assert (report["problems"], len(report["checks"])) == (1, 3)
    assert report["checks"][1] == {"check": "GPUs", "state": "note", "finding": "none", "advice": None}
    assert render_sum(CHECKS) == "1 problem, 1 note"
    assert render_sum(CHECKS[:1]) == "no problem"
    assert render_sum(CHECKS[:2] * 2) == "no problem, 2 notes"


@pytest.mark.parametrize(
    ("words", "checks", "status"),
    [((), CHECKS[:2], 0), ((), CHECKS, 1), (("-o", "json"), CHECKS, 1), (("-o", "yaml"), CHECKS, 1)],
)
def test_the_status_says_whether_there_is_a_problem(
    monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], checks: list[Check], status: int
) -> None:
    monkeypatch.setattr(command, "check_machine", lambda: checks)
    done = CliRunner().invoke(app, ["doctor", "--local", *words])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    assert (done.exit_code, "nodes" in done.output) == (status, True)


@pytest.mark.parametrize(
    ("words", "kubeconfig", "status", "alone"),
    [((), "", 0, True), (("-n", "team"), "", 1, False), ((), "/nonexistent/kubeconfig", 1, False)],
)
def test_without_a_cluster_this_machine_is_looked_at(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    words: tuple[str, ...],
    kubeconfig: str,
    status: int,
    alone: bool,
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setattr(command, "DEFAULT_KUBECONFIG", tmp_path / ".kube/config")
    monkeypatch.setattr(command, "check_machine", lambda: [ok("Python", "3.11")])
    done = CliRunner(env={"KUBECONFIG": kubeconfig}).invoke(app, ["doctor", *words])
    assert (done.exit_code, "Python" in done.output, "no such file" in " ".join(done.output.split())) == (
        status, alone, True,
    )  # fmt: skip
