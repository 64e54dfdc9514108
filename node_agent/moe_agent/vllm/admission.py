"""Ends the admission of a step at the first waiting prompt that the plan grants no token.

vLLM 0.32 ends its loop over waiting requests there itself. 0.33 puts the request aside and tries the next one, so that
requests which came much later would overtake it, at the cost of one look at each of them in each step. From the first
such request on a step may run no more requests, which ends the loop of either version.

Invariants: the limit is as before once a step is scheduled, also where that fails; a request that was left out counts
as waiting, and not as one that vLLM skipped.
"""

from collections.abc import Callable
from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import Request, RequestStatus


class AdmissionStop:
    """The limit of running requests of a scheduler while it schedules one step.

    Args:
        scheduler: a vLLM scheduler.
    """

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._left_out: Request | None = None
        self._limit = 0

    def schedule(self, schedule: Callable[[], SchedulerOutput]) -> SchedulerOutput:
        """Schedules one step, and opens the admission again for the next."""
        try:
            return schedule()
        finally:
            if self._left_out is not None:
                self._open(self._left_out)

    def leave_out(self, request: Request) -> None:
        """Notes that a request is granted nothing in this step; one that waits is the last one that is looked at."""
        if request.status is RequestStatus.RUNNING or self._left_out is not None:
            return
        scheduler = self._scheduler
        self._left_out, self._limit = request, scheduler.max_num_active_reqs
        scheduler.max_num_active_reqs = 0

    def _open(self, left_out: Request) -> None:
        scheduler = self._scheduler
        scheduler.max_num_active_reqs, self._left_out = self._limit, None
        # Where vLLM skipped the request it counted it out of those that a step could not admit.
        scheduler.deferred_waiting.discard(left_out)
        scheduler.prefill_capacity_bound = True
