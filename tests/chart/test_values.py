"""The chart's values: each has an effect, and an unknown one is refused."""

import copy
import importlib.util
import json
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "charts/moeserving"


def load_generator():
    spec = importlib.util.spec_from_file_location("chart_generate", ROOT / "charts/generate.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["chart_generate"] = module
    spec.loader.exec_module(module)
    return module


generate = load_generator()
VALUES = (CHART / "values.yaml").read_text()
ROWS = generate.read_rows(VALUES)
SCHEMA = json.loads((CHART / "values.schema.json").read_text())

# Another value for each documented one, and where it only counts beside others, those.
OTHER = {
    "fullnameOverride": "serving",
    "watchNamespaces": ["team-a", "team-b"],
    "replicas": 2,
    "workers": 16,
    "resyncSeconds": 60,
    "leaseDurationSeconds": 30,
    "crds.install": False,
    "crds.keep": False,
    "images.registry": "registry.example.com/mirror",
    "images.pullPolicy": "Always",
    "images.operator.repository": "team/operator",
    "images.operator.tag": "9.9.9",
    "images.gateway.repository": "team/gateway",
    "images.gateway.tag": "9.9.9",
    "images.engine.repository": "team/engine",
    "images.engine.tag": "9.9.9",
    "images.engineCpu.repository": "team/engine-cpu",
    "images.engineCpu.tag": "9.9.9",
    "imagePullSecrets": [{"name": "registry"}],
    "rbac.create": False,
    "rbac.acrossNamespaces": False,
    "serviceAccount.create": False,
    "serviceAccount.name": "other",
    "serviceAccount.annotations": {"example.com/role": "reader"},
    "networkPolicy.enabled": False,
    "networkPolicy.metricsFrom": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "metrics"}}}],
    "serviceMonitor.enabled": True,
    "serviceMonitor.interval": "15s",
    "serviceMonitor.labels": {"release": "prometheus"},
    "dashboards.enabled": True,
    "dashboards.labels": {"grafana_board": "yes"},
    "dashboards.annotations": {"grafana_folder": "MoEServing"},
    "dashboards.namespace": "monitoring",
    "alerts.enabled": True,
    "alerts.labels": {"release": "prometheus"},
    "alerts.slowFirstTokenSeconds": 2.5,
    "alerts.runbook": "https://docs.example.com/alerts",
    "podDisruptionBudget.enabled": False,
    "resources": {"requests": {"cpu": "1", "memory": "1Gi"}},
    "extraEnv": [{"name": "HTTPS_PROXY", "value": "http://proxy.example.com:3128"}],
    "podAnnotations": {"example.com/scrape": "true"},
    "podLabels": {"example.com/team": "serving"},
    "podSecurityContext": {"runAsNonRoot": True, "runAsUser": 1000},
    "securityContext": {"readOnlyRootFilesystem": False},
    "priorityClassName": "system-cluster-critical",
    "nodeSelector": {"kubernetes.io/os": "linux"},
    "tolerations": [{"key": "control", "operator": "Exists"}],
    "affinity": {"nodeAffinity": {}},
}
BESIDE = {
    "rbac.acrossNamespaces": {"watchNamespaces": ["team-a"]},
    "serviceMonitor.interval": {"serviceMonitor.enabled": True},
    "serviceMonitor.labels": {"serviceMonitor.enabled": True},
    "dashboards.labels": {"dashboards.enabled": True},
    "dashboards.annotations": {"dashboards.enabled": True},
    "dashboards.namespace": {"dashboards.enabled": True},
    "alerts.labels": {"alerts.enabled": True},
    "alerts.slowFirstTokenSeconds": {"alerts.enabled": True},
    "alerts.runbook": {"alerts.enabled": True},
    "podDisruptionBudget.enabled": {"replicas": 2},
}


def nested(values):
    """Paths in dots as the mapping that they mean."""
    whole = {}
    for path, value in values.items():
        *parents, last = path.split(".")
        place = whole
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = copy.deepcopy(value)
    return whole


def test_each_documented_value_has_another_to_try():
    assert {row.path for row in ROWS} == set(OTHER)


@pytest.mark.parametrize("path", OTHER)
def test_each_value_has_an_effect(render, path):
    beside = BESIDE.get(path, {})
    assert render(nested(beside | {path: OTHER[path]})) != render(nested(beside))


def test_the_defaults_are_what_the_schema_allows():
    jsonschema.validate(yaml.safe_load(VALUES), SCHEMA)


def test_the_schema_knows_the_values_and_no_others():
    known = {
        f"{name}.{key}" if part.get("additionalProperties") is False else name
        for name, part in SCHEMA["properties"].items()
        for key in part.get("properties", {"": None})
    }
    written = {".".join(row.path.split(".")[:2]) for row in ROWS}
    assert known - {"global", "resources.requests", "resources.limits"} == written - {"resources"}


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("replica", 2, "additional properties 'replica' not allowed"),
        ("images.operator.tags", "1", "additional properties 'tags' not allowed"),
        ("replicas", "two", "got string, want integer"),
        ("replicas", -1, "minimum: got -1, want 0"),
        ("workers", 0, "minimum: got 0, want 1"),
        ("resyncSeconds", 0.5, "got number, want integer"),
        ("crds.install", "yes", "got string, want boolean"),
        ("watchNamespaces", "team-a", "got string, want array"),
        ("watchNamespaces", ["Team"], "'Team' does not match pattern"),
        ("watchNamespaces", [""], "minLength: got 0, want 1"),
        ("watchNamespaces", ["a", "a"], "items at 0 and 1 are equal"),
        ("images.pullPolicy", "Sometimes", "value must be one of 'Always', 'IfNotPresent', 'Never'"),
        ("images.operator.tag", "a tag", "does not match pattern"),
        ("serviceMonitor.interval", "soon", "does not match pattern"),
        ("dashboards.folder", "x", "additional properties 'folder' not allowed"),
        ("alerts.slowFirstTokenSeconds", 0, "exclusiveMinimum: got 0, want 0"),
        ("extraEnv", [{"value": "1"}], "missing property 'name'"),
        ("extraEnv", [{"name": "MOESERVING_IMAGE_ENGINE", "value": "x"}], "'not' failed"),
        ("podLabels", {"app.kubernetes.io/component": "x"}, "invalid propertyName"),
        ("resources.limits", {"memory": "lots"}, "does not match pattern"),
    ],
)
def test_a_value_that_is_none_is_refused_and_its_place_named(helm, path, value, message):
    with pytest.raises(helm.Refused, match="values don't meet the specifications of the schema") as refused:
        helm.render(nested({path: value}))
    assert message in str(refused.value)
    if "additional" not in message:
        assert "/" + path.replace(".", "/") in str(refused.value)


def test_a_digest_may_stand_behind_the_tag(render):
    digest = "sha256:" + "0" * 64
    (deployment,) = [
        row for row in render(nested({"images.operator.tag": f"1.2.3@{digest}"})) if row["kind"] == "Deployment"
    ]
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert container["image"] == f"moeserving/gateway-operator:1.2.3@{digest}"


def test_a_value_without_a_comment_is_found():
    with pytest.raises(generate.ChartError, match=r"values.yaml: a\.c: has no comment"):
        generate.read_rows("a:\n  # -- One.\n  b: 1\n  c: 2\n")


def test_a_row_has_all_lines_of_its_comment_and_its_own_default():
    (row,) = generate.read_rows("# Not a value's.\n\n# -- One\n# and two.\n# @default -- nothing\na: {}\n")
    assert (row.path, row.text, row.default) == ("a", "One and two.", "nothing")
