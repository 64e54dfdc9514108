"""Micro-benchmark of the kernel of the expert layer: `python -m moe_lab.kernels`, or with all others `make bench`.

With a GPU each case is timed there twice, as Triton kernel and as torch reference, by the GPU's own clock. Without one
the kernel cannot be timed, and this says so. The reference is timed on the CPU in either case, since engines on CPUs
use it: as processor time of one core.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from moe_kernels.expert_load import map_and_record_reference, map_and_record_triton
from rich.console import Console

from moe_lab.rows import BenchmarkRow

REPETITIONS = 30
BATCH_S = 0.02
"""Calls are repeated for about so long in one measurement."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """Ids of one layer in one step of a model: `tokens` real ones of `padded`."""

    name: str
    experts: int
    slots: int
    top_k: int
    tokens: int
    padded: int


ROUTINGS = (
    Routing(name="tiny model, decode", experts=16, slots=18, top_k=2, tokens=32, padded=32),
    Routing(name="tiny model, prefill", experts=16, slots=18, top_k=2, tokens=512, padded=512),
    Routing(name="Qwen3-30B-A3B size", experts=128, slots=144, top_k=8, tokens=250, padded=256),
    Routing(name="DeepSeek-V3 size", experts=256, slots=288, top_k=8, tokens=250, padded=256),
)

Call = Callable[[], object]


def run() -> Iterator[BenchmarkRow]:
    """All cases, on the CPU and on the GPU if there is one."""
    has_gpu = torch.cuda.is_available()
    Console().print(describe_device(has_gpu), style="dim" if has_gpu else "yellow", soft_wrap=True)
    for device in ("cpu", "cuda") if has_gpu else ("cpu",):
        yield from measure(ROUTINGS, device)


def describe_device(has_gpu: bool) -> str:
    """What can be timed on this machine."""
    if has_gpu:
        return f"GPU: {torch.cuda.get_device_name()}"
    return "No GPU here: the Triton kernels need one to be timed. These are the CPU paths alone."


def measure(routings: Sequence[Routing], device: str, repetitions: int = REPETITIONS) -> Iterator[BenchmarkRow]:
    """One row for each case and each way of `device` to do it, `repetitions` values each, in microseconds a call."""
    for routing in routings:
        for recorded in (True, False):
            case = f"{routing.name}, {'recorded' if recorded else 'mapped alone'}"
            yield from _rows("map experts", case, _ways(routing, device, recorded), device, repetitions)


def _ways(routing: Routing, device: str, recorded: bool) -> tuple[Call, Call]:
    replicas = torch.ones(routing.experts, dtype=torch.int64)
    replicas[: routing.slots - routing.experts] = 2
    slots = torch.full((routing.experts, 2), -1)
    slots[:, 0] = torch.arange(routing.experts)
    slots[: routing.slots - routing.experts, 1] = torch.arange(routing.experts, routing.slots)
    load = torch.zeros(routing.slots, dtype=torch.int32)
    given = (load, slots, replicas, torch.tensor(recorded), torch.tensor(routing.tokens, dtype=torch.int32))
    moved = (_routed(routing).to(device), *(tensor.to(device) for tensor in given))
    return partial(map_and_record_triton, *moved), partial(map_and_record_reference, *moved)


def _routed(routing: Routing) -> torch.Tensor:
    """Ids of which some experts get many: the cube of an even draw."""
    even = torch.rand(routing.padded, routing.top_k, generator=torch.Generator().manual_seed(0))
    return (even**3 * routing.experts).to(torch.int32)


def _rows(benchmark: str, case: str, ways: tuple[Call, Call], device: str, repetitions: int) -> Iterator[BenchmarkRow]:
    """The kernel and the reference of one case on a GPU, the reference alone on the CPU."""
    kernel, reference = ways
    if device == "cuda":
        for name, call in (("kernel", kernel), ("torch", reference)):
            yield _row(benchmark, f"{case}, GPU, {name}", _gpu_us(call, repetitions))
    else:
        with _one_thread():
            yield _row(benchmark, f"{case}, CPU", _cpu_us(call=reference, repetitions=repetitions))


def _row(benchmark: str, case: str, values: list[float]) -> BenchmarkRow:
    return BenchmarkRow(benchmark=benchmark, case=case, unit="us", values=values)


def _cpu_us(call: Call, repetitions: int) -> list[float]:
    calls = _calls_of_a_batch(call)
    values = []
    for _ in range(repetitions):
        begun_s = time.process_time()
        for _ in range(calls):
            call()
        values.append((time.process_time() - begun_s) / calls * 1e6)
    return values


def _gpu_us(call: Call, repetitions: int) -> list[float]:
    calls = _calls_of_a_batch(call)
    begin, end = (torch.Event("cuda", enable_timing=True) for _ in range(2))
    values = []
    for _ in range(repetitions):
        begin.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        values.append(begin.elapsed_time(end) * 1e3 / calls)
    return values


def _calls_of_a_batch(call: Call) -> int:
    """Calls that fill `BATCH_S`; the first one, in which kernels are compiled, is not looked at."""
    call()
    _wait_for_gpu()
    begun_s = time.perf_counter()
    call()
    _wait_for_gpu()
    return max(1, int(BATCH_S / (time.perf_counter() - begun_s)))


def _wait_for_gpu() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Torch on one core, as processor time is measured; the number of before afterwards."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    from moe_lab.__main__ import render_rows

    Console().print(render_rows(list(run())))
