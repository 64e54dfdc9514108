"""Publishes which step of its lockstep group this rank begins, at the beginning of each turn of its core's loop.

Installed by the scheduler of a rank whose group steps together. vLLM's scheduler is not asked in a turn in which the
rank has no request and makes a dummy pass for the others, so the core's loop is where the turns are seen
(`EngineCoreProc._process_engine_step` of vLLM 0.32 and 0.33). `current_wave` and `step_counter` are equal on all ranks.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moe_agent.shared_memory.turn_record import TurnRecordWriter, TurnState
from moe_agent.vllm.prefill_group import WAVE_TURNS


class TurnPublisher:
    """The record of one rank; writes where the turn is another than before.

    Args:
        run_dir: folder of the record.
        rank: number of this rank.
        clock: the monotonic clock of the machine.
    """

    def __init__(self, run_dir: Path, rank: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._turn = clock, -1
        self._record = TurnRecordWriter(run_dir, rank, TurnState(self._turn, clock()))

    def enter(self, turn: int) -> None:
        """The rank begins this step."""
        if turn != self._turn:
            self._turn = turn
            self._record.write(TurnState(turn, self._clock()))


def publish_turns(core_class: Any) -> None:
    """Makes the cores of this class publish their turns; a second call for a class changes nothing."""
    if not hasattr(core_class._process_engine_step, "published_by"):
        core_class._process_engine_step = _publishing(core_class._process_engine_step)


def _publishing(process_engine_step: Any) -> Any:
    def publish_then_step(core: Any) -> Any:
        turns = getattr(core.scheduler, "turns", None)
        if turns is not None:
            turns.enter(getattr(core, "current_wave", 0) * WAVE_TURNS + getattr(core, "step_counter", 0))
        return process_engine_step(core)

    publish_then_step.published_by = publish_turns  # type: ignore[attr-defined]
    return publish_then_step
