"""The types by which pod templates are checked are those of the API server."""

import json

from cluster_api import ApiCluster
from moe_operator.api.pod_schema import FILE, build_types


def test_every_field_of_a_pod_that_the_api_server_has_is_known_with_its_type(serving_cluster: ApiCluster) -> None:
    known = json.loads(FILE.read_text())
    server = build_types(json.loads(serving_cluster.get("/openapi/v3/api/v1")))
    assert "Container" in server
    assert {name: {field: known[name].get(field) for field in fields} for name, fields in server.items()} == server
