"""The generated CRD: a structural schema that says the same as the models, and generated files that are fresh."""

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from moe_contract.documents import section_in
from moe_contract.input_errors import InvalidInput
from moe_operator.api import (
    Condition,
    ConditionStatus,
    EnginePhase,
    EngineStatus,
    Status,
    parse_resource,
    status_document,
)
from moe_operator.api.access import GatewayAuth
from moe_operator.api.autoscaling import Autoscaling, DecodeAutoscaling, PrefillAutoscaling
from moe_operator.api.crd import build_crd, generated_files, main, render_crd
from moe_operator.api.engine import Engine, Parallelism
from moe_operator.api.gateway import GatewayAutoscaling
from moe_operator.api.model import Cache, Model
from moe_operator.api.network import IpBlock, LabelRequirement, NetworkPeer
from moe_operator.api.pods import GatewayService
from moe_operator.api.replica import RoleOverride
from moe_operator.api.resource import MoEServing, Spec
from moe_operator.api.roles import Roles
from moe_operator.api.section import Section

ROOT = Path(__file__).parents[2]
CRD = build_crd()
VERSION = CRD["spec"]["versions"][0]
SCHEMA = VERSION["schema"]["openAPIV3Schema"]
# OpenAPI 3.0, which a CRD speaks, has its bounds as JSON schema's draft 4 has them.
VALIDATOR = jsonschema.Draft4Validator(SCHEMA)
MINIMAL: dict[str, Any] = {
    "apiVersion": "moeserving.dev/v1alpha1",
    "kind": "MoEServing",
    "metadata": {"name": "tiny"},
    "spec": {"model": {"uri": "hf://org/tiny-moe"}},
}
STRUCTURAL_KEYS = {
    "type",
    "properties",
    "required",
    "items",
    "additionalProperties",
    "description",
    "default",
    "enum",
    "format",
    "pattern",
    "minimum",
    "maximum",
    "exclusiveMinimum",
    "minLength",
    "maxLength",
    "minItems",
    "maxItems",
    "maxProperties",
    "anyOf",
    "x-kubernetes-int-or-string",
    "x-kubernetes-validations",
    "x-kubernetes-list-type",
    "x-kubernetes-list-map-keys",
    "x-kubernetes-preserve-unknown-fields",
}


def nodes(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    yield path, schema
    for name, child in schema.get("properties", {}).items():
        yield from nodes(child, f"{path}.{name}")
    for key in ("items", "additionalProperties"):
        if key in schema:
            yield from nodes(schema[key], f"{path}[]")


def with_defaults(schema: dict[str, Any], value: Any) -> Any:
    """What the API server makes of a value: defaults from the top down."""
    if not isinstance(value, dict):
        return value
    filled = dict(value)
    for name, child in schema.get("properties", {}).items():
        if name not in filled and "default" in child:
            filled[name] = child["default"]
        if name in filled:
            filled[name] = with_defaults(child, filled[name])
    return filled


def sections(model: type[Section]) -> Iterator[type[Section]]:
    yield model
    for field in model.model_fields.values():
        if section := section_in(field.annotation):
            yield from sections(section)


@pytest.mark.parametrize(
    ("path", "node"), list(nodes(SCHEMA)), ids=lambda value: value if isinstance(value, str) else ""
)
def test_every_node_is_structural(path: str, node: dict[str, Any]) -> None:
    assert node.keys() <= STRUCTURAL_KEYS
    if "x-kubernetes-int-or-string" in node:
        assert "type" not in node
        assert node["anyOf"] == [{"type": "integer"}, {"type": "string"}]
    else:
        assert node["type"] in {"object", "array", "string", "integer", "number", "boolean"}
        assert "anyOf" not in node
    assert not {"properties", "additionalProperties"} <= node.keys()
    assert set(node.get("required", ())) <= set(node.get("properties", ()))
    assert ("items" in node) == (node.get("type") == "array")


@pytest.mark.parametrize(
    ("path", "node"), list(nodes(SCHEMA)), ids=lambda value: value if isinstance(value, str) else ""
)
def test_every_default_is_valid_and_complete(path: str, node: dict[str, Any]) -> None:
    if "default" in node:
        jsonschema.Draft4Validator(node).validate(node["default"])
        assert with_defaults(node, node["default"]) == node["default"]


def test_every_field_says_what_it_means() -> None:
    known_to_kubernetes = {".apiVersion", ".kind", ".metadata"}
    silent = {
        path for path, node in nodes(SCHEMA) if not path.endswith("[]") and not node.get("description", "").strip()
    }
    assert silent == known_to_kubernetes


def test_the_api_server_and_the_models_give_the_same_defaults() -> None:
    parsed = parse_resource(MINIMAL).model_dump(mode="json", by_alias=True, exclude_none=True)
    assert with_defaults(SCHEMA, MINIMAL)["spec"] == parsed["spec"]


def test_every_rule_across_fields_is_in_the_crd() -> None:
    written = {rule["rule"]: rule for _, node in nodes(SCHEMA) for rule in node.get("x-kubernetes-validations", ())}
    rules = [rule for section in sections(MoEServing) for rule in section.rules]
    assert {section for section in sections(MoEServing) if section.rules} == {
        Autoscaling,
        Cache,
        Engine,
        GatewayAuth,
        GatewayAutoscaling,
        GatewayService,
        Model,
        Parallelism,
        NetworkPeer,
        IpBlock,
        LabelRequirement,
        PrefillAutoscaling,
        DecodeAutoscaling,
        RoleOverride,
        Roles,
        Spec,
    }
    for rule in rules:
        assert written[rule.cel]["message"] == rule.message
        assert written[rule.cel]["fieldPath"] == f".{rule.field}"


@pytest.mark.parametrize("path", sorted((ROOT / "manifests").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_sample_is_valid_under_the_schema(path: Path) -> None:
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    VALIDATOR.validate(document)
    VALIDATOR.validate(with_defaults(SCHEMA, document))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("engine.replicas", -1),
        ("engine.replicas", "2"),
        ("engine.replicas", 257),
        ("engine.runtime", "cpu"),
        ("engine.parallelism.tensor", 65),
        ("engine.parallelism.expert", "yes"),
        ("engine.args", ["", 3]),
        ("engine.args", "--a"),
        ("engine.env", {"A": 1}),
        ("engine.env", {"A": "a\0"}),
        ("engine.resources.kvCacheMemory", "4 Gi"),
        ("engine.resources.kvCacheMemory", 1.5),
        ("engine.drainTimeout", "10"),
        ("engine.drainTimeout", 10),
        ("engine.drainTimeout", "1d"),
        ("scheduling.request.policy", "sjff"),
        ("scheduling.request.ageingRate", 0),
        ("scheduling.request.ageingRate", "1"),
        ("scheduling.request.fairnessHorizon", 10),
        ("gateway.tenantHeader", "X-Tenant"),
        ("gateway.tenantHeader", "x tenant"),
        ("scheduling.engine.policy", "random"),
        ("scheduling.expert.mode", "on"),
        ("scheduling.expert.mode", False),
        ("scheduling.expert.interval", 0),
        ("scheduling.expert.window", 1.5),
        ("scheduling.expert.moveBudget", -1),
        ("scheduling.expert.maxStall", "fast"),
        ("scheduling.expert.hysteresis", -0.1),
        ("scheduling.expert.redundantExperts", -1),
        ("gateway.port", 0),
        ("gateway.port", 65536),
        ("gateway.hold.requests", -1),
        ("model.uri", "gs://a/b"),
        ("model.uri", "file://"),
        ("model.name", "a b"),
        ("model.revision", ""),
    ],
)
def test_the_schema_and_the_models_refuse_the_same_values(path: str, value: object) -> None:
    document: dict[str, Any] = yaml.safe_load(yaml.safe_dump(MINIMAL))
    *parents, last = path.split(".")
    section = document["spec"]
    for name in parents:
        section = section.setdefault(name, {})
    section[last] = value
    with pytest.raises(InvalidInput):
        parse_resource(document)
    with pytest.raises(jsonschema.ValidationError):
        VALIDATOR.validate(document)


def test_a_reported_status_is_valid_under_the_schema_and_reads_back() -> None:
    now = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    ready = Condition(type="Ready", status=ConditionStatus.TRUE, reason="EnginesReady", last_transition_time=now)
    engine = EngineStatus(name="tiny-engine-0", phase=EnginePhase.READY, running=3, kv_usage=0.5)
    status = Status(
        conditions=(ready,), replicas=2, ready_replicas=1, endpoint="http://127.0.0.1:8000", engines=(engine,)
    )
    document = {**MINIMAL, "status": status_document(status)}
    VALIDATOR.validate(document)
    assert document["status"]["conditions"][0]["lastTransitionTime"] == "2026-01-02T03:04:05Z"
    assert document["status"]["readyReplicas"] == 1
    assert parse_resource(document).status == status


def test_kubectl_shows_and_scales_it() -> None:
    assert CRD["spec"]["names"]["shortNames"] == ["moes"]
    assert [column["name"] for column in VERSION["additionalPrinterColumns"]] == [
        "Ready",
        "Engines",
        "Desired",
        "Balance",
        "TTFT",
        "Age",
        "Status",
    ]
    paths = {path for path, _ in nodes(SCHEMA)}
    scale = VERSION["subresources"]["scale"]
    shown = [column["jsonPath"] for column in VERSION["additionalPrinterColumns"]]
    assert {scale["specReplicasPath"], scale["statusReplicasPath"]} <= paths
    assert {path for path in shown if "conditions" not in path} - {".metadata.creationTimestamp"} <= paths


def test_the_printed_yaml_is_the_crd(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert printed == render_crd()
    assert yaml.safe_load(printed) == CRD
    assert "&id" not in printed


def test_the_generated_files_of_the_repository_are_fresh() -> None:
    assert main(["--check", "--root", str(ROOT)]) == 0


def test_a_stale_or_absent_file_is_named_until_it_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--check", "--root", str(tmp_path)]) == 1
    assert capsys.readouterr().err.splitlines() == [
        f"{path}: differs from its source; run `make generate`" for path in generated_files()
    ]
    assert main(["--write", "--root", str(tmp_path)]) == 0
    assert main(["--check", "--root", str(tmp_path)]) == 0


def test_the_reference_has_a_row_for_every_field() -> None:
    page = generated_files()[Path("docs/reference/moeserving.md")]
    for path, node in nodes(SCHEMA["properties"]["spec"], "spec"):
        if path != "spec" and not path.endswith("[]"):
            assert any(f"| `{row}` |" in page for row in (path, f"{path}[]")), node
