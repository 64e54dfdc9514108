"""Which runs an experiment has: workloads by loads by seeds by variants, each with an id that says what it is.

A load is a part of the workload's saturation, which is measured first (`saturation`). Pure: the same plan gives the
same runs in the same order.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from moe_contract.input_errors import InvalidInput, unknown_choice
from moe_tools.simulator.arrivals import ArrivalShape, arrange
from moe_tools.simulator.fitted_presets import FITTED_PRESETS
from moe_tools.simulator.rank import EngineLimits
from moe_tools.simulator.simulation import Simulation
from moe_tools.traces import TraceRequest

from moe_lab.experiments.variants import PRODUCT, REFERENCE, VARIANTS
from moe_lab.experiments.workloads import ADVERSARIAL, ALL, CLIENTS, WORKLOADS, WorkloadKind

T = TypeVar("T")

SATURATION = "saturation"
# Beside 1: the greatest is beyond the saturation of stock vLLM, where the knee of its best rival is.
LOADS = (0.5, 0.85, 1.1, 1.25)
# What scheduling and launching a step take where they are not hidden behind another step, on a GPU (assumed).
EXPOSED_S = 0.002
# vLLM as it comes, and with its own lever against prefills: rivals in every experiment.
STOCK_ALWAYS = (REFERENCE, "vllmInterval2")
ABLATION = (*STOCK_ALWAYS, "oursRequest", "oursEngine", PRODUCT)
# Rivals that are met at every load: vLLM as it comes and with its own levers, routers that know caches, other orders.
STRONGEST = (*STOCK_ALWAYS, "vllm2048", "vllm16384", "vllmPriority", "cacheAware", "dynamo", "hrrn", "gimbal")
FLEET_WORKLOADS = ("random", "twoEnd", "azure", "mooncake")
FLEET_VARIANTS = (*ABLATION, "cacheAware", "llmD", "dynamo", "vllmPriority", "gimbal")


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetPreset:
    """Servers of one preset of fitted step times.

    Attributes:
        preset: name in `FITTED_PRESETS`.
        servers: how many.
        ranks: data-parallel ranks of a server, in lockstep: those of the preset.
        max_num_seqs: vLLM 0.32's default on GPUs of 70 GiB and more.
        step_tokens: vLLM's `max_num_batched_tokens`: of the longest steps that were measured, and vLLM 0.32's default
            on an H200. On GPUs of 160 GiB and more its default is 16,384, of which no step was measured.
        kv_blocks: of 16 tokens, of a rank (assumed): a B300 has room for more, but each is an object of vLLM, and no
            run has requests of more tokens at a time.
    """

    preset: str
    servers: int
    ranks: int
    max_num_seqs: int = 1024
    step_tokens: int = 8192
    kv_blocks: int = 131_072


# The preset with the least errors of those with lockstep: two data-parallel ranks of two tensor ranks each.
PAIR = FleetPreset(preset="b300-qwen3.6-35b-a3b-tp2-ep4-dp2", servers=1, ranks=2)
FOUR = FleetPreset(preset="b300-qwen3.6-35b-a3b-tp1-ep1", servers=4, ranks=1)
# One rank of four GPUs: the other preset of this model is 40 % off where prompts run beside answers.
FLASH = FleetPreset(preset="b300-deepseek-v4-flash-tp4-ep4", servers=2, ranks=1)
# Steps composed of measured kernels, which were compared with no engine.
_H200 = "h200-qwen3-30b-a3b-kernels-dp2"
KERNELS = FleetPreset(preset=_H200, servers=1, ranks=2, kv_blocks=FITTED_PRESETS[_H200].kv_blocks)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExperimentRun:
    """One run. `load` 0 measures the saturation."""

    experiment: str
    workload: str
    variant: str
    load: float
    seed: int
    count: int
    fleet: FleetPreset

    @property
    def id(self) -> str:
        """What it is, for people and for resuming."""
        fleet = f"{self.fleet.preset}x{self.fleet.servers}x{self.fleet.ranks}"
        return f"{fleet}/{self.workload}/{self.load:g}/{self.seed}/{self.count}/{self.variant}"

    @property
    def saturation(self) -> "ExperimentRun":
        """The run that measures what its load is a part of."""
        return replace(self, experiment=SATURATION, variant=REFERENCE, load=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Experiment:
    """Workloads by loads by variants."""

    title: str
    workloads: Sequence[str]
    variants: Sequence[str]
    loads: Sequence[float]
    fleet: FleetPreset = PAIR


EXPERIMENTS: Mapping[str, Experiment] = {
    "rivals": Experiment(
        title="Ours against every rival",
        workloads=tuple(WORKLOADS),
        variants=tuple(name for name, variant in VARIANTS.items() if variant.is_rival or name == PRODUCT),
        loads=(1.0,),
    ),
    "loads": Experiment(
        title="From half the load to beyond saturation",
        workloads=tuple(WORKLOADS),
        variants=(*STRONGEST, PRODUCT),
        loads=LOADS,
    ),
    "ablation": Experiment(
        title="One layer at a time, one lever less at a time",
        workloads=tuple(WORKLOADS),
        variants=(
            *ABLATION,
            "oursNoOrder",
            "oursNoYield",
            "oursNoCut",
            "oursNotLate",
            "oursNoGrowth",
            "oursDefaultAgeing",
        ),
        loads=(1.0,),
    ),
    "fleet": Experiment(
        title="Four engines that do not step together",
        workloads=FLEET_WORKLOADS,
        variants=FLEET_VARIANTS,
        loads=(0.85, 1.0),
        fleet=FOUR,
    ),
    "deepseek": Experiment(
        title="Two engines of another model",
        workloads=FLEET_WORKLOADS,
        variants=FLEET_VARIANTS,
        loads=(0.85, 1.0),
        fleet=FLASH,
    ),
    "kernels": Experiment(
        title="Step times composed of measured kernels",
        workloads=("random", "twoEnd"),
        variants=(*ABLATION, "vllm2048", "vllmPriority", "cacheAware", "dynamo", "gimbal"),
        loads=(0.85, 1.0),
        fleet=KERNELS,
    ),
    "signals": Experiment(
        title="With less to go by",
        workloads=("twoEnd", "bursty"),
        variants=(
            *STOCK_ALWAYS,
            PRODUCT,
            "oursScraped",
            "oursBlind",
            "oursStale",
            "oursLost",
            "oursGateways",
            "vllmGateways",
        ),
        loads=(0.95,),
        fleet=FOUR,
    ),
    "clients": Experiment(
        title="Loads as clients make them",
        workloads=tuple(CLIENTS),
        variants=(*STOCK_ALWAYS, "vllmPriority", "hrrn", "predictedLatency", "gimbal", PRODUCT),
        loads=(0.85, 1.0),
    ),
    "adversarial": Experiment(
        title="Loads that break policies",
        workloads=tuple(ADVERSARIAL),
        variants=(*STOCK_ALWAYS, "vllmPriority", "cacheAware", "gimbal", PRODUCT),
        loads=(0.95,),
    ),
    "tenants": Experiment(
        title="Tenants treated as tenants, and not",
        workloads=("flood", "equals"),
        variants=(*STOCK_ALWAYS, PRODUCT, "oursUnfair"),
        loads=(0.95, 1.1, 1.25, 2.0),
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """What of the experiments is run; empty means all.

    Attributes:
        only: names of experiments.
        workloads: names of workloads.
        variants: names of variants.
        loads: loads.
        seeds: how many.
        first_seed: the first of them; from `workloads.KEPT_APART` on nothing of the product was chosen on them.
        count: requests of a run.
    """

    only: tuple[str, ...] = ()
    workloads: tuple[str, ...] = ()
    variants: tuple[str, ...] = ()
    loads: tuple[float, ...] = ()
    seeds: int = 3
    first_seed: int = 1
    count: int = 600

    def check(self) -> None:
        """Raises `InvalidInput` for names that are unknown."""
        known: tuple[tuple[str, tuple[str, ...], Mapping[str, object]], ...] = (
            ("only", self.only, EXPERIMENTS),
            ("workload", self.workloads, ALL),
            ("variant", self.variants, VARIANTS),
        )
        problems = [
            unknown_choice(path, name, choices)
            for path, names, choices in known
            for name in set(names) - choices.keys()
        ]
        if problems:
            raise InvalidInput(sorted(problems))


def plan_runs(selection: Selection) -> tuple[ExperimentRun, ...]:
    """The runs, each once, without those that measure the saturation. A seed's runs come together, so that pairs do."""
    runs: dict[str, ExperimentRun] = {}
    for seed in range(selection.first_seed, selection.first_seed + selection.seeds):
        for name, experiment in EXPERIMENTS.items():
            if not selection.only or name in selection.only:
                runs.update((run.id, run) for run in _runs(name, experiment, selection, seed) if run.id not in runs)
    return tuple(runs.values())


def _runs(name: str, experiment: Experiment, selection: Selection, seed: int) -> Iterator[ExperimentRun]:
    for workload in _chosen(experiment.workloads, selection.workloads):
        for load in _chosen(experiment.loads, selection.loads):
            for variant in _chosen(experiment.variants, selection.variants):
                yield ExperimentRun(
                    experiment=name, workload=workload, variant=variant, load=load, seed=seed,
                    count=selection.count, fleet=experiment.fleet,
                )  # fmt: skip


def _chosen(known: Sequence[T], wanted: Sequence[T]) -> list[T]:
    return [entry for entry in known if not wanted or entry in wanted]


def saturation_runs(runs: Sequence[ExperimentRun]) -> tuple[ExperimentRun, ...]:
    """The runs that measure the saturations of these, each once; what comes all at once has none."""
    found = {run.saturation.id: run.saturation for run in runs if ALL[run.workload].arrivals is not ArrivalShape.BURST}
    return tuple(found.values())


def build_run(run: ExperimentRun, traces: Path | None, rate: float) -> Simulation:
    """The simulation of a run.

    Args:
        run: which.
        traces: folder of the trace files.
        rate: requests a second.
    """
    workload = ALL[run.workload]
    requests = workload.build(round(run.count * workload.length), run.seed, traces)
    trace = arrange(requests, workload.arrivals, rate, run.seed)
    return VARIANTS[run.variant].apply(_base(run, workload, trace))


def _base(run: ExperimentRun, workload: WorkloadKind, trace: tuple[TraceRequest, ...]) -> Simulation:
    fleet = run.fleet
    return Simulation(
        trace=trace,
        cost=FITTED_PRESETS[fleet.preset].cost(fleet.ranks),
        servers=fleet.servers,
        ranks=fleet.ranks,
        limits=EngineLimits(
            max_num_seqs=fleet.max_num_seqs,
            max_num_batched_tokens=fleet.step_tokens,
            kv_blocks=fleet.kv_blocks,
            max_model_len=workload.context_tokens,
        ),
        senders=workload.senders,
        exposed_s=EXPOSED_S,
        seed=run.seed,
    )


def code_digest(root: Path, places: Sequence[str]) -> str:
    """A short digest of Python sources, files or all below a folder: what a result came from."""
    digest = hashlib.blake2b(digest_size=8)
    for place in places:
        for path in sorted((root / place).rglob("*.py")) or [root / place]:
            digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
