"""SGLang's order `hrrn` inside vLLM's scheduler: a rival, for measurements alone.

Highest response ratio next (Brinch Hansen, 1971): the request with the largest (wait + service) / service first. SGLang
takes the uncached prompt tokens for the service, and falls back to the order of arrival where more than 128 requests
wait (its pull requests 32911 and 39717). With service in proportion to tokens the order is that of wait / tokens, so
that no speed has to be known.

Differs from SGLang: the uncached tokens are counted when a request comes into the queue, not before each step; and a
prompt that is computed in chunks goes on first, as in vLLM.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.request import Request

from moe_tools.simulator.queue_by_id import QueueById

MOST_RANKED = 128


class HrrnQueue(QueueById[tuple[Request, int]]):
    """Orders by wait over uncached tokens, the greatest first; by arrival where more than `MOST_RANKED` wait.

    A preempted or skipped request keeps its time of arrival.
    """

    def __init__(self, scheduler: "HrrnScheduler") -> None:
        super().__init__()
        self._scheduler = scheduler

    def add_request(self, request: Request) -> None:
        self._waiting[request.request_id] = request, max(1, self._scheduler.uncached_tokens(request))

    def prepend_request(self, request: Request) -> None:
        """Puts back a preempted request, which counts with the tokens that it has to compute again."""
        self.add_request(request)

    def prepend_requests(self, requests: Iterable[Request]) -> None:
        for request in requests:
            self.add_request(request)

    def peek_request(self) -> Request:
        if not self._waiting:
            raise IndexError("nothing waits")
        return min(self._waiting.values(), key=self._rank())[0]

    def _rank(self) -> Callable[[tuple[Request, int]], tuple[float, float, str]]:
        if len(self._waiting) > MOST_RANKED:
            return lambda entry: (0.0, entry[0].arrival_time, entry[0].request_id)
        now_s = self._scheduler.clock()
        return lambda entry: (
            (entry[0].arrival_time - now_s) / entry[1],
            entry[0].arrival_time,
            entry[0].request_id,
        )

    def __iter__(self) -> Iterator[Request]:
        return iter([request for request, _ in sorted(self._waiting.values(), key=self._rank())])


class HrrnScheduler(AsyncScheduler):
    """vLLM's scheduler with an `HrrnQueue`; the simulator sets its clock."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.clock: Callable[[], float] = time.monotonic
        self.waiting = HrrnQueue(self)

    def uncached_tokens(self, request: Request) -> int:
        """Returns the tokens of a request that are neither computed nor in the prefix cache."""
        if request.num_computed_tokens:
            return request.num_tokens - request.num_computed_tokens
        manager = self.kv_cache_manager
        if not manager.prefix_cache_lookup_enabled(request):
            return request.num_tokens
        _, cached, _ = manager.coordinator.find_longest_cache_hit(request.block_hashes, request.num_tokens - 1)
        return request.num_tokens - cached
