"""A number for each fixed role: fields, the signal of a role, decisions, limits, plan and status."""

import subprocess
from dataclasses import replace
from functools import partial
from typing import Any

import aiohttp
import pytest
import yaml
from cluster_debian import require
from moe_agent.api.metrics import AgentCollector
from moe_contract.agent_state import AgentState
from moe_contract.input_errors import InvalidInput
from moe_operator.api import MoEServing, parse_resource
from moe_operator.autoscale.autoscaler import Outcome
from moe_operator.autoscale.prometheus import build_role_queries
from moe_operator.autoscale.roles import RoleAutoscalers, RoleEngines
from moe_operator.autoscale.settings import role_settings
from moe_operator.autoscale.signal import Fleet, build_role_signal
from moe_operator.autoscale.source import Sources, with_outcome
from moe_operator.autoscale.token_rate import TokenCount, TokenRate
from moe_operator.kubernetes.report import build_roles
from moe_operator.plan import Defaults, Observed, plan_cluster
from moe_operator.plan.names import ROLE, Names
from moe_operator.plan.roles import role_numbers
from moe_scheduling.engine.disaggregation import EngineRole
from moe_scheduling.fleet.settings import FleetTargets
from moe_scheduling.signals import StepTime
from pods import agent, gateway, pod, states
from prometheus_client import CollectorRegistry, generate_latest

PREFILL, DECODE = EngineRole.PREFILL, EngineRole.DECODE
STEP = StepTime(base_s=0.010, prefill_s=0.001, decode_s=0.0005)
Document = dict[str, Any]
SCALED: Document = {
    "roles": {
        "prefill": {"minReplicas": 1, "maxReplicas": 6, "targets": {"queueWait": "1s"}},
        "decode": {"minReplicas": 2, "maxReplicas": 8, "targets": {"kvUsage": 0.5, "interToken": "30ms"}},
    },
    "scaleDown": {"stabilizationWindow": "0s"},
}


def resource(autoscaling: Document | None = SCALED, mode: str = "fixed", **spec: Any) -> MoEServing:
    roles = {"mode": mode} | ({"prefill": 1, "decode": 2} if mode == "fixed" else {})
    return parse_resource(
        {
            "apiVersion": "moeserving.dev/v1alpha1",
            "kind": "MoEServing",
            "metadata": {"name": "tiny"},
            "spec": {
                "model": {"uri": "hf://org/a"},
                "engine": {"roles": roles},
                "autoscaling": autoscaling,
                **spec,
            },
        }
    )


def engine(waiting: int = 0, decoding: int = 0, kv_usage: float = 0.1, step: Any = STEP) -> AgentState:
    state = agent(accepting=True, config={"version": 1, "request": {"policy": "sjf"}})
    rank = replace(
        state.ranks[0],
        waiting_prefill_tokens=waiting,
        running_prefill_tokens=0,
        decode_tokens=decoding,
        kv_usage=kv_usage,
        step_time=step,
    )
    return replace(state, ranks=(rank,))


def with_ranks(*engines: AgentState) -> AgentState:
    """One engine with the ranks of all."""
    ranks = tuple(replace(state.ranks[0], rank=number) for number, state in enumerate(engines))
    return replace(engines[0], ranks=ranks)


def role_pods(prefill: int = 1, decode: int = 2, **changes: Any) -> list[Document]:
    return [
        *(pod(f"p{number}", **{ROLE: "prefill"}, **changes) for number in range(prefill)),
        *(pod(f"d{number}", **{ROLE: "decode"}, **changes) for number in range(decode)),
        pod("g", "gateway"),
    ]


# 1. Fields.


@pytest.mark.parametrize(
    ("autoscaling", "mode", "path", "words"),
    [
        ({}, "fixed", "spec.autoscaling", "autoscaling.roles"),
        (SCALED, "auto", "spec.autoscaling", "no other engines"),
        ({"mode": "external", "roles": {}}, "fixed", "spec.autoscaling.roles", "NAME-engine-prefill"),
        ({"roles": {"prefill": {"minReplicas": 0}}}, "fixed", "spec.autoscaling.roles.prefill.minReplicas", "1"),
        (
            {"roles": {"decode": {"minReplicas": 5, "maxReplicas": 4}}},
            "fixed",
            "spec.autoscaling.roles.decode.maxReplicas",
            "at least minReplicas",
        ),
        (
            {"roles": {"prefill": {"targets": {"kvUsage": 0.5}}}},
            "fixed",
            "spec.autoscaling.roles.prefill.targets.kvUsage",
            "queueWait",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_its_path(autoscaling, mode, path, words):
    with pytest.raises(InvalidInput) as caught:
        resource(autoscaling, mode)
    found = [(row.path, words in row.message) for row in caught.value.errors]
    assert found == [(path, True)]


def test_a_range_that_means_nothing_beside_roles_is_not_refused():
    with pytest.raises(InvalidInput):
        resource({"minReplicas": 6}, "unified")
    section = resource(SCALED | {"minReplicas": 6}).spec.autoscaling
    assert role_settings(section, DECODE) == role_settings(resource().spec.autoscaling, DECODE)


def test_each_role_has_its_own_range_and_targets():
    section = resource().spec.autoscaling
    prefill, decode = role_settings(section, PREFILL), role_settings(section, DECODE)
    assert (prefill.min_replicas, prefill.max_replicas, prefill.targets) == (1, 6, FleetTargets(wait_s=1.0))
    assert (decode.min_replicas, decode.max_replicas) == (2, 8)
    assert decode.targets == FleetTargets(kv_usage=0.5, inter_token_s=0.03)
    assert decode.scale_down.stabilization_window_s == 0.0
    with pytest.raises(ValueError, match="fixed roles"):
        role_settings(section, EngineRole.UNIFIED)


# 2. The signal of a role.


def fleet(**engines: AgentState) -> Fleet:
    gateways = (gateway(held=3, wait_s=9.0),)
    return Fleet(gateways=gateways, engines=engines, silent=0, ready=1, observed_s=5.0)


def test_prefill_engines_wait_for_the_prompts_at_the_least_busy_of_them():
    now = fleet(p0=engine(4000), p1=engine(1500), d0=engine(0))
    found = build_role_signal(now, PREFILL, {"p0", "p1"}, None, 7.0)
    assert (found.wait_s, found.kv_usage, found.ttft_s, found.tokens_per_s) == (1.5, None, 0.5, 7.0)
    assert (found.held, found.decode_load) == (3, None)


def test_decode_engines_are_full_by_their_caches_and_by_the_time_of_a_step():
    now = fleet(
        p0=engine(4000, kv_usage=0.9), d0=engine(decoding=20, kv_usage=0.2), d1=engine(decoding=60, kv_usage=0.4)
    )
    found = build_role_signal(now, DECODE, {"d0", "d1"}, 0.03, None)
    assert (found.wait_s, found.ttft_s, found.kv_usage) == (None, None, pytest.approx(0.3))
    assert found.decode_load == pytest.approx(1.0)
    assert build_role_signal(now, DECODE, {"d0", "d1"}, None, None).decode_load is None


@pytest.mark.parametrize("engines", [{}, {"d0": engine(decoding=5), "d1": engine(decoding=5, step=None)}])
def test_a_load_of_which_a_part_is_not_known_is_not_known(engines):
    found = build_role_signal(fleet(**engines), DECODE, {"d0", "d1"}, 0.03, None)
    assert found.decode_load is None


def test_a_silent_gateway_is_no_signal_of_any_role():
    now = replace(fleet(), silent=1)
    assert build_role_signal(now, PREFILL, set(), None, None) is None


# 3. The decision.


async def decide(
    prefill: int, decode: int, pods: list[Document], by_pod: Document, wanted: MoEServing | None = None
) -> Outcome:
    observed = Observed(tokens=("t",), replicas=prefill + decode, role_replicas={PREFILL: prefill, DECODE: decode})
    async with aiohttp.ClientSession() as session:
        return await Sources(session).decide(("ns", "tiny"), wanted or resource(), observed, pods, states(by_pod))


async def test_each_role_follows_its_own_load():
    by_pod = {"p0": engine(0), "d0": engine(decoding=80), "d1": engine(decoding=80), "g": gateway()}
    outcome = await decide(1, 2, role_pods(), by_pod)
    assert outcome.roles == {PREFILL: 1, DECODE: 4}
    assert (outcome.replicas, outcome.limited) == (5, None)
    assert with_outcome(Observed(tokens=("t",)), outcome).role_replicas == {PREFILL: 1, DECODE: 4}


async def test_a_backlog_of_prompts_asks_for_prefill_engines_alone():
    now, decoding = [0.0], frozenset({"d0", "d1"})
    engines = {PREFILL: RoleEngines(ready=frozenset({"p0"})), DECODE: RoleEngines(ready=decoding)}
    busy = {"p0": engine(9000), "d0": engine(decoding=20), "d1": engine(decoding=20)}
    autoscalers = RoleAutoscalers(lambda: now[0])
    observed = Observed(tokens=("t",), role_replicas={PREFILL: 1, DECODE: 2})
    for now[0] in (0.0, 60.0, 120.0):
        seen = replace(fleet(**busy), observed_s=now[0])
        outcome = await autoscalers.decide(("ns", "tiny"), resource(), observed, seen, engines, {})
    assert outcome.roles == {PREFILL: 2, DECODE: 2}


async def test_decode_engines_go_when_their_load_falls_and_prefill_engines_stay():
    by_pod = {f"d{number}": engine(decoding=1, kv_usage=0.01) for number in range(6)}
    by_pod |= {"p0": engine(900), "g": gateway()}
    outcome = await decide(1, 6, role_pods(1, 6), by_pod)
    assert outcome.roles[PREFILL] == 1
    assert 2 <= outcome.roles[DECODE] < 6


@pytest.mark.parametrize(
    "other",
    [engine(decoding=0, step=None), engine(decoding=9, step=StepTime(base_s=0.05, prefill_s=0.0, decode_s=0.0))],
)
async def test_decode_engines_go_beside_one_that_has_no_load_by_the_time_of_a_step(other):
    by_pod = {f"d{number}": engine(decoding=1, kv_usage=0.01) for number in range(5)}
    by_pod |= {"d5": other, "p0": engine(0), "g": gateway()}
    outcome = await decide(1, 6, role_pods(1, 6), by_pod)
    assert 2 <= outcome.roles[DECODE] < 6


async def test_a_limit_names_its_role():
    by_pod = {"p0": engine(0), "g": gateway()} | {f"d{number}": engine(kv_usage=1.0) for number in range(8)}
    outcome = await decide(1, 8, role_pods(1, 8), by_pod)
    assert outcome.roles[DECODE] == 8
    expected = "the load asks for more decode engines than autoscaling.roles.decode.maxReplicas"
    assert outcome.limited == ("TooFewReplicas", expected)


async def test_of_two_limits_the_gravest_gives_the_reason():
    now, busy = [0.0], {"p0": engine(1), "p1": engine(1)} | {f"d{n}": engine(kv_usage=1.0) for n in range(4)}
    prefill = frozenset({"p0", "p1"})
    engines = {PREFILL: RoleEngines(ready=prefill), DECODE: RoleEngines(ready=frozenset(busy) - prefill)}
    rates = dict.fromkeys(busy, TokenRate(since=TokenCount(tokens=0, as_of_s=0.0), tokens_per_s=50.0))
    wanted = resource({"roles": {"prefill": {"minReplicas": 2}}, "scaleDown": {"stabilizationWindow": "0s"}})
    autoscalers = RoleAutoscalers(lambda: now[0])
    observed = Observed(tokens=("t",), role_replicas={PREFILL: 2, DECODE: 4})
    for now[0] in map(float, range(0, 600, 10)):
        seen = replace(fleet(**busy), observed_s=now[0], gateways=(gateway(in_flight=9, ttft_s=0.1),))
        outcome = await autoscalers.decide(("ns", "tiny"), wanted, observed, seen, engines, rates)
    assert outcome.limited == (
        "TooFewReplicas",
        "the load asks for more decode engines than autoscaling.roles.decode.maxReplicas; "
        "the load asks for fewer prefill engines than autoscaling.roles.prefill.minReplicas",
    )


async def test_without_a_signal_each_role_stays_and_both_are_named():
    outcome = await decide(2, 3, role_pods(2, 3), {})
    assert outcome.roles == {PREFILL: 2, DECODE: 3}
    assert outcome.limited[0] == "NoSignal"
    assert "prefill engines" in outcome.limited[1]
    assert "decode engines" in outcome.limited[1]


async def test_while_other_engines_still_serve_it_begins_with_the_resources_numbers():
    observed = Observed(tokens=("t",), replicas=3)
    async with aiohttp.ClientSession() as session:
        outcome = await Sources(session).decide(("ns", "tiny"), resource(), observed, role_pods(), states({}))
    assert (outcome.replicas, outcome.roles, outcome.limited) == (3, {}, None)


# 4. Plan and status.


@pytest.mark.parametrize(
    ("current", "expected"),
    [({}, (1, 2)), ({PREFILL: 4, DECODE: 3}, (4, 3)), ({PREFILL: 9, DECODE: 1}, (6, 2)), ({DECODE: 5}, (1, 5))],
)
def test_numbers_stay_within_the_range_of_their_role(current, expected):
    assert tuple(role_numbers(resource(), current).values()) == expected
    observed = Observed(uid="u", tokens=("t",), role_replicas=current)
    planned = plan_cluster(resource(), "ns", observed, Defaults())
    counts = {row.role: row.count.spec for row in planned.roles}
    assert counts == {PREFILL: {"replicas": expected[0]}, DECODE: {"replicas": expected[1]}}
    assert planned.replicas == sum(expected)


def test_without_autoscaling_the_numbers_are_the_resources():
    assert role_numbers(resource(None), {PREFILL: 4, DECODE: 4}) == {PREFILL: 1, DECODE: 2}
    assert role_numbers(resource(None, "auto"), {}) == {}


def test_the_status_has_the_numbers_of_each_role():
    pods = [row for row in role_pods(1, 2) if row["metadata"]["name"] != "g"]
    rows = build_roles(pods, {"p0", "d1"}, {PREFILL: 1, DECODE: 4}, {})
    found = [(str(row.role), row.replicas, row.ready_replicas, row.desired_replicas) for row in rows]
    assert found == [("prefill", 1, 1, 1), ("decode", 2, 1, 4)]


def test_a_pass_without_a_plan_leaves_the_numbers_that_should_be():
    before = {"roles": [{"role": "decode", "desiredReplicas": 4}]}
    (row,) = build_roles([], set(), {}, before)
    assert (row.role, row.desired_replicas) == (DECODE, 4)
    assert build_roles([], set(), {}, {}) == ()


# 5. Prometheus.


def test_queries_look_at_the_engines_of_the_role_alone():
    prefill = build_role_queries("ns", Names("tiny"), PREFILL, None)
    decode = build_role_queries("ns", Names("tiny"), DECODE, 0.03)
    assert "tiny-engine-prefill(" in prefill["wait_s"]
    assert "kv_usage" not in prefill
    assert {"wait_s", "ttft_s"}.isdisjoint(decode)
    assert "tiny-engine-decode(" in decode["kv_usage"]
    assert "(0.03 - moeserving_engine_step_base_seconds" in decode["decode_load"]
    assert "decode_load" not in build_role_queries("ns", Names("tiny"), DECODE, None)


SLOW = replace(STEP, base_s=0.05)
ROOTED = replace(STEP, decode_root_s=0.002)
LOADS: list[tuple[str, list[AgentState]]] = [
    ("busy", [engine(4000, 20, 0.2), engine(1500, 60, 0.4)]),
    ("a new idle engine has no model", [engine(4000, 20, 0.2), engine(0, 0, 0.0, None)]),
    ("a busy engine has no model", [engine(4000, 20, 0.2), engine(90, 9, 0.1, None)]),
    ("answers share experts", [engine(4000, 20, 0.2, ROOTED), engine(4000, 30, 0.2)]),
    ("no model at all", [engine(90, 9, 0.1, None)]),
    ("nothing to do", [engine(), engine(step=None)]),
    ("no request is short enough", [engine(4000, 20, 0.2), engine(4000, 20, 0.2, SLOW)]),
    ("one drains", [engine(4000, 20, 0.2), replace(engine(0, 0, 0.9), phase="draining", accepting=False)]),
    ("one starts", [engine(4000, 20, 0.2), replace(engine(0, 0, 0.0, None), phase="starting", accepting=False)]),
    ("one of two ranks has no model", [with_ranks(engine(4000, 20, 0.2), engine(90, 9, 0.1, None))]),
    (
        "one of two ranks has nothing",
        [with_ranks(engine(4000, 20, 0.2), engine(0, 0, 0.1, None)), engine(9000, 1, 0.1)],
    ),
    ("nobody", []),
]


def as_series(pods: dict[str, AgentState], *, older: bool) -> list[dict[str, str]]:
    """The metrics of agents as the series of a test of promtool; `older`: without a term that is 0 there."""
    rows = []
    for name, state in pods.items():
        registry = CollectorRegistry()
        registry.register(AgentCollector(partial(replace, state, name=name), lambda: None))
        for line in generate_latest(registry).decode().splitlines():
            if line.startswith("moeserving_engine_") and "_info{" not in line:
                series, value = line.rsplit(" ", 1)
                if older and "_step_decode_root_" in series and not float(value):
                    continue
                own = f'{{namespace="ns",pod="{name}",'
                rows.append({"series": series.replace("{", own), "values": f"{float(value):g}x40"})
    return rows


@pytest.mark.parametrize(("role", "older"), [(PREFILL, False), (DECODE, False), (DECODE, True)])
def test_prometheus_and_states_are_one_signal(tmp_path, role, older):
    """Each load as `build_role_signal` and as the queries have it; what is infinite is not known."""
    require({"prometheus": "promtool"})
    queries, tests = build_role_queries("ns", Names("tiny"), role, 0.03), []
    for name, rows in LOADS:
        pods = {f"tiny-engine-{role}-5d9c-x{number}": state for number, state in enumerate(rows)}
        found = build_role_signal(replace(fleet(), engines=pods), role, pods, 0.03, None)
        checks = []
        for field in {PREFILL: ["wait_s"], DECODE: ["decode_load", "kv_usage"]}[role]:
            value = getattr(found, field)
            samples = [] if value is None else [{"labels": "{}", "value": round(value, 6)}]
            # Without a sample, or infinite: not known.
            expr = f"round({queries[field]} < Inf, 1e-6)"
            checks.append({"expr": expr, "eval_time": "5m", "exp_samples": samples})
        series = as_series(pods, older=older)
        tests.append({"name": name, "interval": "15s", "input_series": series, "promql_expr_test": checks})
    path = tmp_path / "loads.yaml"
    path.write_text(yaml.safe_dump({"rule_files": [], "evaluation_interval": "15s", "tests": tests}), encoding="utf-8")
    run = subprocess.run(["promtool", "test", "rules", path], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
