"""States of agents and metrics of servers with any values: no exception, and decisions that can be carried out."""

import json
import math

from hypothesis import given
from hypothesis import strategies as st
from moe_contract.agent_state import read_engine_state
from moe_contract.documents import parse_model
from moe_contract.gateway_config import GatewayConfig, GatewaySettings
from moe_contract.gateway_state import write_gateway_state
from moe_contract.pod_identity import NO_POD
from moe_gateway.engines.dispatcher import Dispatcher
from moe_gateway.engines.load_report import least_wait_s
from moe_gateway.engines.signals import read_metrics, take_state
from moe_gateway.metrics import GatewayCollector, render_metrics
from moe_gateway.request_stats import RequestStats
from moe_gateway.state import build_state
from moe_scheduling.engine.choice import Job, Send
from moe_scheduling.signals import Target

NUMBERS = (
    st.integers(-(10**3), 10**20)
    | st.floats()
    | st.sampled_from([0, -1, 2**53, 10**400, -0.0, 1e308, math.nan, math.inf, -math.inf, "NaN", "7", True, None])
)
STEP_TIMES = st.none() | st.fixed_dictionaries(dict.fromkeys(("base_s", "prefill_s", "decode_s"), NUMBERS))
COUNTS = [
    "age_s",
    "step",
    "running",
    "waiting",
    "waiting_prefill_tokens",
    "running_prefill_tokens",
    "scheduled_prefill_tokens",
    "busy_s",
    "step_tokens",
    "decode_tokens",
    "kv_usage",
    "preemptions",
    "computed_tokens",
    "expert_balance",
    "expert_pressure",
]
RANKS = st.fixed_dictionaries(
    {"rank": st.integers(-2, 3) | NUMBERS},
    optional=dict.fromkeys(COUNTS, NUMBERS) | {"step_time": STEP_TIMES},
)
STATES = st.fixed_dictionaries(
    {"phase": st.sampled_from(["ready", "starting", "", "\ud800", 7]), "accepting": st.booleans() | NUMBERS},
    optional={
        "ranks": st.lists(RANKS, max_size=4),
        "engine": st.fixed_dictionaries(
            {}, optional={"model": st.none() | st.text(max_size=5), "pid": NUMBERS, "url": st.text(max_size=3)}
        ),
    },
)


def make_dispatcher(policy: str) -> Dispatcher:
    engines = [
        {"name": name, "url": f"http://127.0.0.1:{port}", "agent_url": f"http://127.0.0.1:{port + 1}", "ranks": 2}
        for name, port in (("a", 1000), ("b", 2000))
    ]
    ports = {"listen": {"port": 8000}, "admin": {"port": 9000}}
    return Dispatcher(parse_model(GatewayConfig, {**ports, "engines": engines, "dispatch": {"policy": policy}}))


def decide_and_report(dispatcher: Dispatcher, now_s: float) -> None:
    """Everything that reads signals: choices, the periodic check, state, metrics, and the time to come again."""
    dispatcher.tick(now_s)
    for number in range(3):
        decision = dispatcher.choose(Job(100 + number), now_s)
        if isinstance(decision, Send):
            assert decision.target in dispatcher.target_states
            assert math.isfinite(decision.predicted_s)
            request = dispatcher.send(Job(100 + number), (), None, decision, now_s)
            dispatcher.answer(request, now_s + 0.1)
            dispatcher.settle(request, now_s + 0.2)
    wait_s = least_wait_s(dispatcher, now_s)
    assert wait_s is None or 0.0 <= wait_s < math.inf
    assert 1 <= dispatcher.retry_after_s(now_s) <= 60
    stats, settings = RequestStats(), GatewaySettings(dispatch=dispatcher.settings, request=dispatcher.request_settings)
    state = build_state(dispatcher, stats, settings, draining=False, now_s=now_s, pod=NO_POD)
    json.loads(write_gateway_state(state))
    assert render_metrics(GatewayCollector(dispatcher, stats, lambda: now_s))
    assert dispatcher.in_flight == 0


@given(
    st.sampled_from(["predicted", "leastRequests", "roundRobin"]),
    st.lists(st.tuples(st.sampled_from(["a", "b"]), STATES), min_size=1, max_size=6),
)
def test_a_state_with_any_values_is_refused_or_used_without_harm(policy, states):
    dispatcher = make_dispatcher(policy)
    for number, (name, state) in enumerate(states):
        now_s = 1000.0 + number
        try:
            read = read_engine_state(json.dumps(state).encode())
        except ValueError:
            continue
        take_state(dispatcher.engines[name], read, dispatcher, now_s)
        decide_and_report(dispatcher, now_s)


VALUES = st.sampled_from(
    ["0", "-1", "NaN", "+Inf", "-Inf", "1e308", "1e400", "x", "", "0x1", "9" * 400]
) | st.floats().map(str)
LINES = st.builds(
    '{}{{engine="{}",model_name="m"}} {}'.format,
    st.sampled_from(
        [
            "vllm:num_requests_running",
            "vllm:num_requests_waiting",
            "vllm:kv_cache_usage_perc",
            "vllm:num_preemptions_total",
            "vllm:iteration_tokens_total_count",
        ]
    ),
    st.sampled_from(["0", "1", "-1", "x", "", "99999999999999999999", "\u0665"]),
    VALUES,
)


@given(st.lists(LINES | st.text(max_size=20), max_size=12).map("\n".join))
def test_metrics_with_any_values_are_refused_or_used_without_harm(text):
    dispatcher = make_dispatcher("predicted")
    try:
        signals = list(read_metrics(text))
    except ValueError:
        return
    for name in ("a", "b"):
        dispatcher.set_ready(name, True, 1000.0)
        for rank, signal in signals:
            dispatcher.observe(Target(name, rank), signal, 999.9, 1000.0)
    decide_and_report(dispatcher, 1000.0)
