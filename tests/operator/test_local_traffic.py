"""What is shown of a deployment that serves: its pace from two looks, and the page made of a look."""

import json
from datetime import UTC, datetime
from io import StringIO
from typing import Any

import pytest
from moe_contract.agent_state import read_agent_state
from moe_contract.gateway_state import SplitTotals, TargetReport, read_gateway_state
from moe_operator.cli.table import _render_splits, render_status
from moe_operator.local.change import Call, explain_refusal
from moe_operator.local.observation import Observation
from moe_operator.local.record import Alive, Life, ProcessRecord, Record, SiteRecord
from moe_operator.local.report import build_status
from moe_operator.local.traffic import WINDOW_S, Throughput, Totals, build_throughput, extend_window, read_totals
from rich.console import Console

METRICS = """\
# HELP moeserving_gateway_ttft_seconds From arrival to the first byte of the body.
# TYPE moeserving_gateway_ttft_seconds histogram
moeserving_gateway_ttft_seconds_bucket{le="0.1"} 3.0
moeserving_gateway_ttft_seconds_bucket{le="+Inf"} 5.0
moeserving_gateway_ttft_seconds_count 5.0
moeserving_gateway_ttft_seconds_sum 1.25
moeserving_gateway_retries_total 9.0
"""
GATEWAY = {
    "accepting": True,
    "held": 6,
    "engines": [{"name": "e", "in_flight": 4}],
    "totals": {"requests": 8, "failed": 2},
}
AGENT = {
    "phase": "ready",
    "engine": {"restarts": 1, "last_exit": "exit status 3"},
    "ranks": [{"rank": 0, "running": 12, "waiting": 34, "kv_usage": 0.56}],
}


def row(name: str, **changes: Any) -> ProcessRecord:
    return ProcessRecord(name=name, command=("true",), url="http://127.0.0.1:9", **changes)


def look(gateway: dict[str, Any] | None = None, agent: dict[str, Any] | None = None, metrics: str = "") -> Observation:
    record = Record(
        name="tiny", endpoint="http://127.0.0.1:8000", served_name="served", drain_timeout_s=1.0,
        site=SiteRecord(ports=(), cpus=1, memory_bytes=1, gpus=()), ready=True, ready_changed=0.0,
        processes=(
            row("gateway", life=Life.RUNNING, process=Alive(pid=4711, started=1.0)),
            row("agent-0", life=Life.BACKOFF, restarts=7, last_exit="killed by SIGKILL"),
        ),
    )  # fmt: skip
    return Observation(
        record=record,
        agents=(None if agent is None else read_agent_state(json.dumps(agent).encode()),),
        gateway=None if gateway is None else read_gateway_state(json.dumps(gateway).encode()),
        metrics=metrics,
    )


def page(seen: Observation, pace: Throughput | None = None) -> str:
    console = Console(width=120, file=StringIO())
    with console.capture() as capture:
        console.print(render_status(seen, build_status(seen, datetime.now(UTC)), throughput=pace))
    return capture.get()


def totals(at_s: float, ended: int = 0, answers: int = 0, ttft_s: float = 0.0) -> Totals:
    return Totals(at_s=at_s, ended=ended, answers=answers, ttft_s=ttft_s)


def test_totals_are_those_of_the_gateway() -> None:
    assert read_totals(look(GATEWAY, metrics=METRICS), 3.0) == totals(3.0, ended=8, answers=5, ttft_s=1.25)
    assert read_totals(look(GATEWAY), 3.0) == totals(3.0, ended=8)
    assert read_totals(look(None, metrics=METRICS), 3.0) is None


def test_the_pace_is_that_between_the_first_look_of_the_window_and_the_last() -> None:
    window = extend_window((), totals(0.0, ended=10, answers=10, ttft_s=5.0))
    assert build_throughput(window) is None
    window = extend_window(window, totals(1.0, ended=11, answers=12, ttft_s=5.5))
    window = extend_window(window, totals(4.0, ended=18, answers=14, ttft_s=6.0))
    assert build_throughput(window) == Throughput(requests_per_s=2.0, ttft_mean_s=0.25)
    window = extend_window(window, totals(4.5 + WINDOW_S, ended=18, answers=14, ttft_s=6.0))
    assert build_throughput(window) is None, "the looks before are too old"
    window = extend_window(window, totals(5.0 + WINDOW_S, ended=18, answers=14, ttft_s=6.0))
    assert build_throughput(window) == Throughput(requests_per_s=0.0, ttft_mean_s=None)


@pytest.mark.parametrize("newest", [totals(2.0, ended=3, answers=9), totals(2.0, ended=9, answers=3)])
def test_a_gateway_that_counts_from_zero_again_begins_a_new_window(newest: Totals) -> None:
    assert extend_window((totals(0.0, ended=5, answers=5), totals(1.0, ended=5, answers=5)), newest) == (newest,)


def test_a_gateway_that_gives_no_answer_ends_the_window() -> None:
    assert extend_window((totals(0.0), totals(1.0)), None) == ()


def test_the_status_shows_engines_processes_and_traffic() -> None:
    lines = page(look(GATEWAY, AGENT), Throughput(requests_per_s=2.25, ttft_mean_s=0.125)).splitlines()
    assert lines[0].split() == ["tiny", "http://127.0.0.1:8000", "model", "served"]
    assert any(
        line.split() == ["tiny-engine-0", "ready", "12", "34", "56%", "1", "exit", "status", "3"] for line in lines
    )
    assert any(line.split() == ["gateway", "running", "4711", "http://127.0.0.1:9", "0"] for line in lines)
    backoff = ["agent-0", "backoff", "-", "http://127.0.0.1:9", "7", "killed", "by", "SIGKILL"]
    assert any(line.split() == backoff for line in lines)
    assert lines[-1].strip() == (
        "requests: 2.2/s, TTFT 0.125 s (mean), 4 in flight, 6 held, 8 ended, 2 failed, 0 retried"
    )


def test_the_page_of_what_does_not_answer_says_so() -> None:
    said = page(look())
    assert any(line.split()[:2] == ["tiny-engine-0", "unknown"] for line in said.splitlines())
    assert "requests: the gateway gives no answer" in said
    assert "not ready since" in said


def test_words_of_a_process_are_shown_as_they_are() -> None:
    marked = {**AGENT, "engine": {"restarts": 1, "last_exit": "[bold]no[/bold] [/] memory"}}
    assert "[bold]no[/bold] [/] memory" in page(look(GATEWAY, marked))


@pytest.mark.parametrize(
    ("answers", "undone", "said"),
    [
        (["", "b refused: x", ""], ["", "", ""], "nothing was changed: b refused: x"),
        (["", "b is gone", "c is gone"], ["", "b is gone", ""], "nothing was changed: b is gone; c is gone"),
        (
            ["", "b refused: x", ""],
            ["a is gone", "", ""],
            "b refused: x; a took the change and could not be put back: set the value again once all answer",
        ),
    ],
)
def test_a_refusal_says_what_still_holds(answers: list[str], undone: list[str], said: str) -> None:
    calls = [Call(row=row(name), body={}, undo={}) for name in "abc"]
    assert explain_refusal(calls, answers, undone) == said


def test_the_status_shows_split_requests() -> None:
    roles = {"a": "prefill", "b": "decode", "c": "decode"}
    engines = [TargetReport(name=name, role=role) for name, role in roles.items()]
    splits = SplitTotals(transfers=12, fall_backs={"lease_over": 2, "decode_error": 1}, role_changes={"gain": 1})
    assert _render_splits(splits, engines) == (
        "prefill and decode apart: 12 transfers, 3 fall-backs (decode_error 1, lease_over 2), 1 role changes, "
        "2 decode and 1 prefill"
    )
    assert _render_splits(SplitTotals(), ()).endswith("0 fall-backs, 0 role changes, no engine takes part")
