"""When nothing but a change can make a pass worth while: all pods are ready, and gateways see the engines."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_operator.autoscale.signal import States
from moe_operator.kubernetes.quiet import is_quiet
from pods import agent, gateway, pod, states

Document = dict[str, Any]
ENGINE, FRONT = pod(), pod("tiny-gateway-a", "gateway")
SEES, BLIND = gateway(accepting=True), gateway(accepting=False)


@pytest.mark.parametrize(
    ("pods", "said", "quiet"),
    [
        ([], States(), True),
        ([ENGINE, FRONT], states({"tiny-engine-a": agent(), "tiny-gateway-a": SEES}), True),
        ([ENGINE, FRONT], States(), True),
        ([ENGINE, FRONT], states({"tiny-gateway-a": BLIND}), False),
        ([FRONT], states({"tiny-gateway-a": BLIND}), True),
        ([ENGINE, pod("tiny-gateway-a", "gateway", ready=False)], States(), False),
        ([ENGINE, pod("tiny-engine-b", phase="Failed", ready=False)], States(), True),
        ([ENGINE, pod("tiny-engine-b", ending=True)], States(), False),
    ],
    ids=[
        "no pods", "all is well", "silent peers call by themselves", "a blind gateway", "scaled to zero",
        "a pod that is not ready", "a pod that is over", "a pod on its way out",
    ],
)  # fmt: skip
def test_time_alone_matters_while_something_is_not_well(pods: list[Document], said: States, quiet: bool) -> None:
    assert is_quiet(pods, said) is quiet


@given(
    st.lists(st.tuples(st.booleans(), st.booleans(), st.sampled_from(["Running", "Pending", "Failed", "Succeeded"])))
)
def test_one_pod_that_may_still_change_by_itself_is_enough(rows: list[tuple[bool, bool, str]]) -> None:
    pods = [
        pod(f"tiny-engine-{number}", ready=ready, ending=ending, phase=phase)
        for number, (ready, ending, phase) in enumerate(rows)
    ]
    waits = any(phase in ("Running", "Pending") and (ending or not ready) for ready, ending, phase in rows)
    assert is_quiet(pods, States()) is not waits
