"""Lets an engine core defer the scheduling of the next step while one runs, so that new requests join that step.

Installed by the scheduler, in the process of the engine core, where vLLM schedules asynchronously. The scheduler says
how long to wait (`moe_scheduling.request.deferred_scheduling`); this module waits. In each turn of its loop a core of
vLLM 0.32 first takes in new requests (`EngineCoreProc._process_input_queue`), then schedules: the wait comes between.

A rank with no batch in flight, in a group that runs, would enter the next dummy pass at once and be stuck in it until
the others have scheduled. As soon as one rank schedules its part of the next step, all other ranks stop deferring
theirs.

Invariants: nothing waits while two batches are in flight, or none in a group that does not run; all requests that have
come by the end of the wait are taken in; a batch that is seen to have ended ends the wait.
"""

import queue
from typing import Any, Protocol

from moe_agent.vllm.prefill_group import WAVE_TURNS

# Between two checks whether the batch has ended: the device idles for this long at most, plus the time that scheduling
# and launching take.
_CHECK_INTERVAL_S = 0.001
# CUDA events at the end of a batch, as the two model runners of vLLM 0.32 call them.
EVENTS = ("async_copy_ready_event", "copy_event")


class _DeferringScheduler(Protocol):
    """The scheduler as this module calls it."""

    turn: int

    def defer_s(self) -> float:
        """Seconds by which the next step may still be deferred."""

    def others_scheduled(self) -> bool:
        """Whether another rank of the group has scheduled its part of the next step."""

    def waited(self, *, has_ended: bool) -> None:
        """Called after the wait: the step that runs has ended, or it soon will."""


def defer_steps(core_class: Any) -> None:
    """Makes the cores of this class defer their steps; a second call for a class changes nothing."""
    if not hasattr(core_class._process_input_queue, "deferred_by"):
        core_class._process_input_queue = _waiting(core_class._process_input_queue)


def _waiting(process_input_queue: Any) -> Any:
    def process_then_wait(core: Any) -> None:
        process_input_queue(core)
        if core.batch_queue is None or not hasattr(core.scheduler, "defer_s"):
            return
        core.scheduler.turn = getattr(core, "current_wave", 0) * WAVE_TURNS + getattr(core, "step_counter", 0)
        if len(core.batch_queue) == 1 or (core.engines_running and not core.batch_queue):
            wait(core, core.scheduler)

    process_then_wait.deferred_by = defer_steps  # type: ignore[attr-defined]
    return process_then_wait


def wait(core: Any, scheduler: _DeferringScheduler) -> None:
    """Waits until the next step is to be scheduled, and takes in the requests that come meanwhile."""
    future = core.batch_queue[-1][0] if core.batch_queue else None
    ended, waits = future is not None and has_ended(future), False
    while (
        not ended and (left_s := scheduler.defer_s()) > 0.0 and not scheduler.others_scheduled() and core.is_running()
    ):
        waits = True
        _take_in(core, min(left_s, _CHECK_INTERVAL_S))
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

    vLLM's futures find that out when asked for the result, which blocks; on a GPU the CUDA event behind it can be
    queried. Where neither is available, the prediction alone decides.
    """
    output = getattr(future, "async_output", None)
    events = [getattr(output, name) for name in EVENTS if hasattr(output, name)]
    return bool(future.done() or any(event.query() for event in events))
