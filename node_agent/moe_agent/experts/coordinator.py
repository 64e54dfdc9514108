"""The coordinator of an expert group: its first rank around the controller, with files, a clock and one thread.

Made by the worker of that rank and called in each sync round, between two steps of the engine. A decision, the
publication and the count of the affinity run in the thread: a step never waits for them. What a round itself costs is
in docs/experts.md.
"""

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from zlib import crc32

import numpy as np
from moe_contract.input_errors import InvalidInput

from moe_agent.experts.controller import Controller
from moe_agent.experts.directive import GroupShape, read_directive
from moe_agent.experts.document import Publication, take_publication, write_document
from moe_agent.experts.load import AFFINITY_PASSES, Affinity, Counts, Slots
from moe_agent.experts.planning import Decide, MeasuredCosts, ThreadedPlanner
from moe_agent.experts.sync_round import SyncRound
from moe_agent.shared_memory.control_record import ControlRecordReader
from moe_agent.shared_memory.seqlock import RecordUnreadableError

log = logging.getLogger(__name__)

# Seconds between two publications without an event: at least the first after a gather, the second without one.
PUBLISH_LOAD_S, PUBLISH_IDLE_S = 1.0, 30.0
# Part of the time that publications without an event may take.
_PUBLISH_PART = 1 / 5000


class Coordinator:
    """The first rank of an expert group.

    Args:
        run_dir: the agent's run folder.
        shape: sizes of the group.
        placement: [layer, slot] at the start.
        costs: estimated costs at the start.
        decide: the decision.
        sharing: consecutive ranks that count the same tokens.
    """

    def __init__(
        self,
        run_dir: Path,
        shape: GroupShape,
        placement: Slots,
        costs: MeasuredCosts,
        decide: Decide,
        sharing: int = 1,
    ) -> None:
        self._run_dir = run_dir
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="experts")
        planner = ThreadedPlanner(decide, self._thread)
        self.controller = Controller(shape, placement, costs, planner, checksum, sharing)
        self._control = ControlRecordReader(run_dir)
        self._sequence = 0
        self._affinity: Affinity | None = None
        self._passes_to_count = 0
        self._published_s = 0.0
        self._published: tuple[int, object] = (-1, None)
        self._published_load = 0
        self._publication: Future[None] | None = None
        self._pause_s = PUBLISH_LOAD_S
        self._take_control(self.controller.pending.skip)
        # There before the engine is ready.
        self._publish()
        if self._publication is not None:
            self._publication.result()

    def sync_round(self, step: int) -> SyncRound:
        """Returns what all ranks do now."""
        self._take_control(self._take_directive)
        content = self.controller.sync_round(step, time.monotonic())
        self._begin_affinity()
        self._publish()
        return content

    def _take_control(self, take_directive: Callable[[int], None]) -> None:
        if (sequence := self._control.sequence()) == self._sequence:
            return
        try:
            control = self._control.read()
        except RecordUnreadableError:
            return
        self._sequence = sequence
        self.controller.configure(control.version, control.expert)
        take_directive(control.directive)

    def _take_directive(self, version: int) -> None:
        if version == self.controller.pending.received:
            return
        try:
            self.controller.direct(read_directive(self._run_dir, self.controller.shape))
        except InvalidInput as error:
            log.error("directive %d about experts is not followed: %s", version, error)
            self.controller.refuse(version, str(error))

    # Affinity, on request.

    @property
    def wants_routing(self) -> bool:
        """Whether the routing of the next pass is to be handed to `add_routing`."""
        return self._passes_to_count > 0

    def _begin_affinity(self) -> None:
        version = self.controller.affinity_version
        if version and (self._affinity is None or self._affinity.version != version):
            shape = self.controller.shape
            self._affinity = Affinity(shape.layers, shape.experts, version)
            self.controller.affinity = self._affinity.summarise()
            self._passes_to_count = AFFINITY_PASSES

    def add_routing(self, read: Callable[[], Counts]) -> None:
        """Counts a pass in the thread; `read` returns its routing [layer, token, place]."""
        assert self._affinity is not None
        self._passes_to_count -= 1
        self._thread.submit(self._count_affinity, self._affinity, read)

    def _count_affinity(self, affinity: Affinity, read: Callable[[], Counts]) -> None:
        affinity.add(read())
        if affinity.is_due:
            self.controller.affinity = affinity.summarise()

    # Publication.

    def _publish(self) -> None:
        """Publishes after an event, and from time to time a newer load; one publication at a time."""
        if self._publication is not None and not self._publication.done():
            return
        now_s, state = time.monotonic(), (self.controller.revision, self.controller.affinity)
        load = self.controller.gathered_at
        pause_s = PUBLISH_IDLE_S if load == self._published_load else self._pause_s
        if state == self._published and now_s - self._published_s < pause_s:
            return
        self._published_s, self._published, self._published_load = now_s, state, load
        self._publication = self._thread.submit(self._write, take_publication(self.controller, now_s))

    def _write(self, publication: Publication) -> None:
        begun_s = time.thread_time()
        write_document(self._run_dir, publication)
        self._pause_s = max(PUBLISH_LOAD_S, (time.thread_time() - begun_s) / _PUBLISH_PART)


def checksum(placement: Slots) -> int:
    """Returns a checksum, equal for equal placements."""
    return crc32(np.ascontiguousarray(placement, np.int64).tobytes())
