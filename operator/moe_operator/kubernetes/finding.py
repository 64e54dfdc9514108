"""One thing that is wrong with a resource's objects, in the form that conditions show."""

from dataclasses import dataclass

from moe_operator.api.reasons import Reason

LONGEST_MESSAGE = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One problem.

    Attributes:
        reason: in one word, for the condition.
        message: the problem and its remedy.
        pod: where it was seen; empty for what concerns no single pod.
        component: `engine` or `gateway`, what cannot serve because of it; empty where that is not known.
    """

    reason: Reason
    message: str
    pod: str = ""
    component: str = ""


def build_finding(reason: Reason, advice: str, *, where: str, detail: str, component: str, pod: str = "") -> Finding:
    """A finding whose message has the advice first and behind it, in brackets, the cluster's own words."""
    message = f"{advice} ({where}: {detail})" if detail else f"{advice} ({where})"
    return Finding(reason=reason, message=message[:LONGEST_MESSAGE], pod=pod, component=component)
