"""A pod template is refused with the path and the remedy, or the pod has all that the operator relies on."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from moe_contract.input_errors import InvalidInput
from moe_operator.api import parse_resource
from moe_operator.api.pod_schema import build_types, load_types
from moe_operator.plan import Defaults, Observed, plan_cluster
from moe_operator.plan.merge import merge_template
from moe_operator.plan.names import COMPONENT, CONFIG, INSTANCE
from moe_operator.plan.own import normal_path
from pod_template_strategies import pod_templates_of_all_kinds

Document = dict[str, Any]
OWN = {"engine": ("engine", "agent"), "gateway": ("http", "admin")}
MODEL = {"uri": "hf://org/a", "cache": {"path": "/cache", "size": "10Gi"}, "tokenSecret": {"name": "hub"}}


def serving(section: str = "engine", template: Any = None, **spec: Any) -> Document:
    header = {"apiVersion": "moeserving.dev/v1alpha1", "kind": "MoEServing", "metadata": {"name": "tiny"}}
    part = {} if template is None else {section: {"podTemplate": template}}
    return {**header, "spec": {"model": MODEL, **part, **spec}}


def plan(document: Document) -> tuple[Document, ...]:
    return plan_cluster(parse_resource(document), "ns", Observed(tokens=("t",)), Defaults()).objects


def pod(objects: tuple[Document, ...], component: str) -> Document:
    """The pod template of a component's Deployment."""
    found = next(
        row for row in objects if row["kind"] == "Deployment" and row["metadata"]["name"] == f"tiny-{component}"
    )
    return dict(found["spec"]["template"])


def problems(template: Any, section: str = "engine", **spec: Any) -> list[str]:
    try:
        plan(serving(section, template, **spec))
    except InvalidInput as error:
        return [str(row).removeprefix(f"spec.{section}.podTemplate.") for row in error.errors]
    return []


def paths_of_errors(section: str, template: Any) -> list[str]:
    try:
        plan(serving(section, template))
    except InvalidInput as error:
        return [row.path for row in error.errors]
    return []


def with_container(section: str = "engine", **fields: Any) -> Document:
    return {"spec": {"containers": [{"name": section, **fields}]}}


@pytest.mark.parametrize(
    ("template", "wanted"),
    [
        ({"spec": {"toleration": []}}, "spec.toleration: unknown field; nearest known: tolerations; known: "),
        ({"spec": {"containers": {}}}, "spec.containers: a list is needed, got {}"),
        ({"spec": {"containers": [None]}}, "spec.containers[0]: null is no entry of a list"),
        ({"spec": {"containers": [{"image": "a"}]}},
         "spec.containers[0]: name is needed, by which this list is merged"),
        ({"spec": {"hostNetwork": "yes"}}, "spec.hostNetwork: true or false is needed, got 'yes'"),
        ({"spec": {"priority": 2**31}}, f"spec.priority: a whole number is needed, got {2**31}"),
        ({"spec": {"priority": 1.0}}, "spec.priority: a whole number is needed, got 1.0"),
        ({"spec": {"priority": True}}, "spec.priority: a whole number is needed, got True"),
        ({"spec": {"nodeSelector": {"gpu": True}}},
         "spec.nodeSelector.gpu: a string is needed, got True; put it in quotes"),
        ({"spec": {"nodeSelector": ["gpu"]}}, "spec.nodeSelector: a mapping is needed, got ['gpu']"),
        ({"spec": "x"}, "spec: a mapping of fields is needed, got 'x'"),
        ({"speck": {}}, "speck: unknown field; nearest known: spec; known: metadata, spec"),
        ({"metadata": {"name": "a"}}, "metadata.name: unknown field; known: annotations, labels"),
        ({"metadata": {"labels": {"a": 1}}}, "metadata.labels.a: a string is needed, got 1; put it in quotes"),
        (with_container(env=[{"name": "A", "value": 1}]),
         "spec.containers[0].env[0].value: a string is needed, got 1; put"),
        (with_container(env=[{"name": "A"}, {"name": "B"}, {"name": "A"}]),
         "spec.containers[0].env[2]: name 'A' stands twice, first at [0]"),
        (with_container(ports=[{"containerPort": 1}, {"containerPort": 1, "protocol": "TCP"}]),
         "spec.containers[0].ports[1]: containerPort 1, protocol 'TCP' stands twice, first at [0]"),
        (with_container(volumeMounts=[{"mountPath": "/a", "name": "a"}, {"mountPath": "/a", "name": "b"}]),
         "spec.containers[0].volumeMounts[1]: mountPath '/a' stands twice, first at [0]"),
        ({"spec": {"containers": [{"name": "a"}, {"name": "a"}]}}, "spec.containers[1]: name 'a' stands twice"),
        ({"spec": {"volumes": [{"name": "a"}, {"name": "a"}]}}, "spec.volumes[1]: name 'a' stands twice, first at [0]"),
        ({"spec": {"imagePullSecrets": [{"name": "a"}, {"name": "a"}]}},
         "spec.imagePullSecrets[1]: name 'a' stands twice"),
        (with_container(resources={"limits": {"memory": "64GB"}}),
         "spec.containers[0].resources.limits.memory: a quantity such as 64G is needed, got '64GB'"),
        (with_container(resources={"limits": {"memory": "64 gib"}}),
         "spec.containers[0].resources.limits.memory: a quantity such as 64Gi or 500m is needed, got '64 gib'"),
        (with_container(resources={"limits": {"cpu": True}}),
         "spec.containers[0].resources.limits.cpu: a quantity such as 64Gi or 500m is needed, got True"),
        (with_container(resources={"limits": {"cpu": float("inf")}}),
         "spec.containers[0].resources.limits.cpu: a quantity such as 64Gi or 500m is needed, got inf"),
        (with_container(startupProbe={"httpGet": {"port": 1.5}}),
         "spec.containers[0].startupProbe.httpGet.port: a whole number or a string is needed, got 1.5"),
        ({"spec": {"$setElementOrder/containers": []}},
         "spec.$setElementOrder/containers: this directive of a strategic merge is not supported; known: $patch"),
        ({"spec": {"volumes": [{"name": "a", "$retainKeys": ["name"]}]}},
         "spec.volumes[0].$retainKeys: this directive of a strategic merge is not supported; known: $patch"),
        ({"spec": {"$deleteFromPrimitiveList/x": []}}, "spec.$deleteFromPrimitiveList/x: this directive"),
        ({"spec": {"affinity": {"$patch": "remove"}}},
         "spec.affinity.$patch: unknown 'remove'; known: delete, merge, replace"),
        ({"spec": {"tolerations": [{"$patch": "replace"}]}},
         "spec.tolerations[0]: $patch has no effect here: this list is replaced as a whole"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_by_its_path_and_the_remedy(template: Document, wanted: str) -> None:
    found = problems(template)
    assert len(found) == 1
    assert found[0].startswith(wanted)


OWN_CONTAINER = "the container 'engine' is the operator's own and cannot be removed"
OWN_PORTS = "8000 (engine), 8080 (agent)"


@pytest.mark.parametrize(
    ("template", "wanted"),
    [
        ({"spec": {"containers": None}}, f"spec.containers: {OWN_CONTAINER}"),
        ({"spec": {"containers": [{"name": "engine", "$patch": "delete"}]}}, f"spec.containers[0]: {OWN_CONTAINER}"),
        ({"spec": {"containers": [{"$patch": "replace"}, {"name": "a"}]}}, f"spec.containers: {OWN_CONTAINER}"),
        ({"spec": {"volumes": [{"name": "config", "configMap": {"name": "mine"}}]}},
         "spec.volumes[0]: the volume 'config' is the operator's own; give yours another name"),
        ({"spec": {"volumes": [{"name": "settings", "emptyDir": {}}]}},
         "spec.volumes[0]: the volume 'settings' is the operator's own; give yours another name"),
        ({"spec": {"volumes": [{"name": "cache", "emptyDir": {}}]}},
         "spec.volumes[0]: the volume 'cache' is the operator's own; give yours another name"),
        ({"spec": {"volumes": [{"name": "control", "$patch": "delete"}]}},
         "spec.volumes[0]: the volume 'control' is the operator's own and cannot be removed"),
        (with_container(volumeMounts=[{"mountPath": "/dev/shm", "name": "mine"}]),
         "spec.containers[0].volumeMounts: /dev/shm is the operator's own, and needs its volume 'shm'"),
        (with_container(volumeMounts=[{"mountPath": "/dev/shm/", "name": "mine"}]),
         "spec.containers[0].volumeMounts[0]: /dev/shm/ is, holds or lies in /dev/shm, a folder of the operator's own"),
        (with_container(volumeMounts=[{"mountPath": "/dev/shm/x", "name": "mine"}]),
         "spec.containers[0].volumeMounts[0]: /dev/shm/x is, holds or lies in /dev/shm"),
        (with_container(volumeMounts=[{"mountPath": "/etc", "name": "mine"}]),
         "spec.containers[0].volumeMounts[0]: /etc is, holds or lies in /etc/moeserving"),
        (with_container(volumeMounts=[{"mountPath": "/a/../run//moeserving", "name": "mine"}]),
         "spec.containers[0].volumeMounts[0]: /a/../run//moeserving is, holds or lies in /run/moese"),
        (with_container(ports=[{"containerPort": 8000, "name": "web"}]),
         f"spec.containers[0].ports: {OWN_PORTS} are the operator's own and cannot change"),
        (with_container(ports=[{"containerPort": 8080, "protocol": "UDP"}]),
         f"spec.containers[0].ports: {OWN_PORTS} are the operator's own and cannot change"),
        (with_container(ports=[{"containerPort": 9000, "name": "agent"}]),
         "spec.containers[0].ports: the name 'agent' stands twice"),
        ({"spec": {"containers": [
            {"name": "a", "image": "i", "ports": [{"containerPort": 1}, {"containerPort": 8080}]},
         ]}},
         f"spec.containers[0].ports[1]: clashes with the operator's own: {OWN_PORTS}"),
        ({"spec": {"containers": [{"name": "a", "image": "i", "ports": [{"containerPort": 1, "name": "engine"}]}]}},
         f"spec.containers[0].ports[0]: clashes with the operator's own: {OWN_PORTS}"),
        (with_container(env=[{"name": "MOESERVING_RUN_DIR", "value": "/x"}]),
         "spec.containers[0].env[0]: MOESERVING_RUN_DIR is the operator's own"),
        (with_container(env=[{"name": "HF_TOKEN", "value": "x"}]),
         "spec.containers[0].env[0]: HF_TOKEN is set by spec.model.tokenSecret; take one of the two away"),
        (with_container(env=[{"name": "HF_HUB_CACHE", "value": "/x"}]),
         "spec.containers[0].env[0]: HF_HUB_CACHE is set by spec.model.cache.path; take one of the two away"),
        (with_container(env=None), "spec.containers[0].env: HF_TOKEN is set by spec.model.tokenSecret; take one"),
        (with_container(startupProbe={"exec": {"command": ["true"]}}),
         "spec.containers[0].startupProbe: one of exec, grpc, httpGet, tcpSocket is needed, got exec and httpGet; "),
        (with_container(livenessProbe={"httpGet": None}),
         "spec.containers[0].livenessProbe: one of exec, grpc, httpGet, tcpSocket is needed, got none; `$patch: de"),
        (with_container(lifecycle={"preStop": {"exec": {"command": ["a"]}}}),
         "spec.containers[0].lifecycle.preStop: one of exec, httpGet, sleep, tcpSocket is needed, got exec and sleep"),
        (with_container(image=None), "spec.containers[0]: image is needed for 'engine'"),
        ({"spec": {"containers": [{"name": "vllm", "env": []}]}},
         "spec.containers[0]: image is needed for 'vllm'; the operator's own container is 'engine'"),
        (with_container(volumeMounts=[{"mountPath": "/a", "name": "mine"}]),
         "spec.containers[0].volumeMounts[0].name: no volume 'mine'; known: cache, config, control, home, "),
        ({"spec": {"initContainers": [
            {"name": "a", "image": "i", "restartPolicy": "Always", "ports": [{"containerPort": 8080}]},
         ]}},
         f"spec.initContainers[0].ports[0]: clashes with the operator's own: {OWN_PORTS}"),
        ({"spec": {"initContainers": [{"name": "engine", "image": "a"}]}},
         "spec.initContainers: 'engine' is the name of another container of the pod"),
    ],
)  # fmt: skip
def test_what_takes_away_the_operators_own_is_refused_by_name(template: Document, wanted: str) -> None:
    found = problems(template)
    assert found
    assert found[0].startswith(wanted)


def test_all_that_is_lost_is_named() -> None:
    lost = problems({"spec": {"volumes": None}})
    names = ["cache", "config", "control", "home", "run", "settings", "shm", "tmp"]
    assert [row.split("'")[1] for row in lost] == names
    assert len(problems(with_container(volumeMounts=None))) == len(names)


@pytest.mark.parametrize(
    "template",
    [
        with_container(startupProbe=None),
        with_container(startupProbe={"$patch": "delete"}),
        with_container(startupProbe={"failureThreshold": None, "httpGet": None, "exec": {"command": ["true"]}}),
        with_container(startupProbe={"$patch": "replace", "exec": {"command": ["true"]}}),
        with_container(lifecycle={"preStop": {"$patch": "replace", "exec": {"command": ["a"]}}}),
        with_container(lifecycle={"preStop": None}),
        with_container(startupProbe={"failureThreshold": 2**31 - 1, "periodSeconds": 2**31 - 1}),
        with_container(lifecycle=None, livenessProbe=None, readinessProbe=None, securityContext=None, resources=None),
        with_container(command=None, env=[{"name": "HOME", "value": "/x"}]),
        with_container(ports=[{"containerPort": 53}, {"containerPort": 53, "protocol": "UDP"}]),
        {"spec": {
            "containers": [{"name": "engine", "volumeMounts": [
                {"mountPath": "/dev/infiniband", "name": "a"}, {"mountPath": "/e", "name": "a"},
            ]}],
            "volumes": [{"name": "a", "emptyDir": {}}],
        }},
        {"spec": {"volumes": [{"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "1Gi"}}]}},
        {"spec": {"volumes": [{"name": "run", "emptyDir": {"sizeLimit": "1Gi"}}]}},
        {"spec": {"containers": [{"name": "a", "image": "i", "ports": [{"containerPort": 8000, "protocol": "UDP"}]}]}},
        {"spec": {"initContainers": [
            {"name": "a", "image": "i", "volumeMounts": [{"mountPath": "/cache", "name": "cache"}]},
        ]}},
        {"spec": {"initContainers": [{"name": "a", "image": "i", "ports": [{"containerPort": 8080}]}]}},
        {"spec": {"terminationGracePeriodSeconds": None, "securityContext": None, "serviceAccountName": None}},
        {"spec": None, "metadata": None},
        {"spec": {"tolerations": [{"operator": "Exists"}, {"operator": "Exists"}]}},
        {"metadata": {"labels": None, "annotations": {"a": None}}},
    ],
    ids=json.dumps,
)  # fmt: skip
def test_what_may_be_changed_or_removed_is_planned(template: Document) -> None:
    assert problems(template) == []
    engine = pod(plan(serving(template=template)), "engine")
    assert engine["metadata"]["labels"][COMPONENT] == "engine"
    assert engine["metadata"]["annotations"][CONFIG]
    assert "null" not in json.dumps(engine["spec"]), "a null is no value for the API server"


@pytest.mark.parametrize(
    ("probe", "wanted_s"),
    [
        ({}, 7260),
        (None, 7260),
        ({"periodSeconds": 3600, "failureThreshold": 10, "initialDelaySeconds": 100}, 72200),
        ({"periodSeconds": None, "failureThreshold": 1000}, 20000),
        ({"periodSeconds": 2**31 - 1, "failureThreshold": 2**31 - 1}, 2**31 - 1),
    ],
)
def test_the_deadline_of_an_update_is_twice_the_longest_start(probe: Document | None, wanted_s: int) -> None:
    objects = plan(serving(template=with_container(startupProbe=probe)))
    found = next(row for row in objects if row["metadata"]["name"] == "tiny-engine" and row["kind"] == "Deployment")
    assert found["spec"]["progressDeadlineSeconds"] == wanted_s


@pytest.mark.parametrize(
    ("path", "is_valid"),
    [
        ("/cache", True), ("/var/cache/hub", True), ("/dev/shm", False), ("/dev/shm/hub", False), ("/dev", False),
        ("/run", False), ("/run/moeserving", False), ("/etc/moeserving-settings/x/", False), ("/etc", False),
        ("/", False), ("/proc/x", False), ("/sys", False), ("/usr", False), ("//run/./moeserving", False),
        ("/a:b", False), ("/run/hub", True), ("/etc/hub", True),
    ],
)  # fmt: skip
def test_the_folder_of_downloads_hides_no_other(path: str, is_valid: bool) -> None:
    found = problems({}, model={"uri": "hf://org/a", "cache": {"path": path}})
    assert (found == []) is is_valid
    assert all(row.startswith("spec.model.cache.path: ") for row in found)


BASE = {
    "probe": {"period": 1, "get": {"port": 1}},
    "env": [{"name": "A", "value": "1"}, {"name": "B", "value": "2"}],
    "volumes": [{"name": "a", "emptyDir": {}}],
    "args": ["x"],
}


@pytest.mark.parametrize(
    ("patch", "changed"),
    [
        ({"probe": {"period": None}}, {"probe": {"get": {"port": 1}}}),
        ({"probe": {"get": {"$patch": "delete"}}}, {"probe": {"period": 1}}),
        ({"probe": {"$patch": "replace", "exec": {"a": None}}}, {"probe": {"exec": {}}}),
        ({"probe": {"$patch": "merge", "period": 2}}, {"probe": {"period": 2, "get": {"port": 1}}}),
        ({"env": [{"name": "A", "$patch": "delete"}]}, {"env": [{"name": "B", "value": "2"}]}),
        ({"env": [{"$patch": "replace"}, {"name": "C", "value": "3"}]}, {"env": [{"name": "C", "value": "3"}]}),
        ({"env": [{"name": "B", "valueFrom": {"a": 1}}]},
         {"env": [{"name": "A", "value": "1"}, {"name": "B", "valueFrom": {"a": 1}}]}),
        ({"env": [{"name": "B"}]}, {}),
        ({"volumes": [{"name": "a", "secret": {}}]}, {"volumes": [{"name": "a", "secret": {}}]}),
        ({"args": ["y"]}, {"args": ["y"]}),
        ({"args": []}, {"args": []}),
        ({"new": {"a": None, "b": [{"c": None}]}}, {"new": {"b": [{}]}}),
    ],
)  # fmt: skip
def test_a_strategic_merge(patch: Document, changed: Document) -> None:
    before = json.dumps(BASE)
    assert merge_template(BASE, patch) == {**BASE, **changed}
    assert json.dumps(BASE) == before


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(
    st.sampled_from(["engine", "gateway"]).flatmap(lambda own: st.tuples(st.just(own), pod_templates_of_all_kinds(own)))
)
@example(("engine", {"spec": {"$patch": "delete"}}))
@example(("engine", {"spec": {"containers": [{"name": "engine", "volumeMounts": [{"mountPath": ""}]}]}}))
def test_any_template_is_refused_or_leaves_what_the_operator_relies_on(chosen: tuple[str, Document]) -> None:
    own, template = chosen
    if refused := paths_of_errors(own, template):
        assert all(path.startswith(f"spec.{own}.podTemplate") for path in refused)
        return
    made = pod(plan(serving(own, template)), own)
    assert made["metadata"]["labels"].items() >= {COMPONENT: own, INSTANCE: "tiny"}.items()
    (container,) = (row for row in made["spec"]["containers"] if row["name"] == own)
    assert {row.get("name") for row in container["ports"]} >= {*OWN[own]}
    folders = [normal_path(row["mountPath"]) for row in container["volumeMounts"] if row["mountPath"]]
    assert {"/etc/moeserving", "/etc/moeserving-control", "/etc/moeserving-settings"} <= {*folders}
    volumes = {row["name"]: row for row in made["spec"]["volumes"]}
    assert "downwardAPI" in volumes["config"]
    assert "secret" in volumes["control"]
    assert yaml.safe_load(yaml.safe_dump(made)) == made


def test_types_are_read_from_an_openapi_document() -> None:
    core = "io.k8s.api.core.v1."
    quantity = {"$ref": "#/components/schemas/io.k8s.apimachinery.pkg.api.resource.Quantity"}
    schemas = {
        f"{core}PodSpec": {
            "properties": {
                "containers": {
                    "type": "array", "items": {"allOf": [{"$ref": f"#/components/schemas/{core}Container"}]},
                    "x-kubernetes-patch-merge-key": "name", "x-kubernetes-list-map-keys": ["name"],
                },
                "overhead": {"type": "object", "additionalProperties": quantity},
                "priority": {"type": "integer", "format": "int32"},
            }
        },
        f"{core}Container": {
            "properties": {"options": {"type": "array", "items": {"type": "string"}, "x-kubernetes-list-type": "set"}}
        },
        f"{core}Node": {"properties": {}},
    }  # fmt: skip
    assert build_types({"components": {"schemas": schemas}}) == {
        "Container": {"options": {"type": "list of string", "set": True}},
        "PodSpec": {
            "containers": {"type": "list of Container", "mergeKey": "name", "keys": ["name"]},
            "overhead": "map of quantity",
            "priority": "int32",
        },
    }


def test_every_type_of_the_file_is_known() -> None:
    plain = {"string", "boolean", "int32", "int64", "quantity", "intOrString", "anything"}
    of = {field.type.rpartition(" of ")[2] for fields in load_types().values() for field in fields.values()}
    assert of - plain <= load_types().keys()
    assert (Path(__file__).parents[2] / "operator/moe_operator/api/pod_schema.json").stat().st_size < 50_000
