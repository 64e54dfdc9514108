"""The runs: workloads, loads, seeds and arrangements; one JSON line for each, nothing done twice.

A line carries a digest of the sources that it came from. A line of other sources counts as not there, so that after a
change of the product its runs are made anew and those of stock vLLM stay. Loads are parts of the rate at which stock
vLLM's mean TTFT on one group is five times that of a request alone, found once for a workload on requests of a seed of
its own.
"""

import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from moe_scheduling.engine.disaggregation import LatencyTargets
from moe_tools.advisor.fleet import FleetLoad, FleetShape, build_fleet
from moe_tools.advisor.settled import settle
from moe_tools.simulator.costs import IDLE, Work
from moe_tools.simulator.pair_router import PairGateway
from moe_tools.simulator.saturation import find_saturation
from moe_tools.simulator.simulation import Simulation, SimulationResult, alone_s, load_vllm, simulate
from moe_tools.simulator.workload import SimRequest
from moe_tools.traces import TraceRequest

from moe_lab.disaggregation.arrangements import CLOCK, REFERENCE, arrangements, load_of
from moe_lab.disaggregation.workloads import Folders, build_workload, max_model_len
from moe_lab.experiments.plan import code_digest
from moe_lab.experiments.runner import PRODUCT_SOURCES, ROOT, SIMULATOR_SOURCES, read_records

# Requests and seed with which the rate of a full load is found; no other run has these.
RATE_COUNT = 300
RATE_SEED = 9001
_GUESS = 4.0
# Bounds of goodput, as multiples of what the same request gets alone.
TTFT_BOUND, TPOT_BOUND = 5.0, 2.0
# Sources that whole requests do not depend on.
_PAIR_SOURCES = (
    *(f"bench/moe_tools/simulator/{name}.py" for name in ("pair_router", "transfers", "kv_connector")),
    *(f"scheduling/moe_scheduling/engine/{name}.py" for name in ("pair_choice", "disaggregation", "prefill_share")),
    "scheduling/moe_scheduling/fleet",
)
_SETTLED: dict[tuple["Run", float], FleetShape] = {}
_OWN_SOURCES = (
    *(f"bench/moe_lab/disaggregation/{name}.py" for name in ("arrangements", "workloads")),
    *(f"bench/moe_tools/advisor/{name}.py" for name in ("clocks", "fleet", "settled")),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run; `load` 0 finds the rate of a full load and serves at it.

    Attributes:
        gpus: in all.
        workload: its name.
        load: part of the rate of a full load.
        count: requests.
        seed: of the requests.
        arrangement: its name.
        clock: of the step times, name in `CLOCKS`.
        targets: objective of the choice between whole requests and pairs.
    """

    gpus: int
    workload: str
    load: float
    count: int
    seed: int
    arrangement: str
    clock: str = CLOCK
    targets: LatencyTargets = field(default_factory=LatencyTargets)

    @property
    def id(self) -> str:
        """Names the run in the file of results."""
        parts: tuple[Any, ...] = (
            self.clock, self.gpus, self.workload, self.load, self.count, self.seed, self.arrangement,
        )  # fmt: skip
        usual = LatencyTargets()
        changed = [
            f"{name}={value}"
            for name, value in asdict(self.targets).items()
            if value != getattr(usual, name) or (name == "ttft_growth" and self.arrangement.startswith("auto"))
        ]
        return "/".join(map(str, (*parts, *changed)))


def rate_run(run: Run) -> Run:
    """Returns the run that finds the rate of a full load for another one."""
    return Run(
        gpus=run.gpus, workload=run.workload, load=0.0, count=RATE_COUNT, seed=RATE_SEED, arrangement=REFERENCE,
        clock=run.clock,
    )  # fmt: skip


def run_all(
    runs: Sequence[Run],
    *,
    folders: Folders,
    out: Path,
    workers: int,
    say: Callable[[str], None],
    full_rate: float | None = None,
) -> None:
    """Makes those of the runs that are missing in a file of results, in their order.

    Args:
        runs: that are wanted.
        folders: of public data.
        out: the file of results.
        workers: processes.
        say: shows a line of progress.
        full_rate: requests a second of a full load; None: it is found.
    """
    digests = {run.arrangement: source_digest(arrangements(run.gpus, run.clock)[run.arrangement]) for run in runs}
    digests[REFERENCE] = source_digest(FleetShape(servers=(1,), stock=True))
    found = {
        record["id"]: record for record in read_records(out) if record["digest"] == digests.get(record["arrangement"])
    }
    if out.exists() and not out.read_bytes().endswith(b"\n"):
        # An interrupted run may have left a part of a line.
        out.write_bytes(out.read_bytes() + b"\n")
    with ProcessPoolExecutor(workers, initializer=_prepare) as pool, out.open("a", encoding="utf-8") as file:

        def keep(record: Mapping[str, Any]) -> None:
            full = {**record, "digest": digests[record["arrangement"]]}
            file.write(json.dumps(full, sort_keys=True) + "\n")
            file.flush()
            found[record["id"]] = full

        wanted_rates = [] if full_rate is not None else [rate_run(run) for run in runs]
        rates = [run for run in dict.fromkeys(wanted_rates) if run.id not in found]
        for record in pool.map(measure_run, rates, [folders] * len(rates), [None] * len(rates)):
            keep(record)
        todo = [run for run in dict.fromkeys(runs) if run.id not in found]
        say(f"{len(runs)} runs, {len(runs) - len(todo)} of them made before")
        wanted = [run.load * (full_rate or found[rate_run(run).id]["rate"]) for run in todo]
        for record in pool.map(measure_run, todo, [folders] * len(todo), wanted):
            keep(record)
            say(f"{record['id']}: {record['took_s']:.0f} s")


def source_digest(way: FleetShape) -> str:
    """Returns a digest of the sources that the figures of an arrangement depend on."""
    places = [*SIMULATOR_SOURCES, *_OWN_SOURCES, *(PRODUCT_SOURCES if way.uses_product else ())]
    files = {str(path.relative_to(ROOT)) for place in places for path in _python_files(ROOT / place)}
    if not way.pairs:
        files -= {str(path.relative_to(ROOT)) for place in _PAIR_SOURCES for path in _python_files(ROOT / place)}
    return code_digest(ROOT, sorted(files))


def _python_files(place: Path) -> Sequence[Path]:
    return [place] if place.is_file() else sorted(place.rglob("*.py"))


def _prepare() -> None:
    logging.disable(logging.WARNING)
    load_vllm()


def measure_run(run: Run, folders: Folders, rate: float | None) -> dict[str, Any]:
    """Returns the record of one run at a rate in requests a second; None finds it. Called in a worker."""
    began_s = time.perf_counter()
    if rate is None:
        rate = find_saturation(lambda at: _slowdown(_serve(run, folders, at)[1]), _GUESS * run.gpus)
    simulation, outcome, changes, begin = _serve(run, folders, rate)
    figures = {name: value for name, value in asdict(outcome.figures).items() if math.isfinite(value)}
    transfers = outcome.totals.transfers
    return {
        "id": run.id,
        **asdict(run),
        "rate": rate,
        "figures": {**figures, **goodput(simulation, outcome)},
        "pairs": sum(bool(row.prefill_server) for row in outcome.requests) / len(outcome.requests),
        "role_changes": changes,
        "prefill_engines": begin,
        "transfers": None if transfers is None else asdict(transfers),
        "virtual_s": outcome.totals.now_s,
        "took_s": time.perf_counter() - began_s,
    }


def _slowdown(outcome: SimulationResult) -> float:
    return outcome.figures.ttft_mean / outcome.figures.ttft_floor


def _serve(run: Run, folders: Folders, rate: float) -> tuple[Simulation, SimulationResult, int, int]:
    """Returns the simulation, its outcome, the number of changes of a role, and of prefill engines at the begin."""
    trace = build_workload(run.workload, run.count, rate, run.seed, folders)
    way = arrangements(run.gpus, run.clock)[run.arrangement]
    load = _load_of(run, trace, run.seed)
    if way.moves and run.load:
        way = _settled(run, folders, rate)
    simulation = build_fleet(way, load)
    gateways: list[PairGateway] = []
    make = simulation.dispatch
    if callable(make):

        def kept(*arguments: Any) -> Any:
            gateways.append(router := make(*arguments))  # type: ignore[arg-type]
            return router

        outcome = simulate(replace(simulation, dispatch=kept), load_vllm())
    else:
        outcome = simulate(simulation, load_vllm())
    changes = sum(len(gateway.role_changes) for gateway in gateways)
    return simulation, outcome, changes, way.begin if way.prefill is None else way.prefill


def _load_of(run: Run, trace: tuple[TraceRequest, ...], seed: int) -> FleetLoad:
    longest = max_model_len(run.workload)
    return load_of(trace, seed, clock=run.clock, gpus=run.gpus, targets=run.targets, max_model_len=longest)


def _settled(run: Run, folders: Folders, rate: float) -> FleetShape:
    """Returns the arrangement of a run with the roles that it settles at, found once in a process."""
    key = (replace(run, seed=RATE_SEED, count=RATE_COUNT), rate)
    if key not in _SETTLED:
        trace = build_workload(run.workload, RATE_COUNT, rate, RATE_SEED, folders)
        load = _load_of(run, trace, RATE_SEED)
        _SETTLED[key] = settle(arrangements(run.gpus, run.clock)[run.arrangement], load)
    return _SETTLED[key]


def goodput(simulation: Simulation, outcome: SimulationResult) -> dict[str, float]:
    """Returns the part of the requests that were answered within both bounds, and how many a second.

    The bounds are multiples of what the same request gets alone on all GPUs as one group, so they are the same for
    every arrangement.
    """
    steady = outcome.requests[len(outcome.requests) // 10 :]
    good = sum(_is_good(simulation, row) for row in steady)
    last_s = max((row.finished_s or 0.0 for row in steady), default=0.0)
    span_s = last_s - steady[0].arrival_s
    return {"good_share": good / len(steady), "good_per_s": good / span_s if span_s > 0 else 0.0}


def _is_good(simulation: Simulation, row: SimRequest) -> bool:
    if row.failure or row.first_token_s is None or row.finished_s is None:
        return False
    ranks, cost = simulation.ranks, simulation.cost
    ttft_s = simulation.exposed_s + alone_s(cost, simulation.limits.max_num_batched_tokens, ranks, row)
    if row.first_token_s - row.arrival_s > TTFT_BOUND * ttft_s:
        return False
    if row.output_tokens < 2:
        return True
    work = Work(decode_requests=1, context_tokens=row.prompt_tokens + row.output_tokens // 2)
    step_s = cost.group_step_s([work, *(IDLE,) * (ranks - 1)])
    return (row.finished_s - row.first_token_s) / (row.output_tokens - 1) <= TPOT_BOUND * step_s
