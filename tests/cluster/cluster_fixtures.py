"""Clusters for tests, a pytest plugin (tests/conftest.py loads it): `api_cluster`, `node_cluster`, `namespace`.

A run has its own clusters, and they end with it, also when it is killed: several runs never meet.
"""

import uuid
from collections.abc import Iterator

import cluster_life
import pytest
from cluster_api import ApiCluster
from cluster_node import NodeCluster, why_not

BUILD_TIMEOUT_S = 1800.0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whichever test comes first pays for the cluster, and for building it where nothing is cached."""
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        if "node_cluster" in fixtures:
            item.add_marker(pytest.mark.cluster_node)
        if {"node_cluster", "api_cluster"} & set(fixtures) and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(BUILD_TIMEOUT_S))


@pytest.fixture(scope="session")
def api_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiCluster]:
    """An API server with its etcd. No controller runs: nothing that a test makes disappears by itself."""
    folder = tmp_path_factory.mktemp("api-cluster") / "state"
    yield cluster_life.up("api", folder, tied=True)
    cluster_life.down(folder)


@pytest.fixture(scope="session")
def node_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeCluster]:
    """A whole Kubernetes of one node, where this machine can be one: root on Linux."""
    if reason := why_not():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("node-cluster") / "state"
    cluster = cluster_life.up("node", folder, tied=True)
    assert isinstance(cluster, NodeCluster)
    yield cluster
    cluster_life.down(folder)


@pytest.fixture
def namespace(request: pytest.FixtureRequest) -> Iterator[str]:
    """A namespace of this test's own, in the node cluster when the test has that one, else in the API cluster."""
    cluster: ApiCluster = request.getfixturevalue(
        "node_cluster" if "node_cluster" in request.fixturenames else "api_cluster"
    )
    name = f"test-{uuid.uuid4().hex[:10]}"
    cluster.kubectl("create", "namespace", name)
    if cluster.level == "node":
        cluster.kubectl("wait", "--for=create", "serviceaccount/default", "-n", name, "--timeout=60s")
    yield name
    # Where a namespace controller runs this also ends the pods; elsewhere the name alone keeps tests apart.
    cluster.kubectl("delete", "namespace", name, "--wait=false")
