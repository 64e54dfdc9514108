"""Closed loop: tenants on vLLM's real schedulers, through the product's own gateway."""

from dataclasses import replace

import pytest
from moe_scheduling.engine.choice import EngineSettings
from moe_scheduling.request.order import RequestSettings
from moe_tools.simulator.arrivals import Senders
from moe_tools.simulator.costs import LinearCost
from moe_tools.simulator.rank import EngineLimits
from moe_tools.simulator.simulation import Simulation, load_vllm, simulate
from moe_tools.traces import TraceRequest

# 25,000 prompt tokens a second: 1,000 tokens take 46 ms, so that 40 requests a second are nearly twice too many.
LINE = LinearCost(base_s=0.006, prefill_s=0.00004, decode_s=0.0001)
LIMITS = EngineLimits(max_num_seqs=32, max_num_batched_tokens=1024, kv_blocks=4000, max_model_len=8192)
FAIR = RequestSettings(ageing_rate=8000.0, fairness_horizon_s=10.0)
UNFAIR = replace(FAIR, fairness_horizon_s=0.0)
FLOOD = Senders(tenant_weights=(9.0, 1.0))

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def maker():
    return load_vllm()


def run(maker, request, senders, *, rate=40.0, count=400, **changes):
    trace = [TraceRequest(arrival_s=index / rate, prompt_tokens=1000, output_tokens=4) for index in range(count)]
    plan = Simulation(trace=trace, cost=LINE, limits=LIMITS, request=request, senders=senders, seed=1, **changes)
    return simulate(plan, maker)


def ttfts(outcome):
    return {row.tenant: row.ttft_mean for row in outcome.tenants}


def test_a_flooding_tenant_no_longer_holds_up_the_small_one(maker):
    fair, unfair = (ttfts(run(maker, request, FLOOD)) for request in (FAIR, UNFAIR))
    assert unfair[1] > 0.9 * unfair[0]
    assert fair[1] < 0.7 * unfair[1]
    # What the small one wins the flood pays, and no more.
    assert fair[0] < 1.15 * unfair[0]


def test_nor_where_the_gateway_holds_what_engines_have_no_room_for(maker):
    dispatch = EngineSettings(saturation_s=0.2)
    fair, unfair = (ttfts(run(maker, request, FLOOD, dispatch=dispatch)) for request in (FAIR, UNFAIR))
    assert fair[1] < 0.7 * unfair[1]


def test_equal_tenants_below_saturation_are_served_as_if_there_were_one(maker):
    equal = Senders(tenant_weights=(1.0,) * 4)
    fair, unfair = (run(maker, request, equal, rate=18.0) for request in (FAIR, UNFAIR))
    assert fair.figures.ttft_mean < 1.05 * unfair.figures.ttft_mean


def test_one_tenant_is_served_as_without_tenants(maker):
    fair, unfair = (run(maker, request, Senders(), count=150) for request in (FAIR, UNFAIR))
    assert fair.figures.ttft_mean == unfair.figures.ttft_mean
    assert [row.first_token_s for row in fair.requests] == [row.first_token_s for row in unfair.requests]
