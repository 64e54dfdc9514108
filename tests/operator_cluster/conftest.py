"""The API cluster with the CRD of MoEServing."""

from pathlib import Path

import pytest
from cluster_api import ApiCluster
from cluster_problem import ClusterProblem
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
