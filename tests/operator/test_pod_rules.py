"""What the API server would refuse of a pod as a whole, `moeserving validate` finds beforehand, with its path."""

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from moe_contract.input_errors import InvalidInput
from moe_operator.api import parse_resource
from moe_operator.api.pod_schema import load_types
from moe_operator.plan import Defaults, Observed, plan_cluster, pod_forms, pod_rules
from pod_template_cases import IN_VAIN, REFUSED, TAKEN, engine, resources

Document = dict[str, Any]


def problems(template: Document, section: str = "engine") -> list[str]:
    header = {"apiVersion": "moeserving.dev/v1alpha1", "kind": "MoEServing", "metadata": {"name": "tiny"}}
    spec = {"model": {"uri": "hf://org/a"}, section: {"podTemplate": template}}
    try:
        plan_cluster(parse_resource(header | {"spec": spec}), "ns", Observed(tokens=("t",)), Defaults())
    except InvalidInput as error:
        return [str(row) for row in error.errors]
    return []


@pytest.mark.parametrize(
    ("template", "wanted"), REFUSED + IN_VAIN, ids=lambda part: part if isinstance(part, str) else ""
)
def test_what_the_api_server_would_refuse_is_named_by_its_path(template: Document, wanted: str) -> None:
    found = problems(template)
    assert len(found) == 1
    assert found[0].startswith(f"spec.engine.podTemplate.spec.{wanted}")


@pytest.mark.parametrize("template", TAKEN, ids=json.dumps)
def test_what_it_takes_is_planned(template: Document) -> None:
    assert problems(template) == []


def test_what_the_operators_own_part_fills_is_no_gap_and_places_are_the_users() -> None:
    assert problems(engine(readinessProbe={"httpGet": {"path": "/mine"}})) == []
    assert problems(engine(readinessProbe={"httpGet": {"$patch": "replace", "path": "/mine"}})) == [
        "spec.engine.podTemplate.spec.containers[0].readinessProbe.httpGet: port is needed"
    ]
    side = {"name": "side", "image": "a", "ports": [{"containerPort": 0}]}
    assert problems({"spec": {"containers": [{"name": "gateway"}, side]}}, "gateway") == [
        "spec.gateway.podTemplate.spec.containers[1].ports[0].containerPort: a number from 1 to 65535 is needed, got 0"
    ]


def test_a_gateway_keeps_the_token_with_which_it_finds_engines() -> None:
    assert problems({"spec": {"automountServiceAccountToken": False}}, "gateway") == [
        "spec.gateway.podTemplate.spec.automountServiceAccountToken: "
        "gateways read with the token of their ServiceAccount which engines there are"
    ]
    source = {"sources": [{"serviceAccountToken": {"path": "token"}}]}
    own = {"automountServiceAccountToken": False, "volumes": [{"name": "mine", "projected": source}]}
    assert problems({"spec": own}, "gateway") == []
    assert problems({"spec": {"automountServiceAccountToken": False}}) == [], "engines have none"


quantities = st.from_regex(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)(n|u|m|k|M|E|Ki|Ei|[eE][+-]?[0-9]+)?", fullmatch=True)


@given(st.sampled_from(["cpu", "memory", "rdma/hca", "hugepages-2Mi"]), quantities, quantities)
@example("rdma/hca", "1e30", "1e99999999")
@example("rdma/hca", "9" * 60 + "Ei", "1e-99999999")
def test_any_two_amounts_are_compared(name: str, request: str, limit: str) -> None:
    found = problems(resources(requests={name: request}, limits={name: limit}))
    assert all(row.startswith("spec.engine.podTemplate.spec.containers[0].resources") for row in found)
    if request == limit and request.isdecimal() and not name.startswith("hugepages-"):
        assert found == []


def test_the_tables_name_structures_and_fields_of_a_pod() -> None:
    types = load_types()
    tables: tuple[Any, ...] = (
        pod_forms._FORMS,
        pod_rules._RANGES,
        pod_rules._SETS,
        pod_rules._NEEDED,
        pod_rules._ONE_OF,
        pod_rules._NOT_BOTH,
    )
    for table in tables:
        for structure, fields in table.items():
            assert {*fields} <= types[structure].keys(), structure
    assert pod_rules._RULES.keys() <= types.keys()
    assert all(field in types[structure] for structure, field in pod_forms._LABELS.items())
