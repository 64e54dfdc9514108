"""`control.record`: the settings in force, written by the agent and read by every rank before each decision."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from moe_scheduling.expert.decision import ExpertSettings
from moe_scheduling.request.order import RequestSettings

from moe_agent.shared_memory.layout import Layout
from moe_agent.shared_memory.rank_record import RankRecords
from moe_agent.shared_memory.seqlock import RecordReader, RecordWriter

_POLL_S = 0.005


@dataclass(frozen=True, slots=True, kw_only=True)
class Control:
    """The settings in force and their version, which rises by one at each change and starts at 1.

    Attributes:
        version: version of all fields together.
        request: order of the waiting queue.
        expert: recording and placement of experts; without effect where there is no expert group.
        directive: version of the newest directive about experts; 0 before the first.
    """

    version: int
    request: RequestSettings
    expert: ExpertSettings = field(default_factory=ExpertSettings)
    directive: int = 0


LAYOUT = Layout(Control)


def control_record_path(run_dir: Path) -> Path:
    """The file of the settings in force."""
    return run_dir / "control.record"


class ControlRecordWriter(RecordWriter[Control]):
    """Writes the settings in force; opened by the agent."""

    def __init__(self, run_dir: Path, first: Control) -> None:
        super().__init__(control_record_path(run_dir), LAYOUT, first)


class ControlRecordReader(RecordReader[Control]):
    """Reads the settings in a rank's scheduler or worker; a read within an engine step does not wait."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__(control_record_path(run_dir), LAYOUT)


@dataclass(frozen=True, slots=True)
class NotTaken:
    """Ranks that did not take new settings in time; each takes them at its next step."""

    ranks: tuple[int, ...]


class SettingsPublisher:
    """Owns the settings in force; they outlive the engine, not the agent.

    Args:
        run_dir: folder of the records.
        request: order of the waiting queue at the start.
        expert: recording and placement of experts at the start.
        ranks: the records of the ranks, which say what each has taken.
        on_change: called after each change.
    """

    def __init__(
        self,
        run_dir: Path,
        request: RequestSettings,
        expert: ExpertSettings,
        ranks: RankRecords,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self._control = Control(version=1, request=request, expert=expert)
        self._writer = ControlRecordWriter(run_dir, self._control)
        self._ranks, self._on_change = ranks, on_change
        self._one_at_a_time = asyncio.Lock()

    @property
    def control(self) -> Control:
        """The settings in force and their version."""
        return self._control

    async def apply(self, request: RequestSettings, expert: ExpertSettings, timeout_s: float) -> Control | NotTaken:
        """Puts settings in force and waits until every rank has taken them."""
        async with self._one_at_a_time:
            if (request, expert) != (self._control.request, self._control.expert):
                self._put(request=request, expert=expert)
            deadline_s = time.monotonic() + timeout_s
            while behind := self._ranks_behind():
                if time.monotonic() > deadline_s:
                    return NotTaken(behind)
                await asyncio.sleep(_POLL_S)
            return self._control

    def announce_directive(self, version: int) -> None:
        """Lets the first rank of the expert group know that directive `version` lies in its file."""
        self._put(directive=version)

    def _put(self, **changed: Any) -> None:
        self._control = replace(self._control, version=self._control.version + 1, **changed)
        self._writer.write(self._control)
        self._on_change()

    def _ranks_behind(self) -> tuple[int, ...]:
        """An idle rank makes no step, but reads the control record before its next decision, so it counts as done."""
        return tuple(
            rank
            for rank, state in self._ranks.read().items()
            if state.config_version < self._control.version and not state.idle
        )
