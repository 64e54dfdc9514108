"""Problems that stand in the conditions of Deployments. Pure.

The Deployment controller copies `ReplicaFailure` from the ReplicaSet: pods that may not be made, because of a quota, a
Pod Security Standard, a SecurityContextConstraint or a webhook. It takes it away once they could be made.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from moe_operator.api.reasons import Reason
from moe_operator.kubernetes.finding import Finding, build_finding
from moe_operator.plan.names import COMPONENT

Document = dict[str, Any]
# A paused rollout is Progressing=Unknown.
_REASONS = ("FailedCreate", "ProgressDeadlineExceeded")
FORBIDDEN_ADVICE = "pods may not be made; see quotas, Pod Security and podTemplate"


def find_failures_to_create(workloads: Iterable[Document]) -> list[Finding]:
    """What keeps the controllers of workloads from making pods."""
    return [*_find(workloads, "ReplicaFailure", "True", Reason.FAILED_CREATE, FORBIDDEN_ADVICE)]


def find_deadlines(workloads: Iterable[Document]) -> list[Finding]:
    """Rollouts that have made no progress for the time that an engine or a gateway has to start."""
    advice = "the rollout makes no progress; look at its newest pods"
    return [*_find(workloads, "Progressing", "False", Reason.PROGRESS_DEADLINE_EXCEEDED, advice)]


def _find(workloads: Iterable[Document], kind: str, status: str, reason: Reason, advice: str) -> Iterator[Finding]:
    for live in workloads:
        for row in live.get("status", {}).get("conditions") or ():
            if (row.get("type"), row.get("status")) == (kind, status) and row.get("reason") in _REASONS:
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
