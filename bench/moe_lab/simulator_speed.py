"""What the simulator costs: 1,000 requests on four engines, in seconds of one core; the goal is less than ten.

Run by `python -m moe_lab`. Loading vLLM is not in it.
"""

import time
from collections.abc import Iterator
from dataclasses import replace

from moe_tools.shapes import Shape, ShapeSettings, build_shape
from moe_tools.simulator.costs import LinearCost
from moe_tools.simulator.rank import STOCK, EngineLimits
from moe_tools.simulator.simulation import Simulation, load_vllm, simulate

from moe_lab.rows import BenchmarkRow

REPETITIONS = 3
REQUESTS = 1000
RATE = 40.0


def run() -> Iterator[BenchmarkRow]:
    """Ours, and stock vLLM with its own balancer."""
    maker = load_vllm()
    base = Simulation(
        trace=build_shape(Shape.RANDOM, ShapeSettings(rate=RATE, count=REQUESTS)),
        cost=LinearCost(base_s=0.006, prefill_s=0.00004, decode_s=0.0001),
        servers=4,
        limits=EngineLimits(max_num_seqs=128, max_model_len=8192),
    )
    stock = replace(base, scheduler=STOCK, dispatch="vllmInternal")
    for case, simulation in (("ours", base), ("stock", stock)):
        values = []
        for _ in range(REPETITIONS):
            begun_s = time.process_time()
            simulate(simulation, maker)
            values.append(time.process_time() - begun_s)
        yield BenchmarkRow(
            benchmark="simulator", case=f"{REQUESTS} requests, 4 engines, {case}", unit="s", values=values, goal="< 10"
        )
