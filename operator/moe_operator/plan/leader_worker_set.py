"""Engines that span several nodes: their LeaderWorkerSet, what sets its workers apart, and their budget. Pure.

A replica is a group of pods: a leader, which serves, and workers, which lend their devices to it. Only a leader carries
the label of its revision, by which Services and the scale subresource find what serves. The facts about the
controller are those of LeaderWorkerSet v0.10 (lws.sigs.k8s.io).
"""

import math
from collections.abc import Mapping
from typing import Any

from moe_contract.engine_process import engine_grace_s, worker_grace_s

from moe_operator.api.resource import MoEServing
from moe_operator.api.units import duration_s
from moe_operator.plan.names import LWS_NAME, REVISION, Names

Object = dict[str, Any]
GROUPS = "groups"


def build_leader_worker_set(
    resource: MoEServing, metadata: Object, template: Object, count: Mapping[str, int], rolling: Object
) -> Object:
    """Returns the LeaderWorkerSet whose leaders have this template; `count` is empty where another sets the number."""
    return {
        "apiVersion": "leaderworkerset.x-k8s.io/v1",
        "kind": "LeaderWorkerSet",
        "metadata": metadata,
        "spec": {
            **count,
            "startupPolicy": "LeaderCreated",
            "rolloutStrategy": {"type": "RollingUpdate", "rollingUpdateConfiguration": rolling},
            # A Service of its own for each group, `NAME-0`, which publishes pods that are not ready: a leader is ready
            # only when its workers have found it. The Service that all groups share would bear this set's name, which
            # is that of the Service for gateways, and the controller makes it only where there is none.
            "networkConfig": {"subdomainPolicy": "UniquePerReplica"},
            "leaderWorkerTemplate": {
                "size": resource.spec.engine.parallelism.nodes,
                "restartPolicy": "RecreateGroupOnPodRestart",
                "leaderTemplate": template,
                "workerTemplate": build_worker_template(resource, template),
            },
        },
    }


def build_worker_template(resource: MoEServing, leader: Object) -> Object:
    """Returns the template of a group's workers: not labelled as what serves, and with time to outlast the leader."""
    metadata, spec = leader["metadata"], leader["spec"]
    labels = {name: value for name, value in metadata["labels"].items() if name != REVISION}
    drain_s = duration_s(resource.spec.engine.drain_timeout)
    if spec.get("terminationGracePeriodSeconds") == engine_grace_s(drain_s):
        spec = {**spec, "terminationGracePeriodSeconds": worker_grace_s(drain_s)}
    return {**leader, "metadata": {**metadata, "labels": labels}, "spec": spec}


def build_group_budgets(
    resource: MoEServing, names: Names, workload: str, replicas: int, *, has_groups: bool = False
) -> list[Object]:
    """Returns the budget of evictions of a workload's groups, none where its engines span one node.

    With `has_groups` some are still there, until engines of one node have taken over.

    One budget has leaders and workers, and lets go no more pods than groups may be away: in the worst case each is of
    another group, and a group without one of its pods does not serve. A share of the pods would take more groups.
    """
    if resource.spec.engine.parallelism.nodes == 1 and not has_groups:
        return []
    return [
        {
            "apiVersion": "policy/v1",
            "kind": "PodDisruptionBudget",
            "metadata": {"name": f"{workload}-{GROUPS}"},
            "spec": {
                "maxUnavailable": groups_away(resource.spec.disruption.max_unavailable, replicas),
                "selector": {"matchLabels": {**names.labels("engine"), LWS_NAME: workload}},
                "unhealthyPodEvictionPolicy": "AlwaysAllow",
            },
        }
    ]


def groups_away(limit: str | int, replicas: int) -> int:
    """Returns how many of the groups a limit, `2` or `25%`, lets go; a share is rounded up, as Kubernetes does."""
    share, percent, _ = str(limit).partition("%")
    return math.ceil(int(share) * replicas / 100) if percent else int(share)
