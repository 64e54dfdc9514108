"""Gimbal's order inside an engine (SJFS, arXiv 2602.21626), reconstructed: a rival, for measurements alone.

The shortest prompt first; a request that has waited for more than 5 s (theta_age) goes before all others, the oldest
first. The paper does not say whether it promotes to the front or adds a bonus; its summaries describe a threshold.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from heapq import heappop, heappush
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.request import Request

from moe_tools.simulator.queue_by_id import QueueById

AGE_S = 5.0


class GimbalQueue(QueueById[Request]):
    """Orders by prompt length, but serves requests older than `AGE_S` first, the oldest before the others.

    Removed requests leave the two orders when they reach the front.
    """

    def __init__(self, scheduler: "GimbalScheduler") -> None:
        super().__init__()
        self._scheduler = scheduler
        self._by_length: list[tuple[int, float, str]] = []
        self._by_age: deque[str] = deque()

    def add_request(self, request: Request) -> None:
        self._push(request)
        self._by_age.append(request.request_id)

    def prepend_request(self, request: Request) -> None:
        """Puts back a preempted request, which has waited before, so it is among the oldest."""
        self._push(request)
        self._by_age.appendleft(request.request_id)

    def prepend_requests(self, requests: Iterable[Request]) -> None:
        for request in requests:
            self.prepend_request(request)

    def _push(self, request: Request) -> None:
        self._waiting[request.request_id] = request
        heappush(self._by_length, (request.num_prompt_tokens, request.arrival_time, request.request_id))

    def peek_request(self) -> Request:
        waiting = self._waiting
        while self._by_age and self._by_age[0] not in waiting:
            self._by_age.popleft()
        if not self._by_age:
            raise IndexError("nothing waits")
        oldest = waiting[self._by_age[0]]
        if self._scheduler.clock() - oldest.arrival_time > AGE_S:
            return oldest
        while self._by_length[0][2] not in waiting:
            heappop(self._by_length)
        return waiting[self._by_length[0][2]]

    def __iter__(self) -> Iterator[Request]:
        return iter(sorted(self._waiting.values(), key=lambda request: request.num_prompt_tokens))


class GimbalScheduler(AsyncScheduler):
    """vLLM's scheduler with a `GimbalQueue`; the simulator sets its clock."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.clock: Callable[[], float] = time.monotonic
        self.waiting = GimbalQueue(self)
