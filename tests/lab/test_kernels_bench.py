"""The benchmark of the kernels times every case on the devices that there are, and says what it cannot time."""

from pathlib import Path

import moe_lab
import pytest
import torch
from moe_lab.__main__ import find_benchmarks
from moe_lab.kernels import Routing, describe_device, measure

ROUTING = Routing(name="small", experts=4, slots=5, top_k=2, tokens=3, padded=4)
CASES = ["small, recorded", "small, mapped alone"]


@pytest.mark.parametrize(
    ("device", "ways"),
    [("cpu", ["CPU"]), *([("cuda", ["GPU, kernel", "GPU, torch"])] if torch.cuda.is_available() else [])],
)
def test_every_case_is_timed_each_way(device, ways):
    threads = torch.get_num_threads()
    rows = list(measure([ROUTING], device, repetitions=2))
    assert [(row.benchmark, row.case) for row in rows] == [
        ("map experts", f"{case}, {way}") for case in CASES for way in ways
    ]
    assert all(len(row.values) == 2 and min(row.values) > 0 and row.unit == "us" for row in rows)
    assert torch.get_num_threads() == threads


def test_without_a_gpu_it_says_that_the_kernels_need_one():
    assert "kernels need one" in describe_device(False)


def test_make_bench_runs_it():
    assert "kernels" in find_benchmarks(Path(moe_lab.__file__).parent)
