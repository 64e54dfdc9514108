"""Requests that wait in the gateway because no engine may take them now: bounded, in the order of layer 1.

Owned by the dispatcher. How long a request may wait is its own budget (`RequestAttempts.may_wait`).
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from moe_scheduling.engine.attempts import RequestAttempts
from moe_scheduling.engine.choice import Job, Send
from moe_scheduling.engine.target_state import TargetState
from moe_scheduling.request.order import RequestSettings
from moe_scheduling.request.prefill_speed import speed_of
from moe_scheduling.request.waiting_queue import WaitingQueue


class Rejection(Enum):
    """Why a request is answered without an engine."""

    NO_ENGINE_CONFIGURED = "no_engine_configured"
    NO_FITTING_ENGINE = "no_fitting_engine"
    QUEUE_FULL_NO_ENGINE = "queue_full_no_engine"
    QUEUE_FULL_SATURATED = "queue_full_saturated"
    TIMEOUT_NO_ENGINE = "timeout_no_engine"
    TIMEOUT_SATURATED = "timeout_saturated"
    DEADLINE = "deadline"


@dataclass(frozen=True, slots=True)
class Held:
    """The request is held: the queue releases or rejects it later."""


HELD = Held()


class Waiter(Hashable, Protocol):
    """A request as the dispatcher sees it; the gateway's exchange and the simulator's are both one."""

    job: Job
    attempts: RequestAttempts

    @property
    def computes(self) -> bool:
        """Whether an engine has to compute for it; a list of models costs an engine nothing."""

    def release(self, decision: Send) -> None:
        """A target takes it: send it there."""

    def reject(self, rejection: Rejection) -> None:
        """It may wait no longer: answer it with an error."""


class HoldQueue:
    """The held requests.

    Args:
        settings: their order.
        most_requests: requests that are held at most.

    Attributes:
        waiters: the held requests, oldest first; to be read only.
    """

    def __init__(self, settings: RequestSettings, *, most_requests: int) -> None:
        self._queue: WaitingQueue[Waiter] = WaitingQueue(settings)
        self._most_requests = most_requests
        self.waiters: dict[Waiter, None] = {}
        self._is_releasing = False

    @property
    def size_tokens(self) -> int:
        """Uncached prompt tokens of all held requests."""
        return self._queue.size_tokens

    def reorder(self, settings: RequestSettings) -> None:
        """Orders held and later requests by other settings."""
        self._queue.reorder(settings)

    def take_speed(self, engine: TargetState | None) -> None:
        """Orders by the prefill speed of an engine, by its step-time model; None: it is not known."""
        if engine is not None:
            self._queue.take_speed(speed_of(engine.step_time_model, engine.step_tokens))

    def charge(self, tenant: str, tokens: int) -> None:
        """Counts prompt tokens that a tenant's request took from an engine against the tenant's later requests."""
        self._queue.charge(tenant, tokens)

    def push(self, waiter: Waiter, now_s: float) -> bool:
        """Holds a request; returns False, and holds nothing, when the queue is full."""
        if len(self._queue) >= self._most_requests:
            return False
        job = waiter.job
        self._queue.push(waiter, size_tokens=job.size_tokens, arrival_s=now_s, priority=job.priority, tenant=job.tenant)
        self.waiters[waiter] = None
        return True

    def discard(self, waiter: Waiter) -> None:
        """Holds a request no longer; nothing happens when it is not held."""
        if waiter in self.waiters:
            del self.waiters[waiter]
            self._queue.discard(waiter)

    def release_while(self, decide: Callable[[Waiter], Send | Rejection | None]) -> None:
        """Releases the requests in order while `decide` finds a target for the first of them.

        A release may fail at once, and what follows from it calls this again. The pass that runs then goes on with the
        queue as it has become, and the inner call does nothing: passes never nest.
        """
        if self._is_releasing:
            return
        self._is_releasing = True
        try:
            while self._queue:
                waiter = self._queue.peek()
                decision = decide(waiter)
                if decision is None:
                    return
                self.discard(waiter)
                if isinstance(decision, Rejection):
                    waiter.reject(decision)
                else:
                    waiter.release(decision)
        finally:
            self._is_releasing = False

    def expired(self, now_s: float) -> list[Waiter]:
        """The held requests that may wait no longer, oldest first."""
        return [waiter for waiter in self.waiters if not waiter.attempts.may_wait(now_s)]

    def longest_wait_s(self, now_s: float) -> float | None:
        """Longest time in seconds that a held request has been without an engine; None when none is held."""
        return max((now_s - waiter.attempts.waiting_since_s for waiter in self.waiters), default=None)
