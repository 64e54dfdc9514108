"""The fluid model behind the floor of the mean TTFT, and what it is compared with."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_lab.experiments.floor import Floor, flow_s, read_floors, render_floors, select_records, speeds_of
from moe_lab.experiments.plan import PAIR
from moe_lab.experiments.runner import digest_of, source_digests
from moe_lab.experiments.variants import PRODUCT, REFERENCE
from moe_lab.experiments.workloads import KEPT_APART
from moe_tools.simulator.hardware import PRESETS
from moe_tools.simulator.rank import EngineLimits
from moe_tools.simulator.simulation import Simulation
from moe_tools.traces import TraceRequest
from rich.console import Console

ALONE, BOTH = 100.0, 60.0


@pytest.mark.parametrize(
    ("jobs", "expected"),
    [
        ([(1.0, 200.0)], [2.0]),
        # Each on a rank of its own, both slower; the longer one is alone at the end.
        ([(0.0, 60.0), (0.0, 160.0)], [1.0, 2.0]),
        # A prompt that comes as another ends does not meet it.
        ([(0.0, 100.0), (1.0, 100.0)], [1.0, 1.0]),
    ],
)
def test_prompts_share_the_ranks(jobs, expected):
    assert flow_s(jobs, [ALONE, BOTH]) == pytest.approx(expected)


def test_a_short_prompt_overtakes_a_long_one_that_has_begun():
    overtaken, other, short = flow_s([(0.0, 600.0), (0.0, 600.0), (1.0, 60.0)], [ALONE, BOTH])
    assert short == pytest.approx(1.0)
    assert other == pytest.approx(10.0)
    # What it lost to the short one it computes alone.
    assert overtaken == pytest.approx(10.0 + 60.0 / ALONE)


JOBS = st.lists(st.tuples(st.floats(0.0, 10.0), st.floats(1.0, 1000.0)), min_size=1, max_size=30).map(sorted)


@given(JOBS)
def test_none_is_faster_than_alone_and_a_rank_more_does_not_slow_the_shortest(jobs):
    one, two = flow_s(jobs, [ALONE]), flow_s(jobs, [ALONE, ALONE])
    for took in (one, two):
        assert all(seconds >= tokens / ALONE - 1e-6 for seconds, (_, tokens) in zip(took, jobs, strict=True))
    # On one machine the shortest first has the least mean; two as fast have no greater one.
    assert sum(two) <= sum(one) + 1e-6


def test_ranks_that_prefill_together_are_slower_each_and_faster_together():
    trace = [TraceRequest(arrival_s=0.0, prompt_tokens=2000, output_tokens=10)]
    cost, limits = PRESETS["a100-qwen3-30b-a3b"].cost(2), EngineLimits(max_num_batched_tokens=2048)
    simulation = Simulation(trace=trace, cost=cost, ranks=2, limits=limits)
    alone, both = speeds_of(simulation, 20.0)
    assert both < alone < 2 * both
    # Weights that are read once for more tokens.
    longer = EngineLimits(max_num_batched_tokens=8192)
    assert speeds_of(replace(simulation, limits=longer), 20.0)[0] > alone


def record(variant, ttft_s, workload="random", rate=4.0):
    figures = {"ttft_mean": ttft_s, "ttft_floor": 0.05, "tpot_mean": 0.03, "cached_share": 0.0}
    return {
        "variant": variant, "workload": workload, "load": 0.85, "seed": 1, "count": 40, "rate": rate,
        "fleet": asdict(PAIR), "figures": figures,
    }  # fmt: skip


def test_the_floor_is_below_what_is_measured_and_adversarial_loads_are_left_out():
    records = [record(REFERENCE, 0.3), record("dynamo", 0.2), record(PRODUCT, 0.15), record(PRODUCT, 1.0, "allLong")]
    (floor,) = read_floors(records, None, PAIR)
    # A request alone takes that long on the measured engine, whatever the order: its steps have a least time.
    assert floor.bound_s == 0.05
    assert (floor.best_s, floor.ours_s) == (0.2, 0.15)


def test_a_queue_that_no_order_avoids_is_above_a_request_alone():
    records = [record(name, 0.9, rate=2000.0) for name in (REFERENCE, "dynamo", PRODUCT)]
    (floor,) = read_floors(records, None, PAIR)
    assert 0.05 < floor.bound_s < 0.9


def test_a_case_without_rivals_has_nothing_to_be_compared_with():
    assert read_floors([record(REFERENCE, 0.3), record(PRODUCT, 0.2)], None, PAIR) == []


def test_the_table_has_a_row_for_each_load():
    floors = [Floor(workload="random", load=load, seed=1, bound_s=0.1, best_s=0.2, ours_s=0.15) for load in (0.5, 0.85)]
    console = Console(record=True, width=120)
    console.print(render_floors(floors))
    text = console.export_text()
    assert "50%" in text
    assert "85%" in text
    assert "0.75" in text


def test_only_runs_of_the_present_sources_on_reported_seeds_count():
    present = {"variant": PRODUCT, "workload": "random", "digest": digest_of(PRODUCT, source_digests())}
    rows = [
        {**present, "seed": KEPT_APART},
        {**present, "seed": KEPT_APART + 1, "digest": "old"},
        {**present, "seed": 1},
        {**present, "seed": KEPT_APART + 3, "workload": "azure"},
    ]
    assert [row["seed"] for row in select_records(rows, None)] == [KEPT_APART]
    assert [row["seed"] for row in select_records(rows, Path("traces"))] == [KEPT_APART, KEPT_APART + 3]
