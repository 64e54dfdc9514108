"""The agent's side of the pages: what the ranks last said, and the settings they are to work by.

Used by the HTTP server of `moe_agent.api.server` and by the supervisor, which calls `forget` whenever no engine lives.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moe_scheduling.expert.decision import ExpertSettings
from moe_scheduling.request.order import RequestSettings

from moe_agent.shared_memory.records import (
    Control,
    ControlPageWriter,
    PageUnreadableError,
    RankPageReader,
    RankState,
    expert_page_path,
    rank_page_path,
)

_POLL_S = 0.005


class RankPages:
    """Readers of the pages of this node's ranks; one that has published nothing yet is left out of every answer."""

    def __init__(self, run_dir: Path, ranks: range) -> None:
        self._run_dir, self._ranks = run_dir, ranks
        self._readers: dict[int, RankPageReader] = {}

    def forget(self) -> None:
        """Removes the pages: their writers are gone, and what they say is no longer so."""
        for reader in self._readers.values():
            reader.close()
        self._readers.clear()
        for rank in self._ranks:
            rank_page_path(self._run_dir, rank).unlink(missing_ok=True)
            expert_page_path(self._run_dir, rank).unlink(missing_ok=True)

    def fingerprint(self) -> tuple[int, ...]:
        """Differs when any page was written since."""
        return tuple(reader.sequence() if (reader := self._reader(rank)) else 0 for rank in self._ranks)

    def read(self) -> dict[int, RankState]:
        """The last state of each rank."""
        states = {}
        for rank in self._ranks:
            if (reader := self._reader(rank)) is not None:
                try:
                    states[rank] = reader.read()
                except PageUnreadableError:
                    continue
        return states

    def _reader(self, rank: int) -> RankPageReader | None:
        if rank not in self._readers:
            try:
                self._readers[rank] = RankPageReader(self._run_dir, rank)
            except PageUnreadableError:
                return None
        return self._readers[rank]


@dataclass(frozen=True, slots=True)
class NotTaken:
    """Ranks that did not take a configuration in time; each does at its next step."""

    ranks: tuple[int, ...]


class ControlPage:
    """Owner of the settings in force; they outlive the engine, not the agent. `on_change` is called after a change."""

    def __init__(
        self,
        run_dir: Path,
        request: RequestSettings,
        expert: ExpertSettings,
        ranks: RankPages,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self._control = Control(version=1, request=request, expert=expert)
        self._writer = ControlPageWriter(run_dir, self._control)
        self._ranks, self._on_change = ranks, on_change
        self._one_at_a_time = asyncio.Lock()

    @property
    def control(self) -> Control:
        return self._control

    async def apply(self, request: RequestSettings, expert: ExpertSettings, timeout_s: float) -> Control | NotTaken:
        """Puts settings in force and waits until every rank has taken them."""
        async with self._one_at_a_time:
            if (request, expert) != (self._control.request, self._control.expert):
                self._put(request=request, expert=expert)
            deadline_s = time.monotonic() + timeout_s
            while late := self._late_ranks():
                if time.monotonic() > deadline_s:
                    return NotTaken(late)
                await asyncio.sleep(_POLL_S)
            return self._control

    def announce_directive(self, version: int) -> None:
        """Tells the first rank of the expert group that directive `version` lies in its file."""
        self._put(directive=version)

    def _put(self, **changed: Any) -> None:
        self._control = replace(self._control, version=self._control.version + 1, **changed)
        self._writer.write(self._control)
        self._on_change()

    def _late_ranks(self) -> tuple[int, ...]:
        """An idle rank makes no step, but it reads the control page before its next decision, so it has taken it."""
        return tuple(
            rank
            for rank, state in self._ranks.read().items()
            if state.config_version < self._control.version and not state.idle
        )
