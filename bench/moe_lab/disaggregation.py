"""Prefill and decode apart, on the same GPUs as one group: `python -m moe_lab.disaggregation`.

Runs one workload on one number of GPUs, cut into servers in several ways: stock vLLM and the product on one group;
fixed roles; and `auto`, in which engines begin alike, each request goes whole or as a pair, and roles move with the
load. Prints one row for each, in seconds and as a part of stock vLLM's. Modelled: docs/simulator.md.
"""

import logging
import statistics
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import Annotated

import typer
from moe_scheduling.engine.choice import EngineSettings
from moe_scheduling.engine.disaggregation import EngineRole, KvTransfer, LatencyTargets
from moe_scheduling.fleet.roles import RoleSettings
from moe_scheduling.request.order import RequestSettings
from moe_tools.shapes import Shape, ShapeSettings, build_shape
from moe_tools.simulator.arrivals import ArrivalShape, arrange
from moe_tools.simulator.experts import PlacementPolicy
from moe_tools.simulator.hardware import PRESETS, RooflineCost
from moe_tools.simulator.outcome import Figures
from moe_tools.simulator.pair_router import PairSettings, pair_gateways
from moe_tools.simulator.rank import OURS, STOCK, EngineLimits
from moe_tools.simulator.saturation import find_saturation
from moe_tools.simulator.signals import SignalPlan
from moe_tools.simulator.simulation import ServerShape, Simulation, load_vllm, server_name, simulate
from moe_tools.simulator.transfers import TransferPlan
from moe_tools.traces import TraceRequest

PRESET = PRESETS["h100-qwen3-30b-a3b"]
# 200 Gbit/s InfiniBand, one adapter a GPU (assumed).
LINK = KvTransfer(token_bytes=PRESET.model.kv_bytes, bytes_per_s=25e9)
# As the samples for GPUs have it (manifests/samples).
_REQUEST = RequestSettings(ageing_rate=8000.0)
_GUESS = 8.0
_COLUMNS = ("ttft_mean", "ttft_p99", "tpot_mean", "tpot_p99", "end_mean")


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrangement:
    """One way to use the GPUs.

    Attributes:
        servers: ranks of each server.
        prefill: number of the first servers, which compute prompts while the others decode; None: no fixed roles.
        pairs: whether requests may be split.
        moves: whether roles move with the load.
        stock: whether it is stock vLLM.
    """

    servers: tuple[int, ...]
    prefill: int | None = None
    pairs: bool = False
    moves: bool = False
    stock: bool = False


def ways(gpus: int) -> dict[str, Arrangement]:
    """The ways that are compared on this number of GPUs, by name."""
    found = {"vLLM 0.32": Arrangement(servers=(gpus,), stock=True), "unified": Arrangement(servers=(gpus,))}
    for prefill in range(max(1, gpus // 2), gpus):
        found[f"{prefill}+{gpus - prefill}"] = Arrangement(servers=(prefill, gpus - prefill), prefill=1, pairs=True)
    halves, ones = (gpus // 2, gpus - gpus // 2), (1,) * gpus
    found["unified, 2 servers"] = Arrangement(servers=halves)
    found["auto, 2 servers"] = Arrangement(servers=halves, pairs=True, moves=True)
    found[f"unified, {gpus} servers"] = Arrangement(servers=ones)
    for prefill in range(max(1, gpus // 2), gpus):
        found[f"{prefill}+{gpus - prefill} servers"] = Arrangement(servers=ones, prefill=prefill, pairs=True)
    found[f"auto, {gpus} servers"] = Arrangement(servers=ones, pairs=True, moves=True)
    return found


def server_shape(ranks: int, seed: int) -> ServerShape:
    """Returns a server of this many GPUs; experts lie evenly where they do not divide among them."""
    placement = PlacementPolicy.INITIAL if PRESET.model.experts % ranks == 0 else PlacementPolicy.EVEN
    cost: RooflineCost = PRESET.cost(ranks, placement=placement, seed=seed)
    limits = EngineLimits(max_num_seqs=256, kv_blocks=cost.kv_blocks(ranks), max_model_len=16_384)
    return ServerShape(ranks=ranks, cost=cost, limits=limits)


def build_way(way: Arrangement, trace: Sequence[TraceRequest], gpus: int, seed: int, weight: float) -> Simulation:
    """The simulation of one way to serve a trace."""
    whole = server_shape(gpus, seed)
    shapes = [server_shape(ranks, seed) for ranks in way.servers]
    ours = Simulation(
        trace=trace,
        cost=whole.cost,
        ranks=gpus,
        limits=whole.limits,
        shapes=shapes,
        scheduler=OURS,
        request=_REQUEST,
        dispatch=EngineSettings(),
        exposed_s=0.002,
        seed=seed,
    )
    if way.stock:
        return replace(ours, scheduler=STOCK, request=RequestSettings(), dispatch="vllmInternal")
    if not way.pairs:
        return ours
    roles = {}
    if way.prefill is not None:
        for number in range(len(shapes)):
            roles[server_name(number)] = EngineRole.PREFILL if number < way.prefill else EngineRole.DECODE
    settings = PairSettings(
        link=LINK,
        targets=LatencyTargets(answer_weight=weight),
        roles=roles,
        role_settings=RoleSettings() if way.moves else None,
    )
    gateways = pair_gateways(settings, _REQUEST)
    return replace(ours, dispatch=gateways, transfers=TransferPlan(link=LINK), signals=SignalPlan())


def build_trace(shape: Shape, median_output: int, count: int, rate: float, seed: int) -> Sequence[TraceRequest]:
    """The requests of one seed at a rate."""
    settings = ShapeSettings(
        count=count,
        seed=seed,
        longest_tokens=8192,
        median_output_tokens=median_output,
        longest_output_tokens=16 * median_output,
    )
    return arrange(build_shape(shape, settings), ArrivalShape.POISSON, rate, seed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One run; `rate` None measures the saturation of stock vLLM, and then `way` is not read."""

    shape: Shape
    median_output: int
    count: int
    gpus: int
    seed: int
    weight: float
    way: str
    rate: float | None


def run_task(task: Task) -> tuple[float, Figures, int]:
    """Returns the rate, the figures and the number of pairs; called in a worker."""
    logging.disable(logging.WARNING)
    way = ways(task.gpus)[task.way]

    def run(rate: float) -> tuple[Figures, int]:
        trace = build_trace(task.shape, task.median_output, task.count, rate, task.seed)
        outcome = simulate(build_way(way, trace, task.gpus, task.seed, task.weight), load_vllm())
        return outcome.figures, sum(bool(row.prefill_server) for row in outcome.requests)

    if task.rate is not None:
        return (task.rate, *run(task.rate))

    def slowdown(rate: float) -> float:
        figures, _ = run(rate)
        return figures.ttft_mean / figures.ttft_floor

    rate = find_saturation(slowdown, _GUESS * task.gpus / 2)
    return (rate, *run(rate))


def render(rows: Mapping[str, Sequence[tuple[float, Figures, int]]], count: int) -> str:
    """A table: milliseconds, and the part of the first row's, means over the seeds."""
    names = ("TTFT", "P99 TTFT", "TPOT", "P99 TPOT", "time to the last token")
    lines = [f"| | {' | '.join(f'{name} (ms)' for name in names)} | failed | pairs |", "|---" * (len(names) + 3) + "|"]
    base = {column: _mean(next(iter(rows.values())), lambda row, c=column: getattr(row[1], c)) for column in _COLUMNS}
    for name, runs in rows.items():
        cells = []
        for column in _COLUMNS:
            value = _mean(runs, lambda row, c=column: getattr(row[1], c))
            cells.append(f"{value * 1e3:.0f} ({value / base[column]:.2f})")
        failed = sum(figures.failed for _, figures, _ in runs)
        pairs = sum(found for _, _, found in runs) / (count * len(runs))
        lines.append(f"| {name} | {' | '.join(cells)} | {failed} | {pairs:.0%} |")
    return "\n".join(lines)


def _mean(runs: Sequence[tuple[float, Figures, int]], value: Callable[..., float]) -> float:
    return statistics.fmean(value(row) for row in runs)


def main(
    gpus: Annotated[int, typer.Option(min=2, max=16)] = 8,
    shape: Shape = Shape.TWO_END,
    median_output: Annotated[int, typer.Option(min=2)] = 64,
    count: Annotated[int, typer.Option(min=20)] = 600,
    seeds: Annotated[int, typer.Option(min=1)] = 2,
    load: Annotated[list[float] | None, typer.Option(help="Part of stock vLLM's saturation; 1 without.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Ways by their names; all without.")] = None,
    weight: Annotated[float, typer.Option(min=0, help="Seconds of TTFT that a second of an answer is worth.")] = 1.0,
    rate: Annotated[float | None, typer.Option(help="Requests a second instead of a part of the saturation.")] = None,
    workers: Annotated[int, typer.Option(min=1)] = 1,
) -> None:
    """Compare ways to serve one workload with prefill and decode together and apart."""
    first = next(iter(ways(gpus)))
    chosen = [name for name in ways(gpus) if name == first or not only or name in only]

    def task(seed: int, way: str, at: float | None) -> Task:
        return Task(
            shape=shape, median_output=median_output, count=count, gpus=gpus, seed=seed, weight=weight, way=way, rate=at
        )

    numbers = range(1, seeds + 1)
    with ProcessPoolExecutor(workers) as pool:
        rates = [rate] * seeds
        if rate is None:
            rates = [found for found, _, _ in pool.map(run_task, [task(seed, first, None) for seed in numbers])]
        for part in load or [1.0]:
            tasks = {
                name: [
                    pool.submit(run_task, task(seed, name, at * part))
                    for seed, at in zip(numbers, rates, strict=True)
                    if at is not None
                ]
                for name in chosen
            }
            rows = {name: [future.result() for future in futures] for name, futures in tasks.items()}
            served = ", ".join(f"{found:.1f}" for found, _, _ in rows[first])
            typer.echo(f"\n{shape}, {gpus} GPUs, load {part:g}: {served} requests/s\n")
            typer.echo(render(rows, count))


if __name__ == "__main__":
    typer.run(main)
