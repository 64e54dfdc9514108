"""vLLM's waiting queue in the order of layer 1: its `RequestQueue` over `WaitingQueue` of `moe_scheduling.request`.

Made and called by the scheduler alone. Under `fcfs` the order equals that of vLLM's own `FCFSRequestQueue`, under
`priority` that of its `PriorityRequestQueue`.

Invariants: a request that leaves the queue and comes back (skipped in a scheduling pass) takes its old place again. The
measured speed changes between two passes alone. A
preempted one keeps its arrival and counts with the tokens that it has to compute again; under `fcfs` it comes first.
The size of a request is measured when it is pushed; tokens that enter the prefix cache later are found when it is
scheduled. The tenant of a request is part of its id.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from weakref import WeakKeyDictionary

from moe_contract.tenancy import tenant_of
from moe_scheduling.request.order import RequestSettings
from moe_scheduling.request.waiting_queue import Waiting, WaitingQueue
from vllm.v1.core.sched.request_queue import RequestQueue
from vllm.v1.request import Request, RequestStatus


class OrderedRequestQueue(RequestQueue):
    """A vLLM request queue that delegates the order to `WaitingQueue`.

    Args:
        settings: policy and parameters of the order.
        measure: returns the uncached prefill tokens of a request, as of now.
    """

    def __init__(self, settings: RequestSettings, measure: Callable[[Request], int]) -> None:
        self._queue: WaitingQueue[Request] = WaitingQueue(settings)
        self._measure = measure
        self._last_arrival_s = -math.inf
        self._arrivals_s: WeakKeyDictionary[Request, tuple[float, float]] = WeakKeyDictionary()

    @property
    def prefill_tokens(self) -> int:
        """Uncached prefill tokens of all requests in the queue."""
        return self._queue.size_tokens

    def reorder(self, settings: RequestSettings) -> None:
        """Orders waiting and coming requests by `settings`."""
        self._queue.reorder(settings)

    def take_speed(self, tokens_per_s: float | None) -> None:
        """Orders by this measured prefill speed, in tokens a second; None: it is not known yet."""
        self._queue.take_speed(tokens_per_s)

    def in_order(self) -> Iterator[Waiting[Request]]:
        """Yields the waiting requests lazily in the order of service."""
        return self._queue.in_order()

    def key(self, request: Request, size_tokens: int) -> tuple[float, float]:
        """Returns the key that a request would have with `size_tokens` left to compute."""
        return self._queue.key(
            size_tokens=size_tokens,
            arrival_s=self._arrival_s(request),
            priority=request.priority,
            tenant=tenant_of(request.request_id),
        )

    def charge_prefill(self, tokens: Mapping[str, int]) -> None:
        """Charges the tenants of these requests for the prompt tokens that a step computes."""
        if self._queue.charges:
            for request_id, count in tokens.items():
                self._queue.charge(tenant_of(request_id), count)

    def charge_output(self, request: Request) -> None:
        """Charges the tenant of a request that has ended for its output tokens."""
        if self._queue.charges:
            weight = self._queue.settings.output_weight
            self._queue.charge(tenant_of(request.request_id), weight * request.num_output_tokens)

    # The rest is vLLM's interface.

    def add_request(self, request: Request) -> None:
        self._push(request)

    def prepend_request(self, request: Request) -> None:
        """Puts back a preempted request."""
        self._push(request)

    def prepend_requests(self, requests: Iterable[Request]) -> None:
        """Puts back requests that a scheduling pass took out and could not use, the last one first."""
        for request in requests:
            self._push(request)

    def pop_request(self) -> Request:
        return self._queue.pop()

    def peek_request(self) -> Request:
        return self._queue.peek()

    def remove_request(self, request: Request) -> None:
        self._queue.remove(request)

    def remove_requests(self, requests: Iterable[Request]) -> None:
        """Ignores requests that are not here: vLLM offers the same set to each of its queues."""
        for request in requests:
            self._queue.discard(request)

    def __bool__(self) -> bool:
        return bool(self._queue)

    def __len__(self) -> int:
        return len(self._queue)

    def __contains__(self, request: object) -> bool:
        return request in self._queue

    def __iter__(self) -> Iterator[Request]:
        return iter(self._queue)

    def _push(self, request: Request) -> None:
        self._queue.push(
            request,
            size_tokens=self._measure(request),
            arrival_s=self._arrival_s(request),
            priority=request.priority,
            front=request.status is RequestStatus.PREEMPTED,
            tenant=tenant_of(request.request_id),
        )

    def _arrival_s(self, request: Request) -> float:
        """Returns the request's time of arrival, moved to after that of every earlier request.

        API servers stamp the arrival by the wall clock, which may step back; the order of arrival here must not.
        """
        stamped_s, arrival_s = self._arrivals_s.get(request, (math.nan, 0.0))
        if stamped_s != request.arrival_time:
            arrival_s = max(request.arrival_time, math.nextafter(self._last_arrival_s, math.inf))
            self._last_arrival_s = arrival_s
            self._arrivals_s[request] = (request.arrival_time, arrival_s)
        return arrival_s
