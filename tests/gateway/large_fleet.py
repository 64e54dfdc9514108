"""A synthetic large fleet: its dispatcher, its newest requests, and the experts of one of its engines."""

import base64
from types import SimpleNamespace
from typing import Any

from moe_contract.documents import parse_model
from moe_contract.gateway_config import GatewayConfig
from moe_contract.live_page import ExpertsSnapshot, LiveSnapshot, TimePoint
from moe_contract.pod_identity import NO_POD
from moe_gateway.engines.dispatcher import Dispatcher
from moe_gateway.live_page.rates import RankRate
from moe_gateway.live_page.snapshot import build_snapshot
from moe_gateway.request.recent_requests import RecentRequests
from moe_gateway.request_stats import RequestStats
from moe_scheduling.engine.choice import Job, Send, SendReason
from moe_scheduling.signals import EngineSignal, StepTime, Target

LAYERS, EXPERTS, RANKS = 58, 256, 64


def remember(dispatcher: Dispatcher, count: int = 40) -> RecentRequests:
    """Newest requests, each with the terms of up to 32 engines."""
    recent = RecentRequests()
    target = next(iter(dispatcher.target_states))
    for number in range(count):
        exchange: Any = SimpleNamespace(
            request=SimpleNamespace(request_id=b"chatcmpl-%032x" % number, arrived_s=float(number)),
            route=SimpleNamespace(label="chat"), continued="", job=Job(100, model="deepseek-v3"), ttft_s=1 / 7,
        )  # fmt: skip
        recent.attempt(exchange, Send(target, 1 / 3, SendReason.LEAST_PREDICTED), dispatcher, now_s=number + 0.01)
        recent.end(exchange, 200, "", now_s=number + 1 / 3)
    return recent


def make_fleet(engines: int, ranks: int = 1) -> Dispatcher:
    """A dispatcher that has seen a signal of each rank."""
    rows = [{"name": f"serving-engine-{i}", "url": f"http://10.0.0.{i}:8000", "ranks": ranks} for i in range(engines)]
    config = parse_model(GatewayConfig, {"listen": {"port": 1}, "admin": {"port": 2}, "engines": rows})
    dispatcher = Dispatcher(config)
    model = StepTime(base_s=0.01, prefill_s=1e-5, decode_s=1e-4)
    for number, target in enumerate(dispatcher.target_states):
        signal = EngineSignal(
            step=10_000 + number, running=48, waiting=number % 9, waiting_prefill_tokens=7 * number, kv_usage=1 / 3,
            computed_tokens=10**9 + number, step_time=model, expert_balance=1.2345678,
        )  # fmt: skip
        dispatcher.set_ready(target.server, True, 1.0)
        dispatcher.set_reachable(target.server, True)
        dispatcher.observe(target, signal, 1.0, 1.0)
    return dispatcher


def snapshot_of(dispatcher: Dispatcher) -> LiveSnapshot:
    """One snapshot of it, with a rate of each rank."""
    rates: dict[Target, Any] = {
        target: RankRate(steps=50, step_s=0.0203125, tokens_per_s=2417.3) for target in dispatcher.target_states
    }
    config = parse_model(GatewayConfig, {"listen": {"port": 1}, "admin": {"port": 2}})
    point, recent = TimePoint(at_s=1.8e9), remember(dispatcher)
    return build_snapshot(
        dispatcher, RequestStats(), recent, limits=config.limits, point=point, rates=rates, draining=False, pod=NO_POD,
        now_s=1.5,
    )  # fmt: skip


def make_experts(turn: int = 0) -> ExpertsSnapshot:
    """The experts of one engine of 64 ranks; another `turn` is another load."""

    def pack(columns: int) -> str:
        rows = bytes((24 + (7 * i + 13 * j + turn) % 19) % 256 for i in range(LAYERS) for j in range(columns))
        return base64.b64encode(rows).decode()

    return ExpertsSnapshot(
        engine="serving-engine-0", mode="active", ranks=RANKS, layers=LAYERS, experts=EXPERTS, version=turn, steps=500,
        heat_unit=1 / 32, by_expert=pack(EXPERTS), by_rank=pack(RANKS), balance=1.2, layer_balance=(1.234,) * LAYERS,
    )  # fmt: skip
