"""The kinds of objects that the operator reads and writes."""

from typing import Any

from moe_contract.api_server import Kind

from moe_operator.api.crd import GROUP, PLURAL, VERSION
from moe_operator.api.resource import KIND

SERVING = Kind(GROUP, VERSION, KIND, PLURAL)
POD = Kind("", "v1", "Pod", "pods")
DEPLOYMENT = Kind("apps", "v1", "Deployment", "deployments")
LEADER_WORKER_SET = Kind("leaderworkerset.x-k8s.io", "v1", "LeaderWorkerSet", "leaderworkersets", optional=True)
SERVICE_MONITOR = Kind("monitoring.coreos.com", "v1", "ServiceMonitor", "servicemonitors", optional=True)
POD_MONITOR = Kind("monitoring.coreos.com", "v1", "PodMonitor", "podmonitors", optional=True)
# Every cluster has it; optional, since an operator without the right to read it needs it for nothing else.
AUTOSCALER = Kind("autoscaling", "v2", "HorizontalPodAutoscaler", "horizontalpodautoscalers", optional=True)
INFERENCE_POOL = Kind("inference.networking.k8s.io", "v1", "InferencePool", "inferencepools", optional=True)
EVENT = Kind("", "v1", "Event", "events")
NAMESPACE = Kind("", "v1", "Namespace", "namespaces", namespaced=False)
LEASE = Kind("coordination.k8s.io", "v1", "Lease", "leases")
SECRET = Kind("", "v1", "Secret", "secrets")
CONFIG_MAP = Kind("", "v1", "ConfigMap", "configmaps")
CLAIM = Kind("", "v1", "PersistentVolumeClaim", "persistentvolumeclaims")

# What a plan may hold: the operator owns, applies and prunes these.
CHILDREN = (
    SECRET,
    CONFIG_MAP,
    Kind("", "v1", "ServiceAccount", "serviceaccounts"),
    Kind("rbac.authorization.k8s.io", "v1", "Role", "roles"),
    Kind("rbac.authorization.k8s.io", "v1", "RoleBinding", "rolebindings"),
    CLAIM,
    Kind("", "v1", "Service", "services"),
    Kind("policy", "v1", "PodDisruptionBudget", "poddisruptionbudgets"),
    Kind("networking.k8s.io", "v1", "NetworkPolicy", "networkpolicies"),
    SERVICE_MONITOR,
    POD_MONITOR,
    INFERENCE_POOL,
    DEPLOYMENT,
    LEADER_WORKER_SET,
    AUTOSCALER,
)
# What the store keeps up to date.
WATCHED = (SERVING, POD, *CHILDREN)
_BY_NAME = {(kind.api_version, kind.name): kind for kind in WATCHED}


def kind_of(document: dict[str, Any]) -> Kind:
    """The kind of a document.

    Raises:
        KeyError: the operator neither makes nor watches such objects.
    """
    return _BY_NAME[document["apiVersion"], document["kind"]]
