"""A load that changes, followed by each policy: the time of all steps and of all moves, against moving nothing.

A round is the steps between two decisions. A decision sees a window of the round that ends, counted with the noise of
its steps, and pays for what it moves; the next round shows what it was worth. Step time is that of the experts alone:
whatever else a step has makes every difference smaller.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from moe_scheduling.expert.decision import (
    ExpertCosts,
    ExpertLoad,
    ExpertSettings,
    Move,
    Placement,
    Stay,
    count_moves,
    score_placement,
)
from rich.table import Table

from moe_lab.experts.loads import GroupSizes, sample
from moe_lab.experts.rivals import Ours, make_policies


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """One policy under one sequence: `times_s` and `moves` by round, a round's time with the cost of its moves."""

    scenario: str
    policy: str
    times_s: Sequence[float]
    moves: Sequence[int]

    @property
    def total_s(self) -> float:
        """Seconds of all rounds together."""
        return sum(self.times_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decided:
    """One decision of ours; gains in seconds a step, the measured one under the next round's load."""

    scenario: str
    round: int
    outcome: str
    why: str
    moves: int
    stability: float
    predicted_s: float
    measured_s: float


def replay(
    scenario: str,
    loads: Iterable[ExpertLoad],
    group: GroupSizes,
    costs: ExpertCosts,
    settings: ExpertSettings,
    *,
    seed: int,
    noise: bool = True,
) -> tuple[list[Replayed], list[Decided]]:
    """Runs all policies over the same loads; `noise` counts each window's tokens as they would come."""
    loads = list(loads)
    generator = np.random.default_rng(seed)
    seen = [sample(load, settings.window_steps, generator) if noise else load for load in loads]
    rows, decided = [], []
    for name, policy in make_policies(group, costs, settings).items():
        placement, times_s, moves = group.start, [_round_s(loads[0], group.start, costs)], [0]
        for number, load in enumerate(loads[1:]):
            after = policy(seen[number], placement)
            moved = int(count_moves(placement, after).sum())
            if isinstance(policy, Ours):
                decided.append(_judge(scenario, number, policy.decisions[-1], placement, load, costs))
            placement = after
            times_s.append(_round_s(load, placement, costs) + moved * costs.move_s)
            moves.append(moved)
        rows.append(Replayed(scenario=scenario, policy=name, times_s=times_s, moves=moves))
    return rows, decided


def _round_s(load: ExpertLoad, placement: Placement, costs: ExpertCosts) -> float:
    return score_placement(load, placement, costs)[0].total_s * costs.horizon_steps


def _judge(
    scenario: str, number: int, decision: object, before: Placement, load: ExpertLoad, costs: ExpertCosts
) -> Decided:
    assert isinstance(decision, Move | Stay)
    old, new = (score_placement(load, placement, costs)[0].total_s for placement in (before, decision.candidate))
    return Decided(
        scenario=scenario,
        round=number,
        outcome="move" if isinstance(decision, Move) else f"stay, {decision.reason}",
        why=decision.reasons[-1] if isinstance(decision, Move) else decision.why,
        moves=decision.moves,
        stability=decision.stability,
        predicted_s=decision.gain_s,
        measured_s=old - new,
    )


def render_replayed(rows: Sequence[Replayed]) -> Table:
    """Time against moving nothing, with the moves, and the worst of all scenarios at the end."""
    policies = list(dict.fromkeys(row.policy for row in rows))
    table = Table(title="Expert time of all rounds against moving nothing; moves", title_justify="left")
    table.add_column("load")
    for policy in policies[1:]:
        table.add_column(policy, justify="right")
    worst: dict[str, float] = {}
    for scenario in dict.fromkeys(row.scenario for row in rows):
        same = {row.policy: row for row in rows if row.scenario == scenario}
        cells = []
        for policy in policies[1:]:
            change = same[policy].total_s / same["static"].total_s - 1
            worst[policy] = max(worst.get(policy, change), change)
            cells.append(f"{change:+.2%}; {sum(same[policy].moves)}")
        table.add_row(scenario, *cells)
    table.add_row("worst case", *(f"{worst[policy]:+.2%}" for policy in policies[1:]), style="bold")
    return table


def render_decided(rows: Sequence[Decided]) -> Table:
    """Each decision that had a candidate."""
    table = Table(title="Our decisions that had a candidate", title_justify="left")
    for heading in ("load", "round", "outcome", "moves", "counted on", "predicted, us a step", "measured, us a step"):
        table.add_column(heading, justify="left" if heading in ("load", "outcome") else "right")
    for row in _with_candidate(rows):
        table.add_row(
            row.scenario,
            str(row.round),
            row.outcome,
            str(row.moves),
            f"{row.stability:.0%}",
            f"{row.predicted_s * 1e6:.4g}",
            f"{row.measured_s * 1e6:.4g}",
        )
    return table


def _with_candidate(rows: Sequence[Decided]) -> Iterator[Decided]:
    return (row for row in rows if row.moves)
