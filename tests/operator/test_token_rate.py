"""Tokens per second of engines whose states come at intervals while passes come at any time."""

import time
from dataclasses import replace
from itertools import accumulate

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_contract.agent_state import AgentState
from moe_operator.api import parse_resource
from moe_operator.autoscale.autoscaler import Outcome
from moe_operator.autoscale.signal import Freshness, States
from moe_operator.autoscale.source import Sources
from moe_operator.autoscale.token_rate import LEAST_SPAN_S, TokenCount, TokenRate, measure_rates, sum_rates
from moe_operator.plan import Observed
from pods import agent, gateway, pod

Sample = tuple[float, int]
SPAN_S = LEAST_SPAN_S


def rates_of(*looks: dict[str, Sample]) -> list[float | None]:
    """The rate of the fleet at each pass, from the newest sample of each engine at that pass."""
    rates, found = dict[str, TokenRate](), list[float | None]()
    for look in looks:
        counts = {pod: TokenCount(as_of_s=at_s, tokens=tokens) for pod, (at_s, tokens) in look.items()}
        rates = measure_rates(rates, counts)
        found.append(sum_rates(rates.values()))
    return found


@pytest.mark.parametrize(
    ("looks", "rates"),
    [
        pytest.param([{}], [None], id="no engine"),
        pytest.param([{"a": (0.0, 50)}], [None], id="one state gives no rate"),
        pytest.param([{"a": (0.0, 50)}, {"a": (0.0, 50)}], [None, None], id="nor do two passes on it"),
        pytest.param([{"a": (0.0, 50)}, {"a": (3.0, 3050)}], [None, 1000.0], id="two states do"),
        pytest.param(
            [{"a": (0.0, 0)}, {"a": (3.0, 3000)}, {"a": (3.0, 3000)}], [None, 1000.0, 1000.0], id="the rate stays"
        ),
        pytest.param(
            [{"a": (0.0, 0)}, {"a": (3.0, 3000)}, {"a": (3.1, 3900)}, {"a": (6.0, 6000)}],
            [None, 1000.0, 1000.0, 1000.0],
            id="states close together are not compared",
        ),
        pytest.param([{"a": (0.0, 0)}, {"a": (3.0, 3000)}, {"a": (13.0, 3000)}], [None, 1000.0, 0.0], id="it idles"),
        pytest.param([{"a": (0.0, 1000)}, {"a": (10.0, 50)}], [None, 5.0], id="it began anew"),
        pytest.param(
            [{"a": (0.0, 0)}, {"a": (3.0, 3000), "b": (3.0, 9000)}, {"a": (3.0, 3000), "b": (7.0, 17000)}],
            [None, 1000.0, 3000.0],
            id="each engine by its own states",
        ),
        pytest.param(
            [{"a": (0.0, 0), "b": (0.0, 0)}, {"a": (3.0, 3000), "b": (3.0, 300)}, {"b": (3.0, 300)}],
            [None, 1100.0, 100.0],
            id="an engine that is gone has no rate",
        ),
        pytest.param([{"a": (9.0, 10)}, {"a": (3.0, 5)}], [None, None], id="an older state changes nothing"),
    ],
)
def test_a_rate_is_over_the_time_between_states(looks: list[dict[str, Sample]], rates: list[float | None]) -> None:
    assert rates_of(*looks) == rates


STEPS = st.lists(st.tuples(st.floats(0.01, 20.0), st.integers(0, 1000), st.booleans()), min_size=1, max_size=40)


@given(st.dictionaries(st.sampled_from("abc"), STEPS, min_size=1), st.lists(st.floats(0.0, 400.0), max_size=80))
def test_no_passes_and_states_give_a_rate_beyond_the_greatest_true_one(
    engines: dict[str, list[tuple[float, int, bool]]], passes: list[float]
) -> None:
    samples = {pod: _samples(steps) for pod, steps in engines.items()}
    greatest = sum(max(rate for _, rate, _ in steps) for steps in engines.values())
    least = sum(min(0 if restarts else rate for _, rate, restarts in steps) for steps in engines.values())
    looks = [
        {pod: seen[-1] for pod, rows in samples.items() if (seen := [row for row in rows if row[0] <= at_s])}
        for at_s in sorted(passes)
    ]
    for rate, look in zip(rates_of(*looks), looks, strict=True):
        assert rate is None or rate <= greatest * 1.0001 + len(engines) / SPAN_S
        if rate is not None and len(look) == len(engines) == 1:
            assert rate >= least * 0.9999 - 1.0 / SPAN_S


def _samples(steps: list[tuple[float, int, bool]]) -> list[Sample]:
    """States of an engine that computes at a rate between two of them, and now and then begins anew."""
    times = accumulate(seconds for seconds, _, _ in steps)
    tokens, rows = 0.0, [(0.0, 0)]
    for at_s, (seconds, rate, restarts) in zip(times, steps, strict=True):
        tokens = rate * seconds if restarts else tokens + rate * seconds
        rows.append((at_s, int(tokens)))
    return rows


RESOURCE = parse_resource(
    {
        "apiVersion": "moeserving.dev/v1alpha1",
        "kind": "MoEServing",
        "metadata": {"name": "tiny"},
        "spec": {
            "model": {"uri": "hf://org/a"},
            "autoscaling": {"mode": "internal", "maxReplicas": 8, "targets": {"tokensPerSecond": 1000}},
        },
    }
)
PODS = [pod(), pod("tiny-gateway-a", "gateway")]


def computed(tokens: int) -> AgentState:
    state = agent()
    return replace(state, ranks=tuple(replace(rank, computed_tokens=tokens) for rank in state.ranks))


async def decide(*states: States) -> list[Outcome]:
    async with aiohttp.ClientSession() as session:
        sources, observed = Sources(session), Observed(tokens=("t",), replicas=1)
        return [await sources.decide(("ns", "tiny"), RESOURCE, observed, PODS, newest) for newest in states]


def states_at(taken_s: float, tokens: int, gateway_alive_s: float) -> States:
    return States(
        engines={"tiny-engine-a": computed(tokens)},
        gateways={"tiny-gateway-a": gateway()},
        freshness={
            "tiny-engine-a": Freshness(as_of_s=taken_s, alive_s=taken_s),
            "tiny-gateway-a": Freshness(as_of_s=gateway_alive_s, alive_s=gateway_alive_s),
        },
    )


async def test_an_engine_that_never_answered_makes_no_signal_stale() -> None:
    now_s = time.monotonic()
    silent = states_at(now_s - 3600.0, 0, now_s)
    (outcome,) = await decide(replace(silent, engines={}))
    assert outcome.reason != "stale"


async def test_passes_close_together_ask_for_no_more_engines_than_the_load_needs() -> None:
    """Each pass is made within milliseconds of the last one, over states 3 s apart at 1000 tokens a second."""
    start_s = time.monotonic() - 12.0
    newest = [states_at(start_s + at_s, 1000 * at_s, time.monotonic()) for at_s in (0, 0, 3, 3, 6, 6, 6, 9)]
    outcomes = await decide(*newest)
    assert [outcome.replicas for outcome in outcomes] == [1] * len(newest)
    assert outcomes[-1].reason == "on_target"


@pytest.mark.parametrize(("engine_age_s", "gateway_age_s"), [(3600.0, 0.0), (0.0, 3600.0)])
async def test_a_peer_that_gave_no_sign_of_life_for_long_makes_the_signal_stale(
    engine_age_s: float, gateway_age_s: float
) -> None:
    now_s = time.monotonic()
    (outcome,) = await decide(states_at(now_s - engine_age_s, 0, now_s - gateway_age_s))
    assert outcome.reason == "stale"
