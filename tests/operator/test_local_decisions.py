"""The supervisor's and the commands' decisions: restarts, how far a start is, the status, ports, GPUs."""

import json
import socket
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_contract.agent_state import AgentState, StartProgress, read_agent_state
from moe_contract.gateway_state import read_gateway_state
from moe_operator.api.status import ConditionStatus, StartStatus
from moe_operator.local.machine import find_free_ports, find_gpus, is_port_free, query_gpus, select_gpus
from moe_operator.local.observation import Observation
from moe_operator.local.record import GATEWAY, PROMETHEUS, Life, ProcessRecord, Record, SiteRecord
from moe_operator.local.report import Failed, Ready, Starting, build_status, find_failing, judge_start
from moe_operator.local.restarts import Rules, backoff_s, describe_exit, next_failures

RULES = Rules(first_backoff_s=1.0, last_backoff_s=8.0, steady_s=60.0)
CHANGED = 1_700_000_000.0
NOW = datetime(2024, 1, 1, tzinfo=UTC)
GATEWAY_STATE = {"accepting": True, "config": {"dispatch": {"policy": "predicted"}}}


def row(name: str, **changes: Any) -> ProcessRecord:
    return ProcessRecord(name=name, command=(), url="http://127.0.0.1:1", life=Life.RUNNING, **changes)


def record(*rows: ProcessRecord, ready: bool = True) -> Record:
    return Record(
        name="a",
        endpoint="http://127.0.0.1:8000",
        served_name="m",
        drain_timeout_s=1.0,
        site=SiteRecord(ports=(), cpus=1, memory_bytes=1, gpus=()),
        processes=rows or (row(GATEWAY), row("agent-0"), row("agent-1")),
        ready=ready,
        ready_changed=CHANGED,
    )


def agent(
    phase: str = "ready", policy: str = "sjf", restarts: int = 0, ranks: tuple[float, ...] = (0.0,)
) -> AgentState:
    document = {
        "phase": phase,
        "engine": {"restarts": restarts, "last_exit": "killed by SIGKILL" if restarts else ""},
        "config": {"request": {"policy": policy}},
        "ranks": [{"rank": 0, "running": 2, "waiting": 3, "kv_usage": kv_usage} for kv_usage in ranks],
    }
    return read_agent_state(json.dumps(document).encode())


def seen(*agents: Any, gateway: Any = GATEWAY_STATE, of: Record | None = None) -> Observation:
    state = None if gateway is None else read_gateway_state(json.dumps(gateway).encode())
    return Observation(record=of or record(), agents=agents or (agent(), agent()), gateway=state)


@pytest.mark.parametrize(("failures", "pause_s"), [(1, 1.0), (2, 2.0), (3, 4.0), (4, 8.0), (5, 8.0), (5000, 8.0)])
def test_the_pause_doubles_up_to_its_bound(failures: int, pause_s: float) -> None:
    assert backoff_s(failures, RULES) == pause_s


@given(failures=st.integers(0, 10_000), uptime_s=st.floats(0, 1e6))
def test_only_a_steady_life_makes_the_next_failure_a_first_one(failures: int, uptime_s: float) -> None:
    assert next_failures(failures, uptime_s, RULES) == (1 if uptime_s >= RULES.steady_s else failures + 1)


@pytest.mark.parametrize(
    ("status", "words"), [(2, "exit status 2"), (-9, "killed by SIGKILL"), (-99, "killed by signal 99")]
)
def test_an_exit_is_reported_in_words(status: int, words: str) -> None:
    assert describe_exit(status) == words


def test_a_start_is_over_when_every_engine_is_ready_and_the_gateway_accepts() -> None:
    assert judge_start(seen(), NOW) == Ready()
    assert judge_start(seen(gateway={"accepting": False}), NOW) == Starting(phases=dict.fromkeys(ENGINES, "ready"))
    assert judge_start(seen(gateway=None), NOW) == Starting(phases=dict.fromkeys(ENGINES, "ready"))
    assert judge_start(seen(agent(), agent("starting")), NOW) == Starting(
        phases={"a-engine-0": "ready", "a-engine-1": "starting"}
    )


ENGINES = ("a-engine-0", "a-engine-1")


def test_a_start_has_the_phase_that_its_agent_reads_in_the_log() -> None:
    loading = replace(agent("starting"), start=StartProgress(phase="loading weights", progress="3 of 8 files", age_s=5))
    look = seen(agent(), loading)
    assert judge_start(look, NOW) == Starting(
        phases={"a-engine-0": "ready", "a-engine-1": "loading weights 3 of 8 files"}
    )
    start = build_status(look, NOW).engines[1].start
    assert start == StartStatus(phase="loading weights", progress="3 of 8 files", since=NOW - timedelta(seconds=5))


def test_an_agent_that_does_not_answer_or_says_what_is_not_known_is_unknown() -> None:
    phases = dict.fromkeys(ENGINES, "waits for its agent")
    assert judge_start(seen(None, agent("asleep")), NOW) == Starting(phases=phases)


def test_a_start_fails_when_a_process_or_an_engine_failed_twice() -> None:
    twice = record(row(GATEWAY), row("agent-0"), row("agent-1", restarts=2, last_exit="exit status 1"))
    assert judge_start(seen(of=twice), NOW) == Failed(process="agent-1", reason="exit status 1")
    assert judge_start(seen(agent(), agent("backoff", restarts=2)), NOW) == Failed(
        process="engine-1", reason="killed by SIGKILL"
    )
    assert isinstance(judge_start(seen(agent(), agent("backoff", restarts=1)), NOW), Starting)
    assert judge_start(seen(agent(), agent("ready", restarts=2)), NOW) == Ready()


def test_a_prometheus_that_fails_is_named_and_does_not_decide_over_the_start() -> None:
    failing = row(PROMETHEUS, restarts=5, last_exit="exit status 1")
    of = record(row(GATEWAY, restarts=1), row("agent-0"), row("agent-1"), failing)
    assert judge_start(seen(of=of), NOW) == Ready()
    assert isinstance(judge_start(seen(agent(), agent("starting"), of=of), NOW), Starting)
    assert find_failing(of) == (failing,)
    assert find_failing(record(row(GATEWAY), row("agent-0"), row(PROMETHEUS))) == ()


def test_the_status_sums_over_ranks_and_takes_the_fullest_cache() -> None:
    status = build_status(seen(agent(ranks=(0.2, 0.6)), None), NOW)
    assert (status.replicas, status.ready_replicas) == (2, 1)
    assert (status.engines[0].running, status.engines[0].waiting, status.engines[0].kv_usage) == (4, 6, 0.6)


def test_an_order_on_which_engines_differ_is_left_out() -> None:
    assert build_status(seen(agent(), agent(policy="fcfs")), NOW).policies.request is None
    assert build_status(seen(gateway=None), NOW).policies.engine is None


@pytest.mark.parametrize(
    ("look", "status", "reason"),
    [
        (seen(), ConditionStatus.TRUE, "Serving"),
        (seen(of=replace(record(), draining=True)), ConditionStatus.FALSE, "Draining"),
        (seen(gateway=None), ConditionStatus.FALSE, "GatewayUnreachable"),
        (seen(agent("starting"), None, gateway={"accepting": False}), ConditionStatus.FALSE, "NoEngineReady"),
    ],
)
def test_the_condition_says_why(look: Observation, status: ConditionStatus, reason: str) -> None:
    condition = build_status(look, NOW).conditions[0]
    assert (condition.type, condition.status, condition.reason) == ("Ready", status, reason)


def test_the_condition_keeps_the_time_of_its_change() -> None:
    assert build_status(seen(), NOW).conditions[0].last_transition_time.timestamp() == CHANGED
    assert build_status(seen(of=record(ready=False)), NOW).conditions[0].last_transition_time == NOW


@pytest.mark.parametrize(
    ("visible", "gpus"),
    [(None, ("0", "1")), ("", ()), ("1", ("1",)), ("-1", ()), (" GPU-5e , 0", ("GPU-5e", "0"))],
)
def test_gpus_are_those_that_cuda_leaves_visible(visible: str | None, gpus: tuple[str, ...]) -> None:
    assert select_gpus(["0", "1"], visible) == gpus


def test_the_tool_of_the_gpus_is_asked_by_field(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    says = '*=index) printf "0\\n1\\n";; *=name) printf "NVIDIA H100 80GB\\nNVIDIA A100\\n";;'
    tool.write_text(f'#!/bin/sh\ncase "$1" in {says} esac\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert find_gpus() == ("1",)
    assert query_gpus("name") == ("NVIDIA H100 80GB", "NVIDIA A100")
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert query_gpus("name") == ()
    tool.unlink()
    assert find_gpus() == ()


def test_free_ports_are_different_and_free_and_a_taken_one_is_not() -> None:
    ports = find_free_ports(20)
    assert len(set(ports)) == 20
    with socket.create_server(("127.0.0.1", ports[0])):
        assert not is_port_free(ports[0])
    assert is_port_free(ports[0])
