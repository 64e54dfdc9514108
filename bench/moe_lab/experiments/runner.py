"""Runs experiments: worker processes that loaded vLLM once, one JSON line for each run, nothing done twice.

A line carries the versions and a digest of the sources that it came from; a line of other sources counts as not there,
so that after a change of the product its runs are made anew and those of the rivals stay.

The parent alone writes the file. Interrupted, it loses the runs that were on their way.
"""

import hashlib
import json
import math
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moe_contract.input_errors import InputError, InvalidInput
from moe_operator.progress import ProgressLine, describe_share
from moe_tools.report import read_environment
from moe_tools.simulator.fitted_presets import FITTED_PRESETS, TABLE
from moe_tools.simulator.saturation import find_saturation
from moe_tools.simulator.simulation import SimulationResult, load_vllm, simulate
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from moe_lab.experiments.plan import ExperimentRun, Selection, build_run, code_digest, plan_runs, saturation_runs
from moe_lab.experiments.variants import VARIANTS
from moe_lab.experiments.workloads import ALL

ROOT = Path(__file__).parents[3]
# The sources that decide the figures of a rival's run, and those that the product's runs need besides.
SIMULATOR_SOURCES = (
    "bench/moe_tools/simulator",
    f"bench/moe_tools/simulator/{TABLE}",
    *(f"bench/moe_tools/{name}.py" for name in ("modelless", "shapes", "traces")),
    *(f"bench/moe_lab/experiments/{name}.py" for name in ("clients", "plan", "workloads")),
)
PRODUCT_SOURCES = (
    "scheduling/moe_scheduling",
    "contract/moe_contract",
    "gateway/moe_gateway",
    "node_agent/moe_agent/vllm",
    "node_agent/moe_agent/shared_memory",
    *(f"node_agent/moe_agent/{name}.py" for name in ("step_curve", "step_time")),
)
# Rate of a workload whose requests arrive all at once.
NO_RATE = 1.0
# Requests a second at which the search for a saturation begins.
_GUESS = 24.0

Record = Mapping[str, Any]


def run_experiments(selection: Selection, *, workers: int, traces: Path | None, out: Path) -> None:
    """Makes those of the selected runs that are missing."""
    selection.check()
    console = Console()
    runs = _with_traces(plan_runs(selection), traces, console)
    if not runs:
        raise InvalidInput([InputError("only", "these filters leave no run")])
    environment = read_environment()
    versions = {"python": environment["python"], **environment["packages"]}
    digests = source_digests()
    found = {record["id"]: record for record in read_records(out) if is_current(record, digests)}
    rates = saturations(found.values())
    measuring = [run for run in saturation_runs(runs) if run.id not in found]
    todo = [run for run in runs if run.id not in found]
    console.print(
        f"{len(runs)} runs, {len(runs) - len(todo)} of them made before; {len(measuring)} saturations to measure"
    )
    with _pool(workers) as pool, out.open("a", encoding="utf-8") as file:

        def keep(record: Record) -> None:
            # Sources may change while a long series runs; the workers run the sources as read at its start.
            full = {**record, "digest": digest_of(record["variant"], digests), "versions": versions}
            file.write(json.dumps(full, sort_keys=True) + "\n")
            file.flush()
            found[record["id"]] = full

        _work(pool, [(run, traces, None) for run in measuring], keep, "saturation", console)
        rates = saturations(found.values())
        _work(pool, [(run, traces, rates.get(run.saturation.id, NO_RATE)) for run in todo], keep, "runs", console)


def _with_traces(runs: Sequence[ExperimentRun], traces: Path | None, console: Console) -> Sequence[ExperimentRun]:
    """The runs whose trace is there; without a folder, those that need none. Prints the number omitted.

    Raises:
        InvalidInput: the folder does not have a file that is needed.
    """
    needed = {run.workload: ALL[run.workload].trace for run in runs if ALL[run.workload].trace}
    if traces is None:
        if needed:
            console.print(f"left out without --traces: {', '.join(needed)}", highlight=False)
        return [run for run in runs if run.workload not in needed]
    if missing := [name for name in needed.values() if not (traces / name).is_file()]:
        raise InvalidInput([InputError("traces", f"{name} is needed, not in {traces}") for name in missing])
    return runs


def _pool(workers: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), initializer=_prepare)


def _prepare() -> None:
    import logging

    logging.disable(logging.WARNING)
    load_vllm()


def _work(
    pool: ProcessPoolExecutor,
    tasks: Sequence[tuple[ExperimentRun, Path | None, float | None]],
    keep: Callable[[Record], None],
    title: str,
    console: Console,
) -> None:
    futures = [pool.submit(measure_run, *each) for each in tasks]
    try:
        _keep_all(futures, keep, title, console)
    except BaseException:
        # Runs that have not begun would be made and thrown away.
        pool.shutdown(wait=False, cancel_futures=True)
        raise


def _keep_all(futures: Sequence[Future[Record]], keep: Callable[[Record], None], title: str, console: Console) -> None:
    if not console.is_terminal:
        _work_in_a_log(futures, keep, title)
        return
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, refresh_per_second=1) as progress:
        task = progress.add_task(title, total=len(futures))
        for future in as_completed(futures):
            keep(future.result())
            progress.advance(task)


def _work_in_a_log(futures: Sequence[Future[Record]], keep: Callable[[Record], None], title: str) -> None:
    """As `_work`, with a line now and then in place of a bar that is rewritten."""
    line, began_s = ProgressLine(sys.stdout), time.monotonic()
    for done, future in enumerate(as_completed(futures), 1):
        keep(future.result())
        line.show(f"{title}: {describe_share(done, len(futures), time.monotonic() - began_s)}", phase=title)


def measure_run(run: ExperimentRun, traces: Path | None, saturation: float | None) -> Record:
    """The record of one run, without versions: called in a worker."""
    began_s = time.perf_counter()
    if saturation is None:
        rate = find_saturation(lambda rate: slowdown(_simulate(run, traces, rate)), _GUESS)
    else:
        rate = saturation * run.load
    outcome = _simulate(run, traces, rate)
    figures = {name: value for name, value in asdict(outcome.figures).items() if math.isfinite(value)}
    return {
        "id": run.id,
        **asdict(run),
        "rate": rate,
        "cost": FITTED_PRESETS[run.fleet.preset].source,
        "figures": figures,
        "virtual_s": outcome.totals.now_s,
        "took_s": time.perf_counter() - began_s,
    }


def _simulate(run: ExperimentRun, traces: Path | None, rate: float) -> SimulationResult:
    return simulate(build_run(run, traces, rate), load_vllm())


def slowdown(outcome: SimulationResult) -> float:
    """Mean TTFT over that of each request alone on an idle engine."""
    return outcome.figures.ttft_mean / outcome.figures.ttft_floor


def saturations(records: Iterator[Record] | Any) -> dict[str, float]:
    """The measured saturations by the id of their run."""
    return {record["id"]: record["rate"] for record in records if record["load"] == 0}


def read_records(path: Path) -> list[Record]:
    """The lines of a file of results; a line that was cut short is left out, an absent file has none.

    Raises:
        InvalidInput: the file cannot be read.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        return []
    records = []
    for line in path.read_text("utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def source_digests() -> dict[bool, str]:
    """The digests of the sources of a run: of the product (True) and of a rival (False)."""
    return {
        True: code_digest(ROOT, (*SIMULATOR_SOURCES, *PRODUCT_SOURCES)),
        False: code_digest(ROOT, SIMULATOR_SOURCES),
    }


def digest_of(variant: str, digests: Mapping[bool, str]) -> str:
    """The digest that a record of this variant has now: of the sources, and of what the variant says."""
    described = VARIANTS[variant].describe()
    return digests[VARIANTS[variant].uses_product] + hashlib.blake2b(described.encode(), digest_size=4).hexdigest()


def is_current(record: Record, digests: Mapping[bool, str]) -> bool:
    """Whether a record came from the present sources."""
    return record["variant"] in VARIANTS and record["digest"] == digest_of(record["variant"], digests)
