"""What the chart makes, by the objects that Helm renders."""

import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml
from moe_operator.cli.operator import operator
from moe_operator.kubernetes.kinds import CHILDREN, EVENT, LEASE, NAMESPACE, POD, SERVING
from moe_operator.kubernetes.rivals import FORMER_LEASE
from moe_operator.kubernetes.settings import read_defaults
from moe_operator.plan.access import build_access
from moe_operator.plan.names import COMPONENT, Names
from moe_operator.plan.network_policies import _operator_peers
from moe_operator.plan.pods import Defaults

ROOT = Path(__file__).resolve().parents[2]
CRD = "moeservings.moeserving.dev"


def of_kind(documents, kind):
    return [document for document in documents if document["kind"] == kind]


def one(documents, kind):
    (document,) = of_kind(documents, kind)
    return document


def operator_pod(documents):
    return one(documents, "Deployment")["spec"]["template"]


def granted(rules):
    """(group, resource, verb) of each right."""
    return {
        (group, resource, verb)
        for rule in rules
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


def needed():
    """What the operator does, by the kinds that it knows."""
    for kind in CHILDREN:
        yield from ((kind.group, kind.plural, verb) for verb in ("get", "list", "watch", "create", "patch", "delete"))
    yield from ((POD.group, POD.plural, verb) for verb in ("get", "list", "watch", "patch", "delete"))
    yield from ((SERVING.group, SERVING.plural, verb) for verb in ("get", "list", "watch", "patch"))
    yield from ((SERVING.group, f"{SERVING.plural}/status", verb) for verb in ("get", "patch"))
    yield SERVING.group, f"{SERVING.plural}/finalizers", "update"
    yield from ((EVENT.group, EVENT.plural, verb) for verb in ("get", "list", "create", "patch"))
    yield NAMESPACE.group, NAMESPACE.plural, "get"


def lent():
    """What the operator grants to gateways, and so must hold itself."""
    (role,) = (document for document in build_access(Names("a")) if document["kind"] == "Role")
    return granted(role["rules"])


LEASES = {(LEASE.group, LEASE.plural, "list")}
CLUSTER_ONLY = LEASES | {
    ("apiextensions.k8s.io", "customresourcedefinitions", verb) for verb in ("get", "list", "watch")
}


def test_the_operator_may_do_in_the_cluster_what_it_does_and_no_more(render):
    documents = render()
    assert granted(one(documents, "ClusterRole")["rules"]) == set(needed()) | lent() | CLUSTER_ONLY
    assert [role["metadata"]["name"] for role in of_kind(documents, "Role")] == ["moeserving-election"]


def test_with_namespaces_the_operator_may_outside_of_them_only_what_outlasts_their_roles(render):
    documents = render({"watchNamespaces": ["team-a", "team-b"]})
    resource = {row for row in needed() if row[0] == SERVING.group}
    across = granted(one(documents, "ClusterRole")["rules"])
    assert across == resource | LEASES | {(NAMESPACE.group, NAMESPACE.plural, "get")}
    closed = render({"watchNamespaces": ["team-a", "team-b"], "rbac": {"acrossNamespaces": False}})
    assert not of_kind(closed, "ClusterRole")
    assert not of_kind(closed, "ClusterRoleBinding")
    roles = {role["metadata"]["namespace"]: role for role in of_kind(documents, "Role")}
    assert set(roles) == {"team-a", "team-b", "moeserving-system"}
    for namespace in ("team-a", "team-b"):
        assert granted(roles[namespace]["rules"]) == set(needed()) | lent()
    arguments = operator_pod(documents)["spec"]["containers"][0]["command"]
    assert [word for word in arguments if word.startswith("--namespace")] == [
        "--namespace=team-a",
        "--namespace=team-b",
    ]


def test_the_own_namespace_may_be_one_of_those_served(render):
    documents = render({"watchNamespaces": ["moeserving-system"]})
    names = [(role["metadata"]["namespace"], role["metadata"]["name"]) for role in of_kind(documents, "Role")]
    assert len(names) == len(set(names)) == 2


@pytest.mark.parametrize("values", [{}, {"watchNamespaces": ["team-a"]}])
def test_the_operator_may_hold_its_lease_and_no_other(render, values):
    (role,) = [row for row in of_kind(render(values), "Role") if row["metadata"]["name"] == "moeserving-election"]
    by_name = {tuple(rule.get("resourceNames", [])): set(rule["verbs"]) for rule in role["rules"]}
    assert by_name == {("moeserving",): {"get", "update"}, (FORMER_LEASE,): {"get"}, (): {"create", "list"}}
    assert "--lease=moeserving" in operator_pod(render(values))["spec"]["containers"][0]["command"]
    assert {(rule["apiGroups"][0], rule["resources"][0]) for rule in role["rules"]} == {(LEASE.group, LEASE.plural)}


def test_every_binding_names_a_role_that_is_made_and_the_service_account(render):
    for values in ({}, {"watchNamespaces": ["team-a"]}, {"serviceAccount": {"name": "other"}}):
        documents = render(values)
        made = {(row["kind"], row["metadata"]["name"], row["metadata"].get("namespace")) for row in documents}
        account = one(documents, "ServiceAccount")["metadata"]["name"]
        assert operator_pod(documents)["spec"]["serviceAccountName"] == account
        for binding in [*of_kind(documents, "RoleBinding"), *of_kind(documents, "ClusterRoleBinding")]:
            role = binding["roleRef"]
            assert (role["kind"], role["name"], binding["metadata"].get("namespace")) in made
            subject = {"kind": "ServiceAccount", "name": account, "namespace": "moeserving-system"}
            assert binding["subjects"] == [subject]


def test_two_releases_share_no_object(helm):
    first, second = (
        {
            (row["kind"], row["metadata"]["name"], row["metadata"].get("namespace"))
            for row in yaml.safe_load_all(helm.run("template", "moeserving", ROOT / "charts/moeserving", "-n", name))
            if row and row["kind"] != "CustomResourceDefinition"
        }
        for name in ("one", "two")
    )
    assert not first & second


def test_the_operator_is_found_by_the_policies_of_engines_and_gateways(render):
    (peer,) = _operator_peers(Defaults(operator_namespace="moeserving-system"))
    labels = operator_pod(render())["metadata"]["labels"]
    assert peer["podSelector"]["matchLabels"].items() <= labels.items()
    assert labels[COMPONENT] == "operator"


def test_all_that_select_the_operator_select_its_pods(render):
    values = {"replicas": 2, "serviceMonitor": {"enabled": True}, "podLabels": {"example.com/team": "a"}}
    documents = render(values)
    labels = operator_pod(documents)["metadata"]["labels"]
    service = one(documents, "Service")
    selectors = [
        one(documents, "Deployment")["spec"]["selector"]["matchLabels"],
        one(documents, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"],
        one(documents, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        service["spec"]["selector"],
    ]
    assert all(selector.items() <= labels.items() for selector in selectors)
    monitor = one(documents, "ServiceMonitor")["spec"]
    assert monitor["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert monitor["endpoints"][0]["port"] in [port["name"] for port in service["spec"]["ports"]]


def test_a_budget_is_made_only_where_there_is_something_to_keep(render):
    assert not of_kind(render(), "PodDisruptionBudget")
    assert not of_kind(render({"replicas": 1}), "PodDisruptionBudget")
    assert one(render({"replicas": 3}), "PodDisruptionBudget")["spec"]["maxUnavailable"] == 1


def test_the_crd_is_the_generated_one_and_stays_by_default(render):
    crd = one(render(), "CustomResourceDefinition")
    assert crd["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}
    assert "annotations" not in one(render({"crds": {"keep": False}}), "CustomResourceDefinition")["metadata"]
    source = yaml.safe_load((ROOT / "crds/moeserving.yaml").read_text())
    assert (crd["metadata"]["name"], crd["spec"]) == (CRD, source["spec"])
    assert not of_kind(render({"crds": {"install": False}}), "CustomResourceDefinition")


def test_images_reach_the_operator_under_the_names_that_it_reads(render):
    images = {name: {"repository": f"team/{name.lower()}", "tag": "7"} for name in ("engine", "engineCpu", "gateway")}
    images |= {"pullPolicy": "Never", "registry": "example.com/"}
    (container,) = operator_pod(render({"images": images}))["spec"]["containers"]
    environment = {row["name"]: row["value"] for row in container["env"] if "value" in row}
    defaults = read_defaults(environment, "moeserving-system")
    assert defaults.engine_image == "example.com/team/engine:7"
    assert defaults.engine_cpu_image == "example.com/team/enginecpu:7"
    assert defaults.gateway_image == "example.com/team/gateway:7"
    assert defaults.pull_policy == "Never"


def test_by_default_the_images_are_those_of_the_operator_without_a_chart(render):
    (container,) = operator_pod(render())["spec"]["containers"]
    environment = {row["name"]: row["value"] for row in container["env"] if "value" in row}
    known = Defaults()
    defaults = read_defaults(environment, "moeserving-system")
    assert (defaults.engine_image, defaults.engine_cpu_image, defaults.gateway_image) == (
        known.engine_image,
        known.engine_cpu_image,
        known.gateway_image,
    )


def test_the_command_line_is_one_that_the_operator_takes(render):
    app = typer.Typer()
    app.command()(operator)
    (container,) = operator_pod(render({"watchNamespaces": ["team-a"]}))["spec"]["containers"]
    program, verb, *words = container["command"]
    assert (program, verb) == ("moeserving", "operator")
    command = typer.main.get_command(app)
    taken = command.make_context("operator", list(words)).params
    assert taken["namespace"] == ["team-a"]
    assert (taken["liveness_port"], taken["metrics_port"]) == (8080, 8081)
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"liveness": taken["liveness_port"], "metrics": taken["metrics_port"]}


def test_the_operator_can_write_nothing_but_a_folder_of_its_own(render):
    pod = operator_pod(render())["spec"]
    (container,) = pod["containers"]
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert container["volumeMounts"] == [{"name": "tmp", "mountPath": "/tmp"}]
    assert pod["volumes"] == [{"name": "tmp", "emptyDir": {}}]


@pytest.mark.parametrize(
    ("release", "name"), [("a" * 53, "a" * 53 + "-moeservin"), ("moeserving-two", "moeserving-two")]
)
def test_a_name_is_made_of_the_release_and_no_longer_than_a_label(helm, release, name):
    text = helm.run("template", release, ROOT / "charts/moeserving")
    assert one([row for row in yaml.safe_load_all(text) if row], "Deployment")["metadata"]["name"] == name


def test_the_notes_show_the_smallest_sample(helm):
    sample = (ROOT / "manifests/minimal.yaml").read_text()
    body = [line for line in sample.splitlines() if not line.startswith("#")]
    notes = (ROOT / "charts/moeserving/templates/NOTES.txt").read_text()
    assert "\n".join(f"  {line}" for line in body) in notes


def test_the_chart_passes_helms_own_check(helm):
    assert "0 chart(s) failed" in helm.run("lint", ROOT / "charts/moeserving", "--strict")


def test_the_generated_files_are_those_of_their_sources():
    done = subprocess.run(
        [sys.executable, ROOT / "charts/generate.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
