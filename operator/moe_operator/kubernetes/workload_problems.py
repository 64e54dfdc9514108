"""Problems that stand in the conditions of Deployments. Pure.

The Deployment controller copies `ReplicaFailure` from the ReplicaSet: pods that may not be made, because of a quota, a
Pod Security Standard, a SecurityContextConstraint or a webhook, or that may not be deleted. It takes it away once they
could be. A ReplicaSet that may not be made itself stands in `Progressing`, as a rollout past its deadline does.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from moe_operator.api.reasons import Reason
from moe_operator.kubernetes.finding import Finding, build_finding
from moe_operator.plan.names import COMPONENT

Document = dict[str, Any]
FORBIDDEN_ADVICE = "pods may not be made; see quotas, limit ranges, Pod Security and podTemplate"


def find_failures_to_create(workloads: Iterable[Document]) -> list[Finding]:
    """What keeps the controllers of workloads from making pods."""
    found, rows = Reason.FAILED_CREATE, [*workloads]
    return [
        *_find(rows, ("ReplicaFailure", "True", "FailedCreate"), found, FORBIDDEN_ADVICE),
        *_find(rows, ("Progressing", "False", "ReplicaSetCreateError"), found, FORBIDDEN_ADVICE),
    ]


def find_failures_to_delete(workloads: Iterable[Document]) -> list[Finding]:
    """What keeps the controllers of workloads from deleting pods: they hold what they have, as after a scale-in."""
    advice = "pods may not be deleted; see webhooks and admission policies"
    return [*_find(workloads, ("ReplicaFailure", "True", "FailedDelete"), Reason.FAILED_DELETE, advice)]


def find_deadlines(workloads: Iterable[Document]) -> list[Finding]:
    """Rollouts that have made no progress for the time that an engine or a gateway has to start."""
    advice = "the rollout makes no progress; look at its newest pods"
    condition = ("Progressing", "False", "ProgressDeadlineExceeded")
    return [*_find(workloads, condition, Reason.PROGRESS_DEADLINE_EXCEEDED, advice)]


def _find(
    workloads: Iterable[Document], condition: tuple[str, str, str], reason: Reason, advice: str
) -> Iterator[Finding]:
    """A finding for each workload with this condition: type, status and reason."""
    for live in workloads:
        for row in live.get("status", {}).get("conditions") or ():
            if (row.get("type"), row.get("status"), row.get("reason")) == condition:
                yield build_finding(
                    reason,
                    advice,
                    where=f"{live.get('kind', 'Deployment')} {live['metadata']['name']}",
                    detail=row.get("message") or row.get("reason", ""),
                    component=component_of_workload(live),
                )


def component_of_workload(workload: Document) -> str:
    """The component of its pods: `engine` or `gateway`."""
    return str((workload["metadata"].get("labels") or {}).get(COMPONENT, ""))
