"""How far engines are that start, in the status and the condition of a resource in a cluster."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from moe_contract.agent_state import AgentState, StartProgress
from moe_operator.autoscale.signal import States
from moe_operator.kubernetes.conditions import PROGRESSING, ConditionInputs, build_conditions
from moe_operator.kubernetes.report import build_status
from moe_operator.plan.names import Names

from tests.operator.pods import pod

YOUNG, OLD = timedelta(seconds=5), timedelta(minutes=1)


def status(before: dict[str, Any], *starts: StartProgress | None) -> tuple[dict[str, Any], str]:
    """The status document, and the message of `Progressing`, of engines of which each starts or is ready."""
    states = {
        f"e{number}": AgentState(phase="ready" if start is None else "starting", accepting=start is None, start=start)
        for number, start in enumerate(starts)
    }
    resource = {"metadata": {"name": "a", "generation": 1}, "spec": {}, "status": before}
    pods = [pod(name, ready=state.ready) for name, state in states.items()]
    written, inputs = build_status(
        resource, Names("a"), "default", ConditionInputs(desired=len(starts)), pods, States(engines=states), {}
    )
    conditions = {row.type: row.message for row in build_conditions(inputs, {}, datetime.now(UTC))}
    return written, conditions[PROGRESSING]


def loading(number: int, age_s: float = 3.0) -> StartProgress:
    return StartProgress(phase="loading weights", progress=f"{number} of 8 files", age_s=age_s)


def test_the_condition_says_which_engine_is_in_which_phase_since_when() -> None:
    download = StartProgress(phase="downloading", progress="12.0 GB of 80.0 GB, 45 MB/s, about 25 min left", age_s=61.0)
    written, message = status({}, None, loading(3), download)
    since = [row.get("start", {}).get("since", "") for row in written["engines"]]
    assert since[0] == ""
    times = [datetime.fromisoformat(text).strftime("%H:%M:%S UTC") for text in since[1:]]
    assert message == (
        f"1 of 3 engines are ready; e1: loading weights 3 of 8 files, since {times[0]}; "
        f"e2: downloading 12.0 GB of 80.0 GB, 45 MB/s, about 25 min left, since {times[1]}"
    )


@pytest.mark.parametrize(("age", "shown"), [(YOUNG, "3 of 8 files"), (OLD, "4 of 8 files")])
def test_how_far_a_phase_is_is_written_now_and_then_and_its_begin_stays(age: timedelta, shown: str) -> None:
    first, _ = status({}, loading(3))
    aged = first | {"numbersAt": (datetime.now(UTC) - age).isoformat()}
    again, message = status(aged, loading(4, age_s=8.7))
    start = again["engines"][0]["start"]
    assert (start["progress"], start["since"]) == (shown, first["engines"][0]["start"]["since"])
    assert shown in message


def test_another_phase_is_written_at_once() -> None:
    first, _ = status({}, loading(3))
    again, message = status(first, StartProgress(phase="compiling"))
    assert again["engines"][0]["start"]["phase"] == "compiling"
    assert "e0: compiling, since" in message
    assert "start" not in status(again, None)[0]["engines"][0]
