"""What moving experts is worth on a real group: what `active` does by itself, then both placements in pairs.

1. A short load warms the engine up and is recorded; with `crowded` the hottest experts are then put on one rank.
2. The mode becomes `active` under the same load. What it decides is kept, with predicted and measured gains.
3. The mode becomes `observe`. A is the placement from before 2, B the one that 2 moved to, also where it was taken
   back; where nothing moved, B is what `moeserving experts plan` would do.
4. A B, B A and so on. Both windows of a pair have the same prompts; what moves, moves in a wave that counts nowhere.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from moe_contract.experts_state import Decision, ExpertsState, Slots
from moe_operator.experts.planned import decision_document, plan_document
from moe_operator.local.failure import Failure
from moe_tools.comparison import build_salt
from moe_tools.replay import Load, ReplayResult

from moe_lab.experts.group import RunningGroup
from moe_lab.experts.waves import WaveSettings, Window, run_wave

WARM_UP_S = 8.0
LOOK_EVERY_S = 0.5
MOVE_TIMEOUT_S = 60.0
# Numbers of waves that no pair reaches: other prompts than those of the pairs.
_UNCOUNTED = 1 << 18
_WAVES_A_PAIR = 1 << 8

Say = Callable[[str], None]
Wave = Callable[[int], Awaitable[ReplayResult]]
"""Serves one wave; equal numbers have equal prompts."""


class Start(StrEnum):
    """Where the experts are at first."""

    INITIAL = "initial"
    CROWDED = "crowded"


class Origin(StrEnum):
    """Where B comes from; the words of the report."""

    KEPT = "active moved there and stayed there"
    ROLLED_BACK = "active moved there and rolled it back"
    PLANNED = "active did not move; what `moeserving experts plan` would do"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertServingEffort:
    """How much.

    Attributes:
        pairs: windows of each placement.
        window_s: seconds of a window, about: it has whole waves.
        active_s: seconds in the mode active; 0 leaves it out.
        start: where the experts are at first.
        seed: of the prompts.
    """

    pairs: int
    window_s: float
    active_s: float
    start: Start
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedDecision:
    """A decision in the mode active, and when it was first seen."""

    at_s: float
    decision: Decision


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetPlacement:
    """Placement B with its origin, and what the decision's gate said where it was planned."""

    slots: Slots
    origin: Origin
    gate: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowPair:
    """A window of A and one of B, with the same prompts."""

    first: Window
    second: Window


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertServingResult:
    """All that was measured.

    Attributes:
        start: A's slots.
        target: B; None where the decision finds nothing better.
        decisions: of the mode active, the oldest first.
        pairs: none without a B.
        document: what the group says at the end of the mode active.
    """

    start: Slots
    target: TargetPlacement | None
    decisions: tuple[TimedDecision, ...]
    pairs: tuple[WindowPair, ...]
    document: ExpertsState


async def measure(
    group: RunningGroup, load: Load, settings: WaveSettings, effort: ExpertServingEffort, say: Say
) -> ExpertServingResult:
    """Everything, in order.

    Raises:
        Failure: the group does not answer, does not move, or serves nothing.
    """
    wave = _make_wave(load, settings, effort.seed)
    say(f"warming up: waves of {settings.users} requests")
    wave_s = await warm_up(wave)
    if effort.start is Start.CROWDED:
        document = await group.look()
        say("the hottest experts of each layer go to the first rank")
        await move(group, crowd(document), wave)
    start = _slots(await group.look())
    decisions: tuple[TimedDecision, ...] = ()
    if effort.active_s:
        decisions = await watch_active(group, wave, effort.active_s, say)
    document = await group.look()
    target = await choose_target(group, start, decisions, document)
    if target is None:
        return ExpertServingResult(start=start, target=None, decisions=decisions, pairs=(), document=document)
    say(f"B: {target.origin.value}")
    waves = max(1, round(effort.window_s / wave_s))
    pairs = await measure_pairs(group, wave, (start, target.slots), effort.pairs, waves, say)
    return ExpertServingResult(start=start, target=target, decisions=decisions, pairs=pairs, document=document)


def _make_wave(load: Load, settings: WaveSettings, seed: int) -> Wave:
    async def wave(number: int) -> ReplayResult:
        run = await run_wave(load, settings, build_salt(seed, number, 0))
        if not run.answered:
            first = run.failed[0]
            raise Failure(f"no request of a wave was answered; the first: {first.kind} {first.detail}".rstrip())
        return run

    return wave


async def warm_up(wave: Wave) -> float:
    """Waves for some seconds; how long the last one took: an engine's first steps are slower than all others."""
    begun_s, number = time.monotonic(), 0
    while True:
        run = await wave(_UNCOUNTED + number)
        number += 1
        if time.monotonic() - begun_s >= WARM_UP_S:
            return run.wall_s


def crowd(document: ExpertsState) -> Slots:
    """The hottest experts of each layer on the first rank, the coldest on the last: the worst start without copies.

    Raises:
        Failure: no load was recorded.
    """
    if document.load.tokens is None or document.load.steps < 1:
        raise Failure("no load was recorded in the warm-up")
    tokens = np.asarray(document.load.tokens).sum(axis=0)
    rows = []
    for layer in tokens:
        shares = np.array_split(np.argsort(-layer, kind="stable"), document.ranks)
        # Spare slots hold copies that evict nobody's load: of a rank's own coldest expert.
        filled = [[*share, *([share[-1]] * (document.slots_per_rank - len(share)))] for share in shares]
        rows.append(tuple(int(expert) for rank in filled for expert in rank))
    return tuple(rows)


async def move(group: RunningGroup, slots: Slots, wave: Wave) -> bool:
    """Moves under load (an idle engine makes no steps) and returns after a wave at least; whether it had to move.

    Raises:
        Failure: it has not moved within the time.
    """
    if changes := _slots(await group.look()) != slots:
        await group.apply(slots)
    give_up_s, number = time.monotonic() + MOVE_TIMEOUT_S, 0
    while True:
        await wave(_UNCOUNTED - 1 - number)
        number += 1
        document = await group.look()
        if _slots(document) == slots:
            return changes
        if time.monotonic() > give_up_s:
            newest = document.newest
            last = "" if newest is None else f"; its last decision: {newest.outcome} {newest.reason}"
            raise Failure(f"the group has not moved within {MOVE_TIMEOUT_S:.0f} s{last}")


async def watch_active(group: RunningGroup, wave: Wave, seconds: float, say: Say) -> tuple[TimedDecision, ...]:
    """The mode active for some seconds under load, then observe; returns the decisions."""
    known = await group.look()
    before = known.newest.number if known.newest else 0
    say(f"mode active for {seconds:.0f} s")
    await group.set(["scheduling.expert.mode=active"])
    log = DecisionLog(after=before)
    ended = asyncio.Event()

    async def serve() -> None:
        number = 2 * _UNCOUNTED
        while not ended.is_set():
            await wave(number)
            number += 1

    async def leave() -> None:
        await asyncio.sleep(seconds)
        await group.set(["scheduling.expert.mode=observe"])
        ended.set()

    async def look() -> None:
        begun_s = time.monotonic()
        while True:
            # The look after the end, too: nothing decided in the mode active is missed.
            last = ended.is_set()
            for row in log.note(time.monotonic() - begun_s, await group.look()):
                say(f"  decision {row.number}: {row.outcome}: {row.reason}")
            if last:
                return
            await asyncio.sleep(LOOK_EVERY_S)

    await asyncio.gather(serve(), leave(), look())
    return log.rows


class DecisionLog:
    """Decisions as they are seen: a later look brings a measured gain, and no longer the placement."""

    def __init__(self, after: int) -> None:
        self._after = after
        self._rows: dict[int, TimedDecision] = {}

    @property
    def rows(self) -> tuple[TimedDecision, ...]:
        """All decisions noted so far, the oldest first."""
        return tuple(self._rows[number] for number in sorted(self._rows))

    def note(self, at_s: float, document: ExpertsState) -> list[Decision]:
        """Takes a look into account; the decisions that are new in it, the oldest first."""
        found = []
        for row in sorted(document.decisions, key=lambda row: row.number):
            known = self._rows.get(row.number)
            if row.number > self._after and known is None:
                found.append(row)
                self._rows[row.number] = TimedDecision(at_s=at_s, decision=row)
            elif known is not None:
                slots = row.physical_to_logical or known.decision.physical_to_logical
                decision = row.model_copy(update={"physical_to_logical": slots})
                self._rows[row.number] = TimedDecision(at_s=known.at_s, decision=decision)
        return found


async def choose_target(
    group: RunningGroup, start: Slots, decisions: Sequence[TimedDecision], document: ExpertsState
) -> TargetPlacement | None:
    """Returns placement B; None where the decision finds nothing better than A."""
    now = _slots(document)
    if now != start:
        return TargetPlacement(slots=now, origin=Origin.KEPT)
    moved = [row.decision for row in decisions if row.decision.outcome == "moved"]
    promising = sorted(moved, key=lambda row: row.predicted_gain_s or 0.0, reverse=True)
    tried = [row.physical_to_logical for row in promising if row.physical_to_logical not in (None, start)]
    if tried and tried[0] is not None:
        return TargetPlacement(slots=tried[0], origin=Origin.ROLLED_BACK)
    planned = plan_document(document, await group.read_settings())
    slots = tuple(tuple(int(expert) for expert in row) for row in planned.candidate.physical_to_logical)
    if slots == start:
        return None
    return TargetPlacement(slots=slots, origin=Origin.PLANNED, gate=str(decision_document(planned, 0.0)["gate"]))


async def measure_pairs(
    group: RunningGroup, wave: Wave, placements: tuple[Slots, Slots], pairs: int, waves: int, say: Say
) -> tuple[WindowPair, ...]:
    """A B, B A and so on, `waves` a window."""
    found = []
    for number in range(pairs):
        windows: dict[int, Window] = {}
        for side in (0, 1) if number % 2 == 0 else (1, 0):
            moved = await move(group, placements[side], wave)
            window = await measure_window(group, wave, number * _WAVES_A_PAIR, waves, moved=moved)
            windows[side] = window
            say(
                f"pair {number + 1} of {pairs}: {'AB'[side]}, {waves} waves in {window.wall_s:.1f} s, "
                f"{window.steps} steps, balance {window.balance:.3f}"
            )
        found.append(WindowPair(first=windows[0], second=windows[1]))
    return tuple(found)


async def measure_window(group: RunningGroup, wave: Wave, first: int, waves: int, *, moved: bool) -> Window:
    """Waves number `first` and on, one after the other; `moved`: just before, so that the engine measures a gain."""
    steps = await group.read_steps()
    runs = [await wave(first + number) for number in range(waves)]
    steps = await group.read_steps() - steps
    document = await group.look()
    recorded, newest = document.recorded, document.newest
    return Window(
        waves=tuple(runs),
        steps=steps,
        balance=recorded.mean if recorded else 1.0,
        by_rank=recorded.by_rank if recorded else (),
        engine_gain_s=newest.measured_gain_s if moved and newest else None,
    )


def _slots(document: ExpertsState) -> Slots:
    slots = document.placement.physical_to_logical
    if slots is None:
        raise Failure("the agent does not say where the experts are")
    return slots
