"""Whether only a change can make another pass worth while, so that none is made because time passes. Pure.

Some findings depend on time: a pod that nobody schedules or that is not ready for long, a gateway that sees none of the
engines. While one of them may come, passes are made from time to time.
"""

from collections.abc import Sequence
from typing import Any

from moe_operator.autoscale.signal import States
from moe_operator.kubernetes.serving import sees_engine
from moe_operator.plan.pod_status import is_engine, is_over, is_ready

Document = dict[str, Any]


def is_quiet(pods: Sequence[Document], states: States) -> bool:
    """Whether every pod is ready or over for good, and each gateway that answered sees an engine where one is ready."""
    if not all(is_ready(pod) or is_over(pod) for pod in pods):
        return False
    return not any(map(is_engine, filter(is_ready, pods))) or all(map(sees_engine, states.gateways.values()))
