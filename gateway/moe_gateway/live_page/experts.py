"""The experts of the engines that somebody looks at, asked of their agents at most once in `PERIOD_S` each."""

import asyncio
from collections.abc import Collection
from dataclasses import replace

import aiohttp
from moe_contract.clients import AgentClient, PeerError
from moe_contract.experts_state import Decision, ExpertsState
from moe_contract.live_page import ExpertMove, ExpertsSnapshot

PERIOD_S = 3.0
TIMEOUT_S = 5.0


class ExpertsReader:
    """Keeps the newest experts of each engine that is looked at.

    Args:
        session: to ask agents with.
    """

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session
        self._newest: dict[str, ExpertsSnapshot] = {}
        self._asked_s: dict[str, float] = {}
        self._asking: dict[str, asyncio.Task[None]] = {}

    def newest(self, engine: str) -> ExpertsSnapshot | None:
        """What its agent answered last; the same object while nothing has changed, None before an answer."""
        return self._newest.get(engine)

    def refresh(self, wanted: Collection[tuple[str, str]], now_s: float, at_s: float) -> None:
        """Asks the agents of these engines, by name and URL, where it is time; forgets all others.

        Args:
            wanted: engines that somebody looks at.
            now_s: monotonic time.
            at_s: the same as time of day.
        """
        names = {name for name, _ in wanted}
        for name in self._asked_s.keys() - names:
            del self._asked_s[name]
            self._newest.pop(name, None)
        for name, url in wanted:
            if name not in self._asking and now_s - self._asked_s.get(name, -PERIOD_S) >= PERIOD_S:
                self._asked_s[name] = now_s
                task = asyncio.get_running_loop().create_task(self._ask(name, url, at_s))
                self._asking[name] = task
                task.add_done_callback(lambda _task, name=name: self._asking.pop(name, None))  # type: ignore[misc]

    async def _ask(self, name: str, url: str, at_s: float) -> None:
        try:
            state = await AgentClient(self._session, url, timeout_s=TIMEOUT_S).heat()
        except PeerError as error:
            found = ExpertsSnapshot(engine=name, problem=f"Its agent {error}.")
        else:
            found = describe_experts(name, state, at_s)
        before = self._newest.get(name)
        if before is None or not _is_same(before, found):
            self._newest[name] = found

    async def close(self) -> None:
        """Ends the questions that are under way."""
        asking = list(self._asking.values())
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)


def _is_same(before: ExpertsSnapshot, after: ExpertsSnapshot) -> bool:
    """Whether nothing changed but the times of decisions, which are computed from ages and so differ by some ms."""
    moves = tuple(replace(new, at_s=old.at_s) for old, new in zip(before.decisions, after.decisions, strict=False))
    return len(before.decisions) == len(after.decisions) and before == replace(after, decisions=moves)


def describe_experts(name: str, state: ExpertsState | None, at_s: float) -> ExpertsSnapshot:
    """The event `experts` of an engine; None as state: it has no expert group."""
    if state is None:
        problem = "This engine does not spread its experts over ranks; engine.parallelism.expert would."
        return ExpertsSnapshot(engine=name, problem=problem)
    heat, balance, totals = state.heat, state.recorded, state.totals
    problem = ""
    if heat is None:
        waits = "No load of the experts is recorded yet: that takes scheduling.expert.window steps with requests."
        problem = "scheduling.expert.mode is off." if state.mode == "off" else waits
        if balance is not None:
            problem = "The agent of this engine is of a version without this picture."
    return ExpertsSnapshot(
        engine=name,
        problem=problem,
        mode=state.mode,
        ranks=state.ranks,
        layers=state.layers,
        experts=state.experts,
        version=state.placement.version,
        steps=round(state.load.steps),
        heat_unit=0.0 if heat is None else heat.unit,
        by_expert="" if heat is None else heat.by_expert,
        by_rank="" if heat is None else heat.by_rank,
        balance=None if balance is None else round(balance.mean, 4),
        layer_balance=() if balance is None else tuple(round(value, 3) for value in balance.by_layer),
        decisions=tuple(_describe_move(row, at_s) for row in state.decisions),
        moved=totals.moves,
        won_s=totals.won_s,
        lost_s=totals.lost_s,
        problems=tuple(row.message or row.kind for row in state.problems),
    )


def _describe_move(row: Decision, at_s: float) -> ExpertMove:
    return ExpertMove(
        number=row.number,
        at_s=round(at_s - row.age_s, 1),
        outcome=row.outcome,
        reason=row.reason,
        moves=row.moves,
        predicted_gain_s=row.predicted_gain_s,
        measured_gain_s=row.measured_gain_s,
        cost_s=row.cost_s,
        balance_before=row.balance_before,
        balance_after=row.balance_after,
    )
