"""Micro-benchmarks of the kernels of the expert layer: `python -m moe_lab.kernels`, or with all others `make bench`.

Where a GPU is, each case is timed there twice, as Triton kernel and as torch reference, by the GPU's own clock. Without
one the kernels cannot be timed, and this says so. The references are timed on the CPU in either case, since engines on
CPUs use them: as processor time of one core.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from moe_kernels.co_activation import add_co_activation_reference, add_co_activation_triton
from moe_kernels.expert_load import add_expert_load_reference, add_expert_load_triton
from moe_kernels.packed_experts import (
    gather_experts_reference,
    gather_experts_triton,
    plan_packing,
    scatter_experts_reference,
    scatter_experts_triton,
)
from rich.console import Console

from moe_lab.rows import Row

REPETITIONS = 30
BATCH_S = 0.02
"""Calls are repeated for about so long in one measurement."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """Ids of one step of a model: `tokens` real ones of `padded`."""

    name: str
    layers: int
    experts: int
    top_k: int
    tokens: int
    padded: int
    sources: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """A layer's tensors on one rank, (row shape, type) each, and how many of its experts move at once."""

    name: str
    local_experts: int
    rows: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    moved: int


ROUTINGS = (
    Routing(name="tiny model, decode", layers=4, experts=16, top_k=2, tokens=32, padded=32, sources=2),
    Routing(name="tiny model, prefill", layers=4, experts=16, top_k=2, tokens=512, padded=512, sources=2),
    Routing(name="DeepSeek-V3 size", layers=58, experts=256, top_k=8, tokens=250, padded=256, sources=32),
)
WEIGHTS = (
    Weights(
        name="tiny model",
        local_experts=9,
        rows=(((256, 256), torch.float32), ((256, 128), torch.float32)),
        moved=4,
    ),
    Weights(
        name="Qwen3-30B-A3B size",
        local_experts=16,
        rows=(((1536, 2048), torch.bfloat16), ((2048, 768), torch.bfloat16)),
        moved=4,
    ),
    Weights(
        name="int8, rows of odd length",
        local_experts=16,
        rows=(((1023, 1001), torch.int8), ((1001, 511), torch.int8), ((1023,), torch.float32)),
        moved=4,
    ),
)

Call = Callable[[], object]


def run() -> Iterator[Row]:
    """All cases, on the CPU and on the GPU if there is one."""
    has_gpu = torch.cuda.is_available()
    Console().print(describe_device(has_gpu), style="dim" if has_gpu else "yellow", soft_wrap=True)
    for device in ("cpu", "cuda") if has_gpu else ("cpu",):
        yield from measure(ROUTINGS, WEIGHTS, device)


def describe_device(has_gpu: bool) -> str:
    """What can be timed on this machine."""
    if has_gpu:
        return f"GPU: {torch.cuda.get_device_name()}"
    return "No GPU here: the Triton kernels need one to be timed. These are the CPU paths alone."


def measure(
    routings: Sequence[Routing], weights: Sequence[Weights], device: str, repetitions: int = REPETITIONS
) -> Iterator[Row]:
    """One row for each case and each way of `device` to do it, `repetitions` values each, in microseconds a call."""
    for routing in routings:
        yield from _rows("expert load", routing.name, _load_ways(routing, device, None), device, repetitions)
        case = f"{routing.name}, {routing.sources} sources"
        ways = _load_ways(routing, device, torch.arange(routing.padded, device=device) % routing.sources)
        yield from _rows("expert load", case, ways, device, repetitions)
        yield from _rows("co-activation", routing.name, _pair_ways(routing, device), device, repetitions)
    for layer in weights:
        tensors = [torch.zeros(layer.local_experts, *shape, dtype=dtype, device=device) for shape, dtype in layer.rows]
        case = f"{layer.name}, {layer.moved} of {plan_packing(tensors).expert_bytes / 1e6:.2f} MB"
        yield from _rows("gather experts", case, _gather_ways(layer, tensors), device, repetitions)
        yield from _rows("scatter experts", case, _scatter_ways(layer, tensors), device, repetitions)


def _load_ways(routing: Routing, device: str, sources: torch.Tensor | None) -> tuple[Call, Call]:
    ids = _routed(routing, device)
    rows = 1 if sources is None else routing.sources
    load = torch.zeros(rows, routing.layers, routing.experts, dtype=torch.int32, device=device)
    given = (load, ids, routing.tokens, sources)
    return partial(add_expert_load_triton, *given), partial(add_expert_load_reference, *given)


def _pair_ways(routing: Routing, device: str) -> tuple[Call, Call]:
    ids = _routed(routing, device)
    pairs = torch.zeros(routing.layers - 1, routing.experts, routing.experts, dtype=torch.int32, device=device)
    given = (pairs, ids[:-1], ids[1:], routing.tokens)
    return partial(add_co_activation_triton, *given), partial(add_co_activation_reference, *given)


def _gather_ways(layer: Weights, tensors: list[torch.Tensor]) -> tuple[Call, Call]:
    given = (tensors, range(layer.moved))
    return partial(gather_experts_triton, *given), partial(gather_experts_reference, *given)


def _scatter_ways(layer: Weights, tensors: list[torch.Tensor]) -> tuple[Call, Call]:
    packed = gather_experts_reference(tensors, range(layer.moved))
    given = (packed, tensors, range(layer.local_experts - layer.moved, layer.local_experts))
    return partial(scatter_experts_triton, *given), partial(scatter_experts_reference, *given)


def _routed(routing: Routing, device: str) -> torch.Tensor:
    """Ids of which some experts get many: the cube of an even draw."""
    even = torch.rand(routing.layers, routing.padded, routing.top_k, generator=torch.Generator().manual_seed(0))
    return (even**3 * routing.experts).to(torch.int32).to(device)


def _rows(benchmark: str, case: str, ways: tuple[Call, Call], device: str, repetitions: int) -> Iterator[Row]:
    """The kernel and the reference of one case on a GPU, the reference alone on the CPU."""
    kernel, reference = ways
    if device == "cuda":
        for name, call in (("kernel", kernel), ("torch", reference)):
            yield _row(benchmark, f"{case}, GPU, {name}", _gpu_us(call, repetitions))
    else:
        with _one_thread():
            yield _row(benchmark, f"{case}, CPU", _cpu_us(call=reference, repetitions=repetitions))


def _row(benchmark: str, case: str, values: list[float]) -> Row:
    return Row(benchmark=benchmark, case=case, unit="us", values=values)


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
    """Torch on one core, as processor time is what is measured; the number of before afterwards."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    from moe_lab.__main__ import render_rows

    Console().print(render_rows(list(run())))
