"""The API cluster with the CRD of MoEServing, without controllers and with them."""

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster_api import ApiCluster
from cluster_problem import ClusterProblem
from controlled import ControlledCluster
from operator_process import eventually
from serving_documents import CRD


@pytest.fixture(scope="session")
def serving_cluster(api_cluster: ApiCluster) -> ApiCluster:
    """The API cluster, with the CRD."""
    api_cluster.kubectl("apply", "--server-side", "-f", CRD)
    eventually(lambda: serves(api_cluster), "the new kind is served")
    return api_cluster


def serves(cluster: ApiCluster) -> bool:
    try:
        cluster.kubectl("get", "moeservings", "-A")
    except ClusterProblem:
        return False
    return True


@pytest.fixture
def kubeconfig(serving_cluster: ApiCluster) -> Path:
    return serving_cluster.kubeconfig


@pytest.fixture(scope="session")
def controlled_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlledCluster]:
    """An API cluster whose controllers run, with the CRD."""
    cluster = ControlledCluster.new(tmp_path_factory.mktemp("controlled") / "state", tied=True)
    cluster.start()
    cluster.kubectl("apply", "--server-side", "-f", CRD)
    eventually(lambda: serves(cluster), "the new kind is served")
    yield cluster
    cluster.processes.kill_all()


@pytest.fixture
def place(controlled_cluster: ControlledCluster) -> str:
    """A namespace of this test's own in the cluster with controllers."""
    name = f"test-{uuid.uuid4().hex[:10]}"
    controlled_cluster.kubectl("create", "namespace", name)
    return name
