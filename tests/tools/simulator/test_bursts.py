"""Bursts of requests, in the simulator: size orders them, and the longest prompts are still bounded."""

import pytest
from moe_lab.experiments.variants import PRODUCT, REFERENCE, VARIANTS
from moe_tools.shapes import Shape, ShapeSettings, build_shape
from moe_tools.simulator.arrivals import ArrivalShape, arrange
from moe_tools.simulator.costs import LinearCost
from moe_tools.simulator.rank import EngineLimits
from moe_tools.simulator.simulation import Simulation, load_vllm, simulate

LINE = LinearCost(base_s=0.006, prefill_s=0.00004, decode_s=0.0001)

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def maker():
    return load_vllm()


def serve(maker, variant, seed):
    """On/off arrivals of prompts up to 7,400 tokens with short answers, near the saturation of one engine."""
    settings = ShapeSettings(
        count=240, seed=seed, longest_tokens=7400, median_output_tokens=12, longest_output_tokens=64
    )
    trace = arrange(build_shape(Shape.DESCENDING, settings), ArrivalShape.ON_OFF, 5.5, seed)
    limits = EngineLimits(kv_blocks=20_000, max_model_len=8192)
    base = Simulation(trace=trace, cost=LINE, limits=limits, exposed_s=0.002, seed=seed)
    return simulate(VARIANTS[variant].apply(base), maker).figures


@pytest.mark.parametrize("seed", [11, 12])
def test_in_bursts_short_prompts_go_first_and_the_longest_wait_less_than_by_length_alone(maker, seed):
    ours, by_length, stock = (serve(maker, name, seed) for name in (PRODUCT, "vllmPriority", REFERENCE))
    # A shift that knows no crowd gives 0.9 and 0.8 of vLLM's mean: waits of seconds are far longer than it.
    assert ours.ttft_mean < 0.78 * stock.ttft_mean
    assert ours.ttft_p99_longest < 0.8 * by_length.ttft_p99_longest
