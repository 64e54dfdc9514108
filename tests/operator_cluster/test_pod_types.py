"""The types and rules by which pod templates are checked are those of the API server."""

import json
from typing import Any

import pytest
from cluster_api import ApiCluster
from fresh_operator import connect
from moe_contract.api_server import ApiError
from moe_operator.api import parse_resource
from moe_operator.api.pod_schema import FILE, build_types
from moe_operator.kubernetes.kinds import DEPLOYMENT
from moe_operator.plan import Defaults, Observed, plan_cluster
from moe_operator.plan.merge import merge_template
from pod_template_cases import REFUSED, TAKEN
from serving_documents import serving

Document = dict[str, Any]


def as_row(field: str | Document) -> Document:
    return {"type": field} if isinstance(field, str) else dict(field)


def test_every_field_of_a_pod_that_the_api_server_has_is_known_with_its_type(serving_cluster: ApiCluster) -> None:
    known = json.loads(FILE.read_text())
    server = build_types(json.loads(serving_cluster.get("/openapi/v3/api/v1")))
    assert "Container" in server
    for structure, fields in server.items():
        for name, field in fields.items():
            theirs, ours = as_row(field), as_row(known[structure][name])
            # A newer Kubernetes may have more values.
            assert {*theirs.pop("choices", ())} <= {*ours.pop("choices", ())}, (structure, name)
            assert ours == theirs, (structure, name)


async def refusal(cluster: ApiCluster, namespace: str, template: Document) -> str:
    """What the API server says of the engines' Deployment with a template laid over; empty when it takes it."""
    planned = plan_cluster(parse_resource(serving()), namespace, Observed(tokens=("t",)), Defaults()).objects
    (engines,) = (row for row in planned if row["kind"] == "Deployment" and row["metadata"]["name"] == "tiny-engine")
    spec = {**engines["spec"], "template": merge_template(engines["spec"]["template"], template)}
    async with connect(cluster.kubeconfig) as server:
        try:
            await server.apply(DEPLOYMENT, {**engines, "spec": spec}, "test", dry_run=True)
        except ApiError as error:
            if error.status != 422:
                raise
            return error.message
    return ""


async def test_what_validate_refuses_of_a_whole_pod_the_api_server_refuses_too(
    serving_cluster: ApiCluster, namespace: str
) -> None:
    taken = [wanted for template, wanted in REFUSED if not await refusal(serving_cluster, namespace, template)]
    assert taken == []


@pytest.mark.parametrize("template", TAKEN, ids=json.dumps)
async def test_what_validate_takes_of_a_whole_pod_the_api_server_takes_too(
    serving_cluster: ApiCluster, namespace: str, template: Document
) -> None:
    assert await refusal(serving_cluster, namespace, template) == ""
