"""Names and labels of a resource's children in a cluster. Pure; the one place of them.

A child's name is the resource's with a suffix. Where that is too long for its kind the front is cut and a hash of the
whole name put in, so that two resources never share a child.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256

from moe_scheduling.engine.disaggregation import EngineRole

from moe_operator.api import labels

GROUP = "moeserving.dev"
MANAGER = "moeserving"
REVISION = f"{GROUP}/revision"
STABLE, CANARY = "stable", "canary"
REVISION_DIGEST = f"{REVISION}-digest"
# On engines that have one role for their life, and on their workload.
ROLE = f"{GROUP}/role"
CONFIG = f"{GROUP}/config"
APPLIED = f"{GROUP}/applied"
# On a claim that the operator made and no resource uses any more.
KEPT = f"{GROUP}/kept"
# On a LeaderWorkerSet that gets smaller: the number of groups that stay.
SCALE_IN = f"{GROUP}/scale-in"
# On each child: the uid of its resource; empty once a resource was deleted and its children were to stay.
OWNER = f"{GROUP}/owner"
ROTATE = f"{GROUP}/rotate-token"
ROTATED_AT = f"{GROUP}/rotated-at"
MANAGED_BY, INSTANCE, COMPONENT = labels.MANAGED_BY, labels.INSTANCE, labels.COMPONENT
# Labels and an annotation that the LeaderWorkerSet controller sets on pods (v0.10).
LWS_NAME = "leaderworkerset.sigs.k8s.io/name"
LWS_GROUP_INDEX = "leaderworkerset.sigs.k8s.io/group-index"
LWS_WORKER_INDEX = "leaderworkerset.sigs.k8s.io/worker-index"
LWS_SIZE = "leaderworkerset.sigs.k8s.io/size"

# Names of Services, and values of labels, have at most 63 characters. A Deployment's pod carries 17 more, a
# LeaderWorkerSet's `-0-0` and its StatefulSets' revision label 11 more; 52 is what all of them have room for.
LONGEST_SERVICE = 63
LONGEST_WORKLOAD = 46
_HASH = 8


class Suffix:
    """What stands behind the resource's name."""

    ENGINE = "engine"
    CANARY = "engine-canary"
    GATEWAY = "gateway"
    CONTROL = "control"
    SETTINGS = "settings"
    CACHE = "cache"
    PICKER = "picker"


def child_name(name: str, suffix: str, longest: int = LONGEST_SERVICE) -> str:
    """`NAME-SUFFIX`, at most `longest` characters: `a…-HASH-SUFFIX` where it would be more."""
    whole = f"{name}-{suffix}" if suffix else name
    if len(whole) <= longest:
        return whole
    digest = sha256(name.encode()).hexdigest()[:_HASH]
    tail = f"-{digest}-{suffix}" if suffix else f"-{digest}"
    return name[: longest - len(tail)].rstrip("-") + tail


@dataclass(frozen=True, slots=True)
class Names:
    """The children of one resource."""

    name: str

    def workload(self, suffix: str) -> str:
        """Of a Deployment or LeaderWorkerSet and of what belongs to it alone."""
        return child_name(self.name, suffix, LONGEST_WORKLOAD)

    @property
    def engine(self) -> str:
        return self.workload(Suffix.ENGINE)

    @property
    def canary(self) -> str:
        return self.workload(Suffix.CANARY)

    @property
    def gateway(self) -> str:
        return self.workload(Suffix.GATEWAY)

    @property
    def service(self) -> str:
        return self.name

    @property
    def control(self) -> str:
        return child_name(self.name, Suffix.CONTROL)

    @property
    def settings(self) -> str:
        return child_name(self.name, Suffix.SETTINGS)

    @property
    def picker(self) -> str:
        return child_name(self.name, Suffix.PICKER)

    @property
    def cache(self) -> str:
        return child_name(self.name, Suffix.CACHE)

    def of_role(self, role: EngineRole, revision: str = STABLE) -> str:
        """The workload of the engines of a role, where roles are fixed; of engines of all roles the only one."""
        whole = Suffix.ENGINE if revision == STABLE else Suffix.CANARY
        return self.workload(whole if role is EngineRole.UNIFIED else f"{whole}-{role.value}")

    def labels(
        self, component: str | None = None, revision: str | None = None, role: EngineRole = EngineRole.UNIFIED
    ) -> dict[str, str]:
        """Labels of a child; also the selector of its pods."""
        found = {MANAGED_BY: MANAGER, INSTANCE: self.name}
        if component is not None:
            found[COMPONENT] = component
        if revision is not None:
            found[REVISION] = revision
        if role is not EngineRole.UNIFIED:
            found[ROLE] = role.value
        return found


def replica_labels(names: Names, nodes: int) -> dict[str, str]:
    """Labels of the pods that stand for the stable replicas: leaders alone where a replica spans several nodes."""
    return names.labels("engine", "stable") | ({LWS_WORKER_INDEX: "0"} if nodes > 1 else {})


def is_replica(labels: Mapping[str, str]) -> bool:
    """Whether a pod of an engine stands for its replica: of several nodes the leader does."""
    return labels.get(LWS_WORKER_INDEX, "0") == "0"


def selector_text(labels: dict[str, str]) -> str:
    """Labels as a selector's text."""
    return ",".join(f"{name}={value}" for name, value in labels.items())
