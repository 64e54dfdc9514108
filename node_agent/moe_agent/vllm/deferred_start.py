"""Lets an engine core wait with the scheduling of a step while one runs; what comes meanwhile is in that step.

Set in place by the scheduler, in the process of the engine core, where vLLM schedules asynchronously. How long is the
scheduler's decision (`moe_scheduling.request.deferred_scheduling`); here is the wait alone. In each turn of its loop a
core of vLLM 0.32 takes
in what has come (`EngineCoreProc._process_input_queue`), then schedules: the wait comes between the two.

A rank with no batch on its way, in a group that runs, would enter the next dummy pass at once and be stuck in it until
the others have scheduled: it waits for the first of them. For the others too the first that schedules ends the wait.

Invariants: nothing waits while two batches are on their way, or none in a group that does not run; all that has come
when the wait ends is taken in; a batch that is seen to have ended ends the wait.
"""

import queue
from typing import Any, Protocol

from moe_agent.vllm.prefill_group import WAVE_TURNS

# Between two looks whether the batch has ended. Where it is seen to have, the device idles for so long at most, and for
# what scheduling and launching take.
_LOOK_S = 0.001
# CUDA events at the end of a batch, as the two model runners of vLLM 0.32 call them.
EVENTS = ("async_copy_ready_event", "copy_event")


class _LateScheduler(Protocol):
    turn: int

    def late_s(self) -> float:
        """Seconds that the next step may still wait."""

    def others_scheduled(self) -> bool:
        """Whether another rank of the group has scheduled its part of it."""

    def waited(self, *, has_ended: bool) -> None:
        """The wait is over, because the step that ran has ended or because it soon will."""


def start_late(core_class: Any) -> None:
    """Makes the cores of this class wait; once for a class."""
    if not hasattr(core_class._process_input_queue, "waits_for"):
        core_class._process_input_queue = _waiting(core_class._process_input_queue)


def _waiting(process_input_queue: Any) -> Any:
    def process_then_wait(core: Any) -> None:
        process_input_queue(core)
        if core.batch_queue is None or not hasattr(core.scheduler, "late_s"):
            return
        core.scheduler.turn = getattr(core, "current_wave", 0) * WAVE_TURNS + getattr(core, "step_counter", 0)
        if len(core.batch_queue) == 1 or (core.engines_running and not core.batch_queue):
            wait(core, core.scheduler)

    process_then_wait.waits_for = process_input_queue  # type: ignore[attr-defined]
    return process_then_wait


def wait(core: Any, scheduler: _LateScheduler) -> None:
    """Until it is time to schedule, taking in what comes."""
    future = core.batch_queue[-1][0] if core.batch_queue else None
    ended, waits = future is not None and has_ended(future), False
    while not ended and (left_s := scheduler.late_s()) > 0.0 and not scheduler.others_scheduled() and core.is_running():
        waits = True
        _take_in(core, min(left_s, _LOOK_S))
        ended = future is not None and has_ended(future)
    if waits:
        while _take_in(core, 0.0):
            pass
        if future is not None:
            scheduler.waited(has_ended=ended)


def _take_in(core: Any, patience_s: float) -> bool:
    try:
        request = core.input_queue.get(block=patience_s > 0.0, timeout=patience_s)
    except queue.Empty:
        return False
    core._handle_client_request(*request)
    return True


def has_ended(future: Any) -> bool:
    """Whether a batch is known to have ended.

    vLLM's futures find that out when asked for the result, which blocks; on a GPU the event behind it tells. Where
    nothing tells, the prediction alone decides.
    """
    output = getattr(future, "async_output", None)
    events = [getattr(output, name) for name in EVENTS if hasattr(output, name)]
    return bool(future.done() or any(event.query() for event in events))
