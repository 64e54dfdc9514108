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
from moe_tools.simulator.hardware import PRESETS
from moe_tools.simulator.rank import EngineLimits
from moe_tools.simulator.simulation import Simulation
from moe_tools.traces import TraceRequest

from moe_lab.experiments.variants import PRODUCT, REFERENCE, VARIANTS
from moe_lab.experiments.workloads import ADVERSARIAL, ALL, CLIENTS, WORKLOADS, WorkloadKind

T = TypeVar("T")

SATURATION = "saturation"
# The greatest is beyond the saturation of stock vLLM, where the knee of its best rival is.
LOADS = (0.5, 0.7, 0.85, 0.95, 1.0, 1.1, 1.25)
# What scheduling and launching a step take where they are not hidden behind another step, on a GPU (assumed).
EXPOSED_S = 0.002
ABLATION = (REFERENCE, "oursRequest", "oursEngine", PRODUCT)


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetPreset:
    """What serves: a preset of hardware, and how many."""

    preset: str
    servers: int
    ranks: int
    max_num_seqs: int = 128


# The shape of the first Gimbal paper: one lockstep group of two ranks; the second a fleet without lockstep.
PAIR = FleetPreset(preset="a100-qwen3-30b-a3b", servers=1, ranks=2)
FOUR = FleetPreset(preset="a100-qwen3-30b-a3b", servers=4, ranks=1)
# As the second Gimbal paper: four GPUs in one expert group.
GROUP = FleetPreset(preset="h100-qwen3-30b-a3b", servers=1, ranks=4)


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
        loads=(0.85, 0.95, 1.0),
    ),
    "fleet": Experiment(
        title="Four engines that do not step together",
        workloads=("twoEnd", "azure", "mooncake"),
        variants=(*ABLATION, "cacheAware", "llmD", "dynamo", "vllmPriority", "gimbal"),
        loads=(0.85, 0.95, 1.0),
        fleet=FOUR,
    ),
    "signals": Experiment(
        title="With less to go by",
        workloads=("twoEnd", "bursty"),
        variants=(
            REFERENCE,
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
    "experts": Experiment(
        title="Experts placed, and not",
        workloads=("random", "twoEnd"),
        variants=(REFERENCE, "vllmExperts", PRODUCT, "oursExperts"),
        loads=(0.85, 1.0),
        fleet=GROUP,
    ),
    "clients": Experiment(
        title="Loads as clients make them",
        workloads=tuple(CLIENTS),
        variants=(REFERENCE, "vllmPriority", "hrrn", "predictedLatency", "gimbal", PRODUCT),
        loads=(0.85, 1.0),
    ),
    "adversarial": Experiment(
        title="Loads that break policies",
        workloads=tuple(ADVERSARIAL),
        variants=(REFERENCE, "vllmPriority", "cacheAware", "gimbal", PRODUCT),
        loads=(0.95,),
    ),
    "tenants": Experiment(
        title="Tenants treated as tenants, and not",
        workloads=("flood", "equals"),
        variants=(REFERENCE, PRODUCT, "oursUnfair"),
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
    cost = PRESETS[fleet.preset].cost(fleet.ranks, placement=VARIANTS[run.variant].placement, seed=run.seed)
    return Simulation(
        trace=trace,
        cost=cost,
        servers=fleet.servers,
        ranks=fleet.ranks,
        limits=EngineLimits(
            max_num_seqs=fleet.max_num_seqs,
            kv_blocks=cost.kv_blocks(fleet.ranks),
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
