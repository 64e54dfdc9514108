"""An API cluster with controllers: garbage collector, namespaces, workloads, budgets, quotas, claims. No kubelet runs.

What a kubelet does is done by `Node`: it makes pods ready, and removes those that end while it is not lost.
"""

import json
from typing import Any

from cluster_api import ApiCluster
from operator_process import eventually

Document = dict[str, Any]
CONTROLLERS = (
    "garbage-collector-controller",
    "namespace-controller",
    "deployment-controller",
    "disruption-controller",
    "replicaset-controller",
    "persistentvolumeclaim-protection-controller",
    "resourcequota-controller",
    "serviceaccount-controller",
)
PART = "kube-controller-manager"


class ControlledCluster(ApiCluster):
    """An API server, its etcd, and kube-controller-manager with some of its controllers."""

    programs = (*ApiCluster.programs, PART)

    def start(self) -> None:
        super().start()
        self.start_controllers()

    def start_controllers(self) -> None:
        """Starts the controllers; they begin to work a few seconds later."""
        self._run(
            PART,
            *("--kubeconfig", self.kubeconfig, "--controllers", ",".join(CONTROLLERS), "--leader-elect=false"),
            *("--secure-port", "0", "--resource-quota-sync-period", "2s"),
            *("--service-account-private-key-file", self.certificates.path("service-accounts.key")),
        )

    def stop_controllers(self) -> None:
        """Ends the controllers."""
        self.processes.stop(PART, kill=True)


class Node:
    """A node without a kubelet: its pods become ready, and end only by `remove_ended`."""

    def __init__(self, cluster: ApiCluster, namespace: str, name: str = "node-1", address: str = "127.3.0.1") -> None:
        self._cluster, self._namespace, self._name, self._address = cluster, namespace, name, address

    def pods(self, component: str = "") -> list[Document]:
        """The pods of the operator's workloads."""
        selector = "app.kubernetes.io/managed-by=moeserving"
        selector += f",app.kubernetes.io/component={component}" if component else ""
        found = self._cluster.kubectl("get", "pods", "-n", self._namespace, "-l", selector, "-o", "json")
        return list(json.loads(found)["items"])

    def run_pods(self) -> None:
        """Takes the pods that have no node, and makes them ready."""
        for pod in self.pods():
            if "nodeName" not in pod["spec"] and "deletionTimestamp" not in pod["metadata"]:
                self._bind(pod["metadata"]["name"])

    def _bind(self, name: str) -> None:
        binding = {
            "apiVersion": "v1",
            "kind": "Binding",
            "metadata": {"name": name},
            "target": {"apiVersion": "v1", "kind": "Node", "name": self._name},
        }
        path = f"/api/v1/namespaces/{self._namespace}/pods/{name}/binding"
        self._cluster.kubectl("create", "--raw", path, "-f", "-", stdin=json.dumps(binding))
        conditions = [{"type": kind, "status": "True"} for kind in ("Ready", "ContainersReady")]
        status = {"phase": "Running", "podIP": self._address, "conditions": conditions}
        patch = json.dumps({"status": status})
        words = ("pod", name, "-n", self._namespace, "--subresource=status", "--type=merge", "-p", patch)
        self._cluster.kubectl("patch", *words)

    def remove_ended(self, component: str = "") -> None:
        """Removes the pods that are marked for deletion, as a kubelet does once their processes have ended."""
        self.remove_ended_of({pod["metadata"]["name"] for pod in self.pods(component)})

    def remove_ended_of(self, names: set[str]) -> None:
        """Removes those of these pods that are marked for deletion."""
        for pod in self.pods():
            if "deletionTimestamp" in pod["metadata"] and pod["metadata"]["name"] in names:
                self.remove(pod["metadata"]["name"])

    def remove(self, name: str) -> None:
        """Removes a pod's object at once."""
        words = ("-n", self._namespace, "--grace-period=0", "--force", "--ignore-not-found", "--wait=false")
        self._cluster.kubectl("delete", "pod", name, *words)

    def wait_for_pods(self, count: int) -> None:
        """Makes pods ready until that number of them runs."""

        def ready() -> bool:
            self.run_pods()
            return sum("nodeName" in pod["spec"] for pod in self.pods()) == count

        eventually(ready, f"{count} pods run")
