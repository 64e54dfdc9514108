"""The kinds of objects that the operator reads and writes, each as plain documents."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lightkube.core.resource import ApiInfo
from lightkube.generic_resource import GenericNamespacedResource, GenericNamespacedStatus, create_api_info

from moe_operator.api.crd import GROUP, PLURAL, VERSION
from moe_operator.api.resource import KIND
from moe_operator.plan.names import MANAGED_BY, MANAGER

SELECTOR = f"{MANAGED_BY}={MANAGER}"


@dataclass(frozen=True)
class Kind:
    """A kind.

    Attributes:
        optional: its CRD may be absent from the cluster.
    """

    group: str
    version: str
    name: str
    plural: str
    optional: bool = False

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version

    @cached_property
    def resource(self) -> Any:
        """Its class in lightkube, of documents as they are. Not registered there: lightkube knows typed ones, too."""
        info = create_api_info(self.group, self.version, self.name, self.plural)
        return type(self.name, (GenericNamespacedResource,), {"_api_info": info})

    @cached_property
    def status(self) -> Any:
        """The class of its subresource `status`."""
        whole = create_api_info(self.group, self.version, self.name, self.plural).resource
        info = ApiInfo(resource=whole, parent=whole, plural=self.plural, verbs=["get", "patch"], action="status")
        return type(f"{self.name}Status", (GenericNamespacedStatus,), {"_api_info": info})


SERVING = Kind(GROUP, VERSION, KIND, PLURAL)
POD = Kind("", "v1", "Pod", "pods")
DEPLOYMENT = Kind("apps", "v1", "Deployment", "deployments")
LEADER_WORKER_SET = Kind("leaderworkerset.x-k8s.io", "v1", "LeaderWorkerSet", "leaderworkersets", optional=True)
SERVICE_MONITOR = Kind("monitoring.coreos.com", "v1", "ServiceMonitor", "servicemonitors", optional=True)
POD_MONITOR = Kind("monitoring.coreos.com", "v1", "PodMonitor", "podmonitors", optional=True)
EVENT = Kind("", "v1", "Event", "events")
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
    DEPLOYMENT,
    LEADER_WORKER_SET,
)
# What the store keeps up to date.
WATCHED = (SERVING, POD, *CHILDREN)
_BY_NAME = {(kind.api_version, kind.name): kind for kind in WATCHED}


def kind_of(document: dict[str, Any]) -> Kind:
    """The kind of an object.

    Raises:
        KeyError: the operator has nothing to do with it.
    """
    return _BY_NAME[document["apiVersion"], document["kind"]]
