"""Step times composed of measured kernels, for engines of which no steps were measured.

Modelled: the experts' layer and the exchange of tokens are measured tables (ai-dynamo/aiconfigurator, commit 095f58a5:
vLLM 0.24 kernels on H100 and H200; DeepEP of SGLang 0.5.12 and vLLM's all-reduce on H200, taken for both); attention,
dense layers, host time and, across nodes, the exchange are the rooflines of `moe_tools.simulator.hardware`. A step is
the sum of its parts, as there. The composed steps are fitted with the same model as measured ones.
"""

import csv
import gzip
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
from moe_contract.input_errors import InputError, InvalidInput
from moe_tools.calibration.step_fit import StepMeasurement, fit_coefficients
from moe_tools.simulator.costs import Work
from moe_tools.simulator.experts import even_balance
from moe_tools.simulator.fitted_presets import FittedPreset
from moe_tools.simulator.hardware import (
    DEEPSEEK_V3,
    H100_BF16,
    H100_FP8_TWO_NODES,
    NVLINK_BF16,
    QWEN3_30B_A3B,
    TWO_NODES_FP8,
    Efficiency,
    Gpu,
    ModelArchitecture,
    RooflineCost,
)
from moe_tools.simulator.step_time import StepModel

SOURCE = "modelled from kernels: vLLM 0.24 MoE, DeepEP or all-reduce tables (ai-dynamo/aiconfigurator 095f58a5)"
# NVIDIA H200 data sheet: the FLOP/s of the H100, 141 GB at 4.8 TB/s.
H200_BF16 = replace(H100_BF16, memory_bytes=141e9, memory_bytes_per_s=4.8e12)
H200_FP8 = replace(H200_BF16, flops=H100_FP8_TWO_NODES.flops)
_BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
_CONTEXTS = (500, 2000, 8000)
_PROMPTS = (32, 128, 256, 480, 600, 1024, 2048, 4096, 8192)
_BESIDE = (0, 4, 32)

LayerTime = Callable[[float], float]
"""Seconds of one layer for a number of tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelEngine:
    """An engine whose steps are composed.

    Attributes:
        preset: name of the preset.
        gpu: of each rank.
        model: served.
        efficiency: of attention, dense layers and host.
        table: name of the GPU of the kernels.
        shape: name of the model in the table of kernels.
        dtype: of the experts in that table.
        distribution: of the experts' load there; DeepSeek-V3's balanced rows, slower than skewed ones, are an anomaly.
        ranks: of the group, over which the experts are spread.
        exchange: `allreduce`, `deepep`, or `roofline` across nodes.
    """

    preset: str
    gpu: Gpu
    model: ModelArchitecture
    efficiency: Efficiency
    table: str
    shape: str
    dtype: str
    distribution: str
    ranks: int
    exchange: str


def list_engines() -> Iterator[KernelEngine]:
    """Yields the engines that are composed."""
    qwen = {"shape": "Qwen3-30B-A3B", "dtype": "bfloat16", "distribution": "balanced", "exchange": "allreduce"}
    for (table, gpu), ranks in product((("h100", H100_BF16), ("h200", H200_BF16)), (1, 2, 4, 8)):
        name = f"{table}-qwen3-30b-a3b-kernels-dp{ranks}"
        sizes = {"gpu": gpu, "model": QWEN3_30B_A3B, "efficiency": NVLINK_BF16, "table": table, "ranks": ranks}
        yield KernelEngine(preset=name, **sizes, **qwen)  # type: ignore[arg-type]
    deepseek = {"shape": "DeepSeek-V3/R1", "dtype": "fp8_block", "distribution": "power_law_1.01"}
    for table, gpu, ranks, exchange in (
        ("h200", H200_FP8, 8, "deepep"),
        ("h100", H100_FP8_TWO_NODES, 16, "roofline"),
    ):
        name = f"{table}-deepseek-v3-kernels-dp{ranks}"
        sizes = {"gpu": gpu, "model": DEEPSEEK_V3, "efficiency": TWO_NODES_FP8, "table": table, "ranks": ranks}
        yield KernelEngine(preset=name, exchange=exchange, **sizes, **deepseek)  # type: ignore[arg-type]


def compose_preset(engine: KernelEngine, data: Path) -> tuple[FittedPreset, list[StepMeasurement]]:
    """Returns the preset, and the composed steps that it was fitted on.

    Raises:
        InvalidInput: a table is missing or has no such rows.
    """
    model = StepModel(
        experts=engine.model.experts, top_k=engine.model.top_k, expert_ranks=engine.ranks, ranks=engine.ranks
    )
    seconds = _step_seconds(engine, data, model)
    steps = [
        StepMeasurement(steps=(works,), seconds=seconds(works), shape=f"{number}")
        for number, works in enumerate(_grid(engine.ranks))
    ]
    preset = FittedPreset(
        model=model,
        coefficients=fit_coefficients(model, steps),
        kv_blocks=_roofline(engine).kv_blocks(engine.ranks),
        measurements=len(steps),
        source=SOURCE,
    )
    return preset, steps


def _grid(ranks: int) -> Iterator[tuple[Work, ...]]:
    """Yields decode steps, and prompts on all ranks and on one beside answers."""
    for batch, context in product(_BATCHES, _CONTEXTS):
        yield (Work(0, batch, batch * context),) * ranks
    for prompt, beside, context in product(_PROMPTS, _BESIDE, _CONTEXTS):
        answers = Work(0, beside, beside * context)
        full = answers._replace(prefill_tokens=prompt, prefill_pairs=prompt * (prompt // 2 + context // 4))
        yield (full,) * ranks
        if ranks > 1:
            yield (full, *(answers,) * (ranks - 1))


def _roofline(engine: KernelEngine) -> RooflineCost:
    balance = even_balance(engine.ranks)
    return RooflineCost(
        gpu=engine.gpu, model=engine.model, efficiency=engine.efficiency, balance=balance, source=SOURCE
    )


def _step_seconds(engine: KernelEngine, data: Path, model: StepModel) -> Callable[[tuple[Work, ...]], float]:
    experts = _kernel_curve(engine, data)
    exchange = {is_decode: _exchange_curve(engine, data, decode=is_decode) for is_decode in (True, False)}
    roofline, layers = _roofline(engine), engine.model.moe_layers

    def seconds(works: tuple[Work, ...]) -> float:
        is_decode = not any(work.prefill_tokens for work in works)
        most = max(work.tokens for work in works)
        padded = (model.padded(most) or most) if is_decode else most
        group = padded * len(works) if is_decode else sum(work.tokens for work in works)
        moved_s = exchange[is_decode](padded)
        return engine.efficiency.host_s + roofline.own_s(works) + layers * (experts(group) + moved_s)

    return seconds


def _kernel_curve(engine: KernelEngine, data: Path) -> LayerTime:
    path = data / f"moe_kernel_{engine.table}_vllm0.24.csv.gz"
    wanted = {
        "model_shape": engine.shape,
        "dtype": engine.dtype,
        "moe_tp": "1",
        "moe_ep": str(engine.ranks),
        "distribution": engine.distribution,
    }
    rows = [row for row in _read(path) if all(row[name] == value for name, value in wanted.items())]
    return _curve(path, [(float(row["num_tokens"]), float(row["latency_ms"]) * 1e-3) for row in rows])


def _exchange_curve(engine: KernelEngine, data: Path, *, decode: bool) -> LayerTime:
    """Returns seconds to send the tokens of the fullest rank to their experts and back, by these tokens."""
    ranks, hidden = engine.ranks, engine.model.hidden
    if ranks == 1:
        return lambda tokens: 0.0
    if engine.exchange == "roofline":
        cost = _roofline(engine)
        return lambda tokens: cost.exchange_s(int(tokens), ranks) / engine.model.moe_layers
    if engine.exchange == "allreduce":
        path = data / "allreduce_h200_vllm.csv"
        kernel = "vllm_graph" if decode else "vllm_eager"
        sizes = [row for row in _read(path) if row["num_gpus"] == str(ranks) and row["backend"] == kernel]
        curve = _curve(path, [(float(row["message_size"]), float(row["latency"]) * 1e-3) for row in sizes])
        # Gathering all ranks' tokens and scattering the sums moves as much as an all-reduce of these; sizes are values.
        return lambda tokens: curve(tokens * ranks * hidden)
    known = {"hidden_size": str(hidden), "num_topk": str(engine.model.top_k), "num_experts": str(engine.model.experts)}
    path = data / f"deepep_{'ll' if decode else 'normal'}_h200.csv"
    rows = [row for row in _read(path) if all(row[name] == value for name, value in known.items())]
    used = [row for row in rows if row.get("dispatch_sms", _DEEPEP_SMS) == _DEEPEP_SMS]
    return _curve(
        path, [(float(row["num_token"]), 1e-6 * sum(float(row[name]) for name in _DEEPEP[decode])) for row in used]
    )


_DEEPEP_SMS = "20"
_DEEPEP = {True: ("dispatch_avg_t_us", "combine_avg_t_us"), False: ("dispatch_transmit_us", "combine_transmit_us")}


def _curve(path: Path, points: list[tuple[float, float]]) -> LayerTime:
    """Returns the line through the points in logarithms, beyond the last one in proportion."""
    if len(points) < 2:
        raise InvalidInput([InputError(str(path), "has no rows of this model and parallelism")])
    tokens, seconds = np.array(sorted(points)).T

    def at(count: float) -> float:
        if count > tokens[-1]:
            return float(seconds[-1] * count / tokens[-1])
        return float(np.exp(np.interp(np.log(max(count, 1e-9)), np.log(tokens), np.log(seconds))))

    return at


def _read(path: Path) -> list[Mapping[str, str]]:
    """Returns the rows of a table; lines that begin with # are comments."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            return list(csv.DictReader(line for line in file if not line.startswith("#")))
    except OSError as error:
        raise InvalidInput([InputError(str(path), f"no table of kernels: {error}")]) from None
