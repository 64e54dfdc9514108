"""An API server with the real controllers of Deployments, quotas, claims and EndpointSlices and the real scheduler.

There is no kubelet: `make_ready` writes what one would. The cluster is the module's own, for controllers would act on
the objects of all other tests.
"""

import asyncio
import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cluster_life
import psutil
from cluster_api import ApiCluster
from cluster_binaries import locate
from fresh_operator import FreshOperator, conditions, fetch_serving
from moe_operator.kubernetes.store import Key
from operator_process import eventually
from serving_documents import CRD

Document = dict[str, Any]
CONTROLLERS = (
    "deployment-controller",
    "replicaset-controller",
    "resourcequota-controller",
    "endpointslice-controller",
    "horizontal-pod-autoscaler-controller",
    "persistentvolume-binder-controller",
)
# A ReplicaSet tries again after pauses that double with each refusal.
PATIENCE_S = 240.0


@contextmanager
def managed_cluster(folder: Path) -> Iterator[ApiCluster]:
    """The cluster, with the CRD and a node that has CPUs and no GPU, until the end of the block."""
    cluster = cluster_life.up("api", folder, tied=True)
    try:
        cluster.kubectl("apply", "--server-side", "-f", CRD)
        eventually(lambda: "moeservings" in cluster.kubectl("api-resources"), "the new kind is served")
        add_node(cluster)
        start_controllers(cluster)
        command = [locate("kube-scheduler"), "--kubeconfig", cluster.kubeconfig, "--leader-elect=false"]
        cluster.processes.start("kube-scheduler", [*command, "--secure-port=0"])
        yield cluster
    finally:
        cluster_life.down(folder)


def start_controllers(cluster: ApiCluster) -> None:
    """Starts the controllers, also after they were stopped."""
    command = [locate("kube-controller-manager"), "--kubeconfig", cluster.kubeconfig, "--leader-elect=false"]
    options = [f"--controllers={','.join(CONTROLLERS)}", "--secure-port=0"]
    options += ["--horizontal-pod-autoscaler-sync-period=1s"]
    cluster.processes.start("kube-controller-manager", [*command, *options])


def add_node(cluster: ApiCluster) -> None:
    """A node on which nothing runs."""
    node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "node1"}}
    cluster.kubectl("create", "-f", "-", stdin=json.dumps(node))
    # The API server taints a new node until its kubelet and the controller of nodes say that it is ready.
    cluster.kubectl("patch", "node", "node1", "--type=merge", "-p", '{"spec":{"taints":null}}')
    status = {
        "allocatable": {"cpu": "64", "memory": "256Gi", "pods": "500", "ephemeral-storage": "100Gi"},
        "conditions": [{"type": "Ready", "status": "True"}],
    }
    cluster.kubectl("patch", "node", "node1", "--subresource=status", "-p", json.dumps({"status": status}))


def pods_of(cluster: ApiCluster, namespace: str, component: str) -> list[Document]:
    """The pods that the controllers have made for a component."""
    selector = f"app.kubernetes.io/component={component}"
    text = cluster.kubectl("get", "pods", "-n", namespace, "-l", selector, "-o", "json")
    rows: list[Document] = json.loads(text)["items"]
    return rows


def set_status(cluster: ApiCluster, pod: Document, status: Document) -> None:
    """Writes a pod's status, as its kubelet does."""
    metadata = pod["metadata"]
    where = ("pod", metadata["name"], "-n", metadata["namespace"])
    cluster.kubectl("patch", *where, "--subresource=status", "-p", json.dumps({"status": status}))


def make_ready(cluster: ApiCluster, namespace: str, component: str) -> None:
    """The pods of a component run and are ready, at an address of this machine where nobody answers."""
    eventually(lambda: pods_of(cluster, namespace, component), f"a pod of {component} is made")
    for pod in pods_of(cluster, namespace, component):
        address = own_address()
        status = {
            "phase": "Running",
            "podIP": address,
            "podIPs": [{"ip": address}],
            "conditions": [{"type": "Ready", "status": "True"}],
        }
        set_status(cluster, pod, status)


def own_address() -> str:
    """An address of this machine that is not of loopback, for EndpointSlices take none of these."""
    rows = (row for rows in psutil.net_if_addrs().values() for row in rows if row.family is socket.AF_INET)
    return next((row.address for row in rows if not row.address.startswith("127.")), "192.0.2.1")


async def until(operator: FreshOperator, key: Key, holds: Callable[[dict[str, Document]], object], what: str) -> None:
    """Passes over a resource until its conditions are as wanted."""
    give_up_s = time.monotonic() + PATIENCE_S
    while True:
        await operator.relist()
        await operator.reconciler.reconcile(key)
        found = conditions(await fetch_serving(operator.api, key) or {})
        if holds(found):
            return
        assert time.monotonic() < give_up_s, f"never: {what}; {json.dumps(found, indent=1)}"
        await asyncio.sleep(0.2)


def says(kind: str, status: str, reason: str, words: str = "") -> Callable[[dict[str, Document]], bool]:
    """Whether a condition has this status and reason, and these words in its message."""

    def holds(found: dict[str, Document]) -> bool:
        row = found.get(kind, {})
        return (row.get("status"), row.get("reason")) == (status, reason) and words in row.get("message", "")

    return holds
