"""The API cluster with the CRD of MoEServing, and a kubeconfig for the operator."""

from pathlib import Path

import pytest
from cluster_api import ApiCluster
from cluster_problem import ClusterProblem

ROOT = Path(__file__).parents[2]
CRD = ROOT / "crds" / "moeserving.yaml"
NO_CONTROL_NAMESPACE = "default"


@pytest.fixture(scope="session")
def serving_cluster(api_cluster: ApiCluster) -> ApiCluster:
    """The API cluster, with the CRD."""
    api_cluster.kubectl("apply", "--server-side", "-f", CRD)
    api_cluster.kubectl("wait", "--for=condition=Established", "--timeout=30s", "crd/moeservings.moeserving.dev")
    return api_cluster


@pytest.fixture
def kubeconfig(serving_cluster: ApiCluster) -> Path:
    return serving_cluster.kubeconfig


__all__ = ["ClusterProblem"]
