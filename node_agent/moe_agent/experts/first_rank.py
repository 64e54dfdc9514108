"""The first rank of an expert group, around its controller: reads what the agent wrote, has decisions made, publishes.

Made by the worker of that rank and called by it at each beat, between two steps of the engine: what takes long (a
decision, the text of the document) is done by one thread aside.
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
from moe_agent.experts.directive import GroupShape, read_directive, replace_file
from moe_agent.experts.document import Document, build_document, render_document
from moe_agent.experts.planning import Answer, Costs, Question, Slots
from moe_agent.experts.protocol import Beat
from moe_agent.experts.published import experts_path
from moe_agent.shared_memory.control_record import ControlRecordReader
from moe_agent.shared_memory.seqlock import RecordUnreadableError

log = logging.getLogger(__name__)

# Least time between two publications of nothing but newer figures.
PUBLISH_EVERY_S = 1.0

Decide = Callable[[Question], Answer]


class ThreadedPlanner:
    """Asks `decide` in the thread."""

    def __init__(self, decide: Decide, thread: ThreadPoolExecutor) -> None:
        self._decide, self._thread = decide, thread
        self._future: Future[Answer] | None = None

    def ask(self, question: Question) -> None:
        self._future = self._thread.submit(self._decide, question)

    def poll(self) -> Answer | Exception | None:
        future = self._future
        if future is None or not future.done():
            return None
        self._future = None
        try:
            return future.result()
        except Exception as error:
            log.exception("the decision about experts failed")
            return error


class FirstRank:
    """See the module.

    Args:
        run_dir: the agent's run folder.
        shape: of the group.
        placement: `[layer, slot]` at the start.
        costs: at the start.
        decide: the decision.
        sharing: ranks in a row that count the same tokens.
    """

    def __init__(
        self,
        run_dir: Path,
        shape: GroupShape,
        placement: Slots,
        costs: Costs,
        decide: Decide,
        sharing: int = 1,
    ) -> None:
        self._run_dir = run_dir
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="experts")
        planner = ThreadedPlanner(decide, self._thread)
        self.controller = Controller(shape, placement, costs, planner, checksum, sharing)
        self._control = ControlRecordReader(run_dir)
        self._sequence = 0
        self._published_s, self._published_revision = 0.0, -1
        self._publication: Future[None] | None = None
        self._pause_s = PUBLISH_EVERY_S
        self._take_control(self.controller.inbox.skip)
        # There before the engine is ready.
        self._publish()
        if self._publication is not None:
            self._publication.result()

    def beat(self, step: int) -> Beat:
        """What all ranks do now."""
        self._take_control(self._take_directive)
        beat = self.controller.beat(step, time.monotonic())
        self._publish()
        return beat

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
        if version == self.controller.inbox.heard:
            return
        try:
            self.controller.direct(read_directive(self._run_dir, self.controller.shape))
        except InvalidInput as error:
            log.error("directive %d about experts is not followed: %s", version, error)
            self.controller.refuse(version, str(error))

    def _publish(self) -> None:
        """When something happened, or the figures are old; one text at a time."""
        if self._publication is not None and not self._publication.done():
            return
        now_s, revision = time.monotonic(), self.controller.revision
        if revision == self._published_revision and now_s - self._published_s < self._pause_s:
            return
        self._published_s, self._published_revision = now_s, revision
        self._publication = self._thread.submit(self._write, build_document(self.controller, now_s))

    def _write(self, document: Document) -> None:
        begun_s = time.monotonic()
        replace_file(experts_path(self._run_dir), render_document(document))
        # The text of a large model may take the interpreter from the engine for a small part of the time alone.
        self._pause_s = max(PUBLISH_EVERY_S, 50.0 * (time.monotonic() - begun_s))


def checksum(placement: Slots) -> int:
    """Equal for equal placements."""
    return crc32(np.ascontiguousarray(placement, np.int64).tobytes())
