"""Closed loop: how long prompts of different lengths wait, on vLLM's real schedulers of engines of different speed."""

from dataclasses import replace

import pytest
from moe_scheduling.engine.choice import EngineSettings
from moe_scheduling.request.order import RequestPolicy, RequestSettings
from moe_tools.shapes import Shape, ShapeSettings, build_shape
from moe_tools.simulator.arrivals import ArrivalShape, arrange
from moe_tools.simulator.costs import LinearCost
from moe_tools.simulator.rank import EngineLimits
from moe_tools.simulator.simulation import Simulation, load_vllm, simulate

MEASURED = RequestSettings()
BY_ARRIVAL = RequestSettings(ageing_horizon_s=0.0)
FIXED = RequestSettings(ageing_rate=8000.0)
LIMITS = EngineLimits(max_num_seqs=64, max_num_batched_tokens=2048, kv_blocks=8000, max_model_len=8192)

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def maker():
    return load_vllm()


def run(maker, request, *, step_factor, count=300, seed=1):
    """A load near saturation; steps take `step_factor` times as long, and that many fewer requests come."""
    shape = ShapeSettings(count=count, seed=seed, longest_tokens=6000, median_output_tokens=4, longest_output_tokens=8)
    trace = arrange(build_shape(Shape.RANDOM, shape), ArrivalShape.POISSON, 17.0 / step_factor, seed)
    cost = LinearCost(base_s=0.006 * step_factor, prefill_s=0.00004 * step_factor, decode_s=0.0001 * step_factor)
    plan = Simulation(
        trace=trace, cost=cost, limits=LIMITS, request=request, dispatch=EngineSettings(), seed=seed, exposed_s=0.0
    )
    return simulate(plan, maker).figures


def ratios(maker, request, step_factor):
    ours, arrival = (run(maker, each, step_factor=step_factor) for each in (request, BY_ARRIVAL))
    return ours.ttft_mean / arrival.ttft_mean, ours.ttft_p99_longest / arrival.ttft_p99_longest


@pytest.mark.parametrize("step_factor", [0.2, 1.0, 40.0])
def test_the_mean_wait_falls_and_long_prompts_pay_little_whatever_the_speed(maker, step_factor):
    mean, longest = ratios(maker, MEASURED, step_factor)
    assert mean < 0.97
    assert longest < 1.45


def test_a_fixed_rate_costs_long_prompts_of_a_fast_engine_more_than_the_measured_speed(maker):
    (_, longest), (_, longest_fixed) = (ratios(maker, request, 0.2) for request in (MEASURED, FIXED))
    assert longest < longest_fixed


def test_the_order_of_vllm_takes_no_notice_of_speeds(maker):
    fcfs = RequestSettings(policy=RequestPolicy.FCFS)
    measured, fixed = (
        run(maker, each, step_factor=1.0, count=80) for each in (fcfs, replace(fcfs, ageing_rate=8000.0))
    )
    assert measured == fixed
