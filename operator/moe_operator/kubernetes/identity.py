"""Whether an answer comes from the pod that was asked. Pure.

Between two looks at the cluster the address of a pod may have become another pod's, of another tenant perhaps. So
agents and gateways repeat the uid of their pod in their states. An answer with another uid, or with none from a pod
whose template asks for it, is not accepted, and no control token goes there.

A pod of an earlier build has a template without the uid. During the upgrade, which replaces it, its state is accepted;
it gets no token, for its settings come with the new pod.
"""

from enum import StrEnum
from typing import Any

from moe_contract.agent_state import AgentState
from moe_contract.gateway_state import GatewayState
from moe_contract.pod_identity import UID_VARIABLE

Document = dict[str, Any]


class Identity(StrEnum):
    """What the answer of a pod proves."""

    PROVED = "proved"
    """The uid in the answer is that of the pod."""
    UNKNOWN = "unknown"
    """A pod of an earlier build, which cannot say its uid."""
    OTHER = "other"
    """Another pod, or a program that is no agent or gateway of this build."""


def says_uid(pod: Document) -> bool:
    """Whether the pod's template gives its containers the uid."""
    containers = pod["spec"]["containers"]
    return any(row.get("name") == UID_VARIABLE for container in containers for row in container.get("env") or ())


def judge_identity(uid: str, asked: bool, state: AgentState | GatewayState) -> Identity:
    """Returns what an answer proves.

    Args:
        uid: of the pod that was meant.
        asked: whether the pod's template gives it the uid (`says_uid`).
        state: the answer.
    """
    if state.pod.uid:
        return Identity.PROVED if state.pod.uid == uid else Identity.OTHER
    return Identity.OTHER if asked else Identity.UNKNOWN
