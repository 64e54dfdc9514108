"""How far the mean TTFT could fall if steps had no grain: `python -m moe_lab.experiments.floor --traces DIR`.

A fluid model of a lockstep group: a prompt begins the moment it comes, is computed token by token and may be
interrupted at any moment. The speed is that of steps full of prompt tokens beside the decoding requests that the load
has on the mean, as the cost model says; it depends on how many ranks prefill at once. On a rank the shortest remaining
prompt goes first, which is the best order on one machine (Schrage, "A Proof of the Optimality of the Shortest Remaining
Processing Time Discipline", 1968); a prompt goes to the rank with the least before it.

A step has a least time on a measured engine, so no mean is less than that of the requests alone.

An estimate and no bound: the choice of the rank is a rule, and decoding its mean. Pure but for the command.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from moe_tools.simulator.costs import Work
from moe_tools.simulator.outcome import WARM_UP_SHARE
from moe_tools.simulator.simulation import Simulation
from moe_tools.user_errors import report_user_errors
from rich.console import Console
from rich.table import Table

from moe_lab.experiments.plan import PAIR, ExperimentRun, FleetPreset, build_run
from moe_lab.experiments.raw import RAW_RESULTS, RawResults
from moe_lab.experiments.runner import Record, is_current, read_records, source_digests
from moe_lab.experiments.variants import PRODUCT, REFERENCE, VARIANTS
from moe_lab.experiments.workloads import ALL, KEPT_APART, WORKLOADS

_DONE_TOKENS = 1e-6


@dataclass(slots=True)
class _Prompt:
    left: float
    arrival_s: float
    index: int

    @property
    def order(self) -> tuple[float, float, int]:
        return self.left, self.arrival_s, self.index


def flow_s(jobs: Sequence[tuple[float, float]], speeds: Sequence[float]) -> list[float]:
    """Seconds from each prompt's arrival to its last token, in the order of the jobs.

    Args:
        jobs: arrival in seconds, in their order, and tokens.
        speeds: tokens/s of each rank that computes, while 1, 2, ... ranks do; as many as there are ranks.
    """
    ranks: list[list[_Prompt]] = [[] for _ in speeds]
    took = [0.0] * len(jobs)
    now_s, coming = 0.0, 0
    while coming < len(jobs) or any(ranks):
        first = {number: min(queue, key=lambda row: row.order) for number, queue in enumerate(ranks) if queue}
        speed = speeds[len(first) - 1] if first else 0.0
        ends_s = now_s + min((row.left / speed for row in first.values()), default=math.inf)
        comes_s = jobs[coming][0] if coming < len(jobs) else math.inf
        until_s = min(ends_s, comes_s)
        for number, row in first.items():
            row.left -= (until_s - now_s) * speed
            if row.left <= _DONE_TOKENS:
                ranks[number].remove(row)
                took[row.index] = until_s - row.arrival_s
        now_s = until_s
        if comes_s <= ends_s:
            tokens = jobs[coming][1]
            queue = min(ranks, key=lambda queue: sum(row.left for row in queue if row.left <= tokens))
            queue.append(_Prompt(tokens, comes_s, coming))
            coming += 1
    return took


def speeds_of(simulation: Simulation, decoding: float) -> list[float]:
    """Prompt tokens/s of a rank while 1, 2, ... of them prefill, each beside `decoding` requests, in full steps."""
    cost, ranks, trace = simulation.cost, simulation.ranks, simulation.trace
    step_tokens = simulation.limits.max_num_batched_tokens
    context = sum(row.prompt_tokens for row in trace) / len(trace)
    decodes = Work(decode_requests=int(decoding), context_tokens=int(decoding * context))
    # A token of a prompt attends to half of the prompt on the mean.
    full = decodes._replace(prefill_tokens=step_tokens, prefill_pairs=int(step_tokens * context / 2))
    return [step_tokens / cost.group_step_s([full] * busy + [decodes] * (ranks - busy)) for busy in range(1, ranks + 1)]


def bound_s(simulation: Simulation, figures: Mapping[str, float], rate: float) -> float:
    """The mean TTFT of the fluid model, and not less than that of each request alone.

    Args:
        simulation: the requests at their times, and the cost.
        figures: of vLLM's run of them: the TPOT gives how many decode at once.
        rate: requests a second.
    """
    trace = simulation.trace
    answers = sum(row.output_tokens for row in trace) / len(trace)
    decoding = rate * answers * figures["tpot_mean"] / simulation.ranks
    speeds = speeds_of(simulation, min(decoding, simulation.limits.max_num_seqs))
    uncached = 1.0 - figures["cached_share"]
    took = flow_s([(row.arrival_s, row.prompt_tokens * uncached) for row in trace], speeds)
    steady = took[math.floor(len(took) * WARM_UP_SHARE) :]
    return max(sum(steady) / len(steady), figures["ttft_floor"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Floor:
    """Mean TTFT in seconds of one workload, load and seed."""

    workload: str
    load: float
    seed: int
    bound_s: float
    best_s: float
    ours_s: float


def read_floors(records: Sequence[Mapping[str, Any]], traces: Path | None, fleet: FleetPreset) -> list[Floor]:
    """Figures of each case of this fleet in which both stock vLLM and ours were run."""
    cases: dict[tuple[str, float, int], dict[str, Mapping[str, Any]]] = {}
    for record in records:
        if record["load"] and record["fleet"] == asdict(fleet) and record["workload"] in WORKLOADS:
            cases.setdefault((record["workload"], record["load"], record["seed"]), {})[record["variant"]] = record
    floors = []
    for (workload, load, seed), runs in sorted(cases.items()):
        rivals = [row["figures"]["ttft_mean"] for name, row in runs.items() if VARIANTS[name].is_rival]
        if REFERENCE not in runs or PRODUCT not in runs or len(rivals) < 2:
            continue
        base = runs[REFERENCE]
        run = ExperimentRun(
            experiment="floor", workload=workload, variant=REFERENCE, load=load, seed=seed, count=base["count"],
            fleet=fleet,
        )  # fmt: skip
        least_s = bound_s(build_run(run, traces, base["rate"]), base["figures"], base["rate"])
        ours_s = runs[PRODUCT]["figures"]["ttft_mean"]
        floors.append(
            Floor(workload=workload, load=load, seed=seed, bound_s=least_s, best_s=min(rivals), ours_s=ours_s)
        )
    return floors


def render_floors(floors: Sequence[Floor]) -> Table:
    """The geometric means over the workloads and seeds of each load."""
    table = Table(title="Mean TTFT of a group whose steps have no grain", title_justify="left")
    for name in ("load", "cases", "floor / best rival", "least", "greatest", "ours / best rival", "ours / floor"):
        table.add_column(name, justify="right")
    for load in sorted({row.load for row in floors}):
        rows = [row for row in floors if row.load == load]
        ratios = [row.bound_s / row.best_s for row in rows]
        table.add_row(
            f"{load:.0%}",
            str(len(rows)),
            f"{_mean(ratios):.2f}",
            f"{min(ratios):.2f}",
            f"{max(ratios):.2f}",
            f"{_mean([row.ours_s / row.best_s for row in rows]):.2f}",
            f"{_mean([row.ours_s / row.bound_s for row in rows]):.2f}",
        )
    return table


def _mean(ratios: Sequence[float]) -> float:
    return math.exp(sum(math.log(ratio) for ratio in ratios) / len(ratios))


def select_records(records: Iterable[Record], traces: Path | None) -> list[Record]:
    """Those of the present sources on reported seeds; without `traces` none that needs one."""
    digests = source_digests()
    current = [record for record in records if is_current(record, digests) and record["seed"] >= KEPT_APART]
    return [record for record in current if traces is not None or not ALL[record["workload"]].trace]


@report_user_errors
def main(
    raw: RawResults = RAW_RESULTS,
    traces: Annotated[Path | None, typer.Option("--traces", help="Folder with the public traces.")] = None,
) -> None:
    """What the rivals' runs and ours leave to be won."""
    Console().print(render_floors(read_floors(select_records(read_records(raw), traces), traces, PAIR)))


if __name__ == "__main__":
    typer.run(main)
