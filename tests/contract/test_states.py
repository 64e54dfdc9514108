"""Each writer's real output, fed to each reader: agent -> gateway, operator; gateway -> operator, autoscaler."""

import dataclasses
import json
import math
import time
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_agent.api.state import build_state as build_agent_state
from moe_agent.shared_memory.control_record import Control
from moe_agent.shared_memory.rank_record import RankState
from moe_agent.supervisor.supervisor import Phase
from moe_contract.agent_state import RankReport, StartProgress, read_agent_state, read_engine_state, write_agent_state
from moe_contract.gateway_config import EngineAddress, GatewayConfig, initial_settings
from moe_contract.gateway_state import read_gateway_state, write_gateway_state
from moe_contract.pod_identity import PodIdentity
from moe_gateway.engines.dispatcher import Dispatcher
from moe_gateway.engines.signals import take_state
from moe_gateway.request_stats import RequestStats
from moe_gateway.state import build_state as build_gateway_state
from moe_operator.autoscale.signal import Fleet, build_signal
from moe_operator.kubernetes.peers import Peer, differs
from moe_scheduling.expert.decision import ExpertSettings
from moe_scheduling.request.order import RequestSettings
from moe_scheduling.signals import EngineSignal, StepTime, Target

COUNTS = st.integers(0, 2**53)
TIMES = st.floats(0, 1e9)
SIGNALS = st.builds(
    EngineSignal,
    **dict.fromkeys(
        (
            "step",
            "running",
            "waiting",
            "waiting_prefill_tokens",
            "running_prefill_tokens",
            "scheduled_prefill_tokens",
            "step_tokens",
            "decode_tokens",
            "preemptions",
            "computed_tokens",
        ),
        COUNTS,
    ),
    kv_usage=st.floats(0, 1),
    busy_s=TIMES,
    step_time=st.none()
    | st.builds(StepTime, base_s=TIMES, prefill_s=TIMES, decode_s=TIMES, decode_root_s=TIMES, prefill_base_s=TIMES),
    expert_balance=st.floats(1, 100),
    expert_pressure=st.floats(0, 100),
)
SIGNAL = EngineSignal(step=3, running=2, waiting=1, kv_usage=0.5, computed_tokens=70, decode_tokens=2)
POD = PodIdentity(name="tiny-engine-a", uid="1")
ADDRESS = EngineAddress(name="e", url="http://127.0.0.1:1", agent_url="http://127.0.0.1:2", ranks=2)
CONFIG = GatewayConfig.model_validate(
    {"listen": {"port": 1}, "admin": {"port": 2}, "token_file": "/t", "engines": [ADDRESS.model_dump()]}
)


def agent_text(*signals: EngineSignal, **process: Any) -> bytes:
    """The line that an agent writes whose ranks published these signals."""
    values = {"phase": Phase.READY, "accepting": True, "url": "http://127.0.0.1:1", "pid": 7, "restarts": 1}
    supervisor: Any = SimpleNamespace(
        **(values | {"last_exit": "exit status 3", "max_model_len": 4096, "troubles": {}, "start": None} | process)
    )
    ranks = {
        number: RankState(pid=7, written_s=1.0, config_version=1, signal=signal)
        for number, signal in enumerate(signals)
    }
    control = Control(version=4, request=RequestSettings(ageing_rate=7.0), expert=ExpertSettings(move_budget=9))
    return write_agent_state(build_agent_state("e", "tiny", supervisor, control, ranks, now_s=3.0, pod=POD))


def gateway_text(dispatcher: Dispatcher) -> bytes:
    """The answer that a gateway with this dispatcher writes."""
    return write_gateway_state(
        build_gateway_state(dispatcher, RequestStats(), initial_settings(CONFIG), draining=False, now_s=3.0, pod=POD)
    )


@given(st.lists(SIGNALS, max_size=4))
def test_what_ranks_publish_reaches_every_reader_of_the_agent_whole(signals: list[EngineSignal]) -> None:
    text = agent_text(*signals)
    for state in (read_agent_state(text), read_engine_state(text)):
        assert [row.signal for row in state.ranks] == signals
        assert [row.rank for row in state.ranks] == list(range(len(signals)))
        assert (state.phase, state.accepting, state.ready) == ("ready", True, True)
        assert (state.engine.model, state.engine.pid, state.engine.last_exit) == ("tiny", 7, "exit status 3")
    assert read_agent_state(text).pod == POD
    config = read_agent_state(text).config
    assert (config.version, config.request, config.expert) == (
        4, RequestSettings(ageing_rate=7.0), ExpertSettings(move_budget=9),
    )  # fmt: skip


def test_the_agents_state_reaches_the_gateways_dispatcher_and_its_own_state() -> None:
    dispatcher = Dispatcher(CONFIG)
    engine = dispatcher.engines["e"]
    take_state(engine, read_engine_state(agent_text(SIGNAL, dataclasses.replace(SIGNAL, step=9))), dispatcher, 3.0)
    assert engine.is_reachable
    state = read_gateway_state(gateway_text(dispatcher))
    assert [(row.name, row.rank, row.reachable, row.signal_source) for row in state.engines] == [
        ("e", 0, True, "agent"), ("e", 1, True, "agent"),
    ]  # fmt: skip
    assert [row.signal for row in state.engines] == [SIGNAL, dataclasses.replace(SIGNAL, step=9)]
    assert [row.signal_age_s for row in state.engines] == [2.0, 2.0]
    assert dispatcher.target_states[Target("e", 1)].signal.step == 9


def test_the_gateways_state_is_read_as_it_was_written_and_gives_the_fleets_signal() -> None:
    dispatcher = Dispatcher(CONFIG)
    take_state(dispatcher.engines["e"], read_engine_state(agent_text(SIGNAL, SIGNAL)), dispatcher, 3.0)
    written = build_gateway_state(
        dispatcher, RequestStats(), initial_settings(CONFIG), draining=False, now_s=3.0, pod=POD
    )
    read = read_gateway_state(write_gateway_state(written))
    assert read == written
    assert read.pod == POD
    assert (read.dispatch_policy, read.totals.requests) == (CONFIG.dispatch.policy, 0)
    agent = read_agent_state(agent_text(SIGNAL, dataclasses.replace(SIGNAL, kv_usage=0.75)))
    signal = build_signal(Fleet(gateways=(read,), engines={"e": agent}, silent=0, ready=1, observed_s=3.0))
    assert signal is not None
    assert (signal.kv_usage, signal.held, signal.in_flight) == (0.75, 0, 0)


@pytest.mark.parametrize(
    "start",
    [
        *(5, "loading", {"phase": 7}, {"progress": "3 of 8"}, []),
        *({"phase": "loading", "age_s": age_s} for age_s in (math.nan, math.inf, -1.0, 1e300)),
    ],
)
def test_a_start_that_cannot_be_read_is_none(start: Any) -> None:
    text = json.dumps({"phase": "starting", "start": start}).encode()
    assert read_engine_state(text).start is None
    assert read_agent_state(text).start is None
    known = {"phase": "loading weights", "newer": True}
    assert read_engine_state(json.dumps({"phase": "starting", "start": known}).encode()).start == StartProgress(
        phase="loading weights"
    )


@pytest.mark.parametrize("reader", [read_agent_state, read_engine_state])
def test_an_agent_of_another_version_is_read(reader: Any) -> None:
    document = json.loads(agent_text(SIGNAL))
    document["future"] = document["engine"]["future"] = document["ranks"][0]["future"] = {"x": 1}
    document["config"]["request"]["policy"] = "of the future"
    del document["ranks"][0]["expert_pressure"], document["engine"]["max_model_len"]
    state = reader(json.dumps(document).encode())
    assert state.ranks[0].signal == SIGNAL
    if reader is read_agent_state:
        assert (state.config.request, state.config.expert) == (None, ExpertSettings(move_budget=9))


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"null", b"{}", b'{"phase": 3}', b'{"phase": "ready", "ranks": [{"running": "many"}]}']
)
def test_what_is_no_state_of_an_agent_is_refused(text: bytes) -> None:
    for reader in (read_agent_state, read_engine_state):
        with pytest.raises(ValueError, match="State"):
            reader(text)


def test_a_gateway_of_another_version_is_read_and_nonsense_is_refused() -> None:
    document = json.loads(gateway_text(Dispatcher(CONFIG)))
    document["future"] = document["engines"][0]["future"] = 1
    document["config"]["dispatch"]["policy"] = "of the future"
    del document["wait_s"], document["totals"]
    document["ttft_s"] = float("inf")
    state = read_gateway_state(json.dumps(document).encode())
    assert (state.config, state.wait_s, state.ttft_s, state.totals.requests) == (None, None, None, 0)
    assert state.dispatch_policy is None
    with pytest.raises(ValueError, match="GatewayState"):
        read_gateway_state(b'{"held": "many"}')


def test_a_report_keeps_every_field_of_the_signal() -> None:
    report = RankReport.of(1, 0.5, SIGNAL)
    assert (report.rank, report.age_s, report.signal) == (1, 0.5, SIGNAL)
    names = {field.name for field in dataclasses.fields(RankReport)}
    assert names == {field.name for field in dataclasses.fields(EngineSignal)} | {"rank", "age_s", "trouble"}


def test_the_operator_sees_which_settings_a_peer_lacks() -> None:
    from moe_operator.autoscale.signal import States

    states = States(
        engines={"a": read_agent_state(agent_text(SIGNAL))},
        gateways={"b": read_gateway_state(gateway_text(Dispatcher(CONFIG)))},
    )
    agent = Peer(pod="a", url="", component="engine", revision="")
    gateway = Peer(pod="b", url="", component="gateway", revision="")
    wanted = {"request": dataclasses.asdict(RequestSettings(ageing_rate=7.0))}
    assert not differs(wanted, agent, states)
    assert differs({"request": dataclasses.asdict(RequestSettings())}, agent, states)
    assert not differs({"dispatch": dataclasses.asdict(CONFIG.dispatch)}, gateway, states)
    assert differs(wanted, gateway, states)
    assert differs(wanted, dataclasses.replace(agent, pod="silent"), states)
    assert "a" in states
    assert "silent" not in states


def test_reading_a_state_takes_microseconds() -> None:
    """A gateway reads one line for each step of each engine; 200 us is ten times what it takes."""
    text = agent_text(*[SIGNAL] * 4)
    began_s = time.thread_time()
    for _ in range(200):
        read_engine_state(text)
    assert (time.thread_time() - began_s) / 200 < 200e-6
