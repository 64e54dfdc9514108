"""Each policy asked once, on skewed loads: balance, moves, traffic, time of the decision."""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from moe_scheduling.expert.decision import (
    ExpertCosts,
    ExpertSettings,
    count_moves,
    score_placement,
)
from rich.table import Table

from moe_lab.experts.loads import GROUPS, GroupSizes, make_tenants
from moe_lab.experts.rivals import make_policies

# Of DeepSeek-V3 on H100s, by data sheets: 88 MFLOP a token, 21 kB a token there and back, 44 MB an expert.
COSTS = ExpertCosts(token_s=2.2e-7, remote_token_s=2.4e-8, internode_token_s=2.1e-7, move_s=2e-3)
LOADS = {"Zipf 0.5": (0.5, 1), "Zipf 0.8": (0.8, 1), "Zipf 1.2": (1.2, 1), "2 tenants": (1.0, 2), "4 tenants": (1.0, 4)}
_REPETITIONS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyComparison:
    """One policy on one load. Moves are over all layers; fractions are of the tokens."""

    group: str
    load: str
    seed: int
    policy: str
    balance: float
    worst: float
    moves: int
    remote: float
    internode: float
    step_s: float
    seconds: float


def compare(seeds: int) -> Iterator[PolicyComparison]:
    """All groups, loads and policies."""
    for group_name, group in GROUPS.items():
        for load_name, (exponent, tenants) in LOADS.items():
            if tenants <= group.ranks:
                for seed in range(seeds):
                    yield from _one_load(group_name, group, load_name, exponent, tenants, seed)


def _one_load(
    group_name: str, group: GroupSizes, load_name: str, exponent: float, tenants: int, seed: int
) -> Iterator[PolicyComparison]:
    load, start = make_tenants(group, exponent=exponent, tenants=tenants, seed=seed), group.start
    for name, policy in make_policies(group, COSTS, ExpertSettings()).items():
        if name == "ours, no gate":
            continue
        seconds = []
        for repetition in range(_REPETITIONS):
            # A policy with a history is asked as at its first time.
            asked = policy if not repetition else make_policies(group, COSTS, ExpertSettings())[name]
            begun_s = time.process_time()
            after = asked(load, start)
            seconds.append(time.process_time() - begun_s)
        terms, balance = score_placement(load, after, COSTS)
        yield PolicyComparison(
            group=group_name,
            load=load_name,
            seed=seed,
            policy=name,
            balance=balance.mean,
            worst=balance.worst,
            moves=int(count_moves(start, after).sum()),
            remote=balance.remote_fraction,
            internode=balance.internode_fraction,
            step_s=terms.total_s,
            seconds=min(seconds),
        )


def render_compared(rows: list[PolicyComparison]) -> Table:
    """Means over the seeds; the worst layer and the worst seed in its own column."""
    table = Table(title=f"One decision; mean of {len({row.seed for row in rows})} seeds", title_justify="left")
    headings = (
        "group",
        "load",
        "policy",
        "max/mean",
        "worst layer",
        "moves",
        "of vLLM's",
        "other ranks",
        "other nodes",
    )
    for heading in (*headings, "experts, ms a step", "decision, ms"):
        table.add_column(heading, justify="left" if heading in ("group", "load", "policy") else "right")
    for key in dict.fromkeys((row.group, row.load, row.policy) for row in rows):
        same = [row for row in rows if (row.group, row.load, row.policy) == key]
        theirs = [row for row in rows if (row.group, row.load, row.policy) == (*key[:2], "vLLM")]
        mean = {name: sum(asdict(row)[name] for row in same) / len(same) for name in _FIGURES}
        table.add_row(
            *key,
            f"{mean['balance']:.4f}",
            f"{max(row.worst for row in same):.3f}",
            f"{mean['moves']:.0f}",
            f"{sum(row.moves for row in same) / max(sum(row.moves for row in theirs), 1):.0%}",
            f"{mean['remote']:.1%}",
            f"{mean['internode']:.1%}",
            f"{mean['step_s'] * 1e3:.4g}",
            f"{mean['seconds'] * 1e3:.3g}",
        )
    return table


_FIGURES = ("balance", "moves", "remote", "internode", "step_s", "seconds")
