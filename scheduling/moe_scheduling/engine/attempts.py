"""The attempts of one request: when it may wait, which targets failed it, and what follows a failed attempt. Pure.

Driven by the gateway's exchange and by the simulator's gateway, which report what happened and carry out what
`after_failure` returns. All times are arguments on one monotonic clock.

A request has two budgets. `MAX_ATTEMPTS` bounds how often it is sent. `hold_timeout_s` bounds how long it may be
without an engine, counted from its arrival, or from the failure of the last engine that had received it. An attempt in
which no connection was made wrote nothing, so it is not counted while the second budget lasts. Each time that bytes of
the request are written to a connection counts, because the engine may have read them.

Invariant: once the answer has begun, nothing is sent again, but for a stream that can go on at another engine. Such a
stream has the same budgets: each engine that fails it counts, so none of them is carried from engine to engine.
"""

import math
from dataclasses import dataclass, field
from enum import Enum, StrEnum

from moe_scheduling.signals import Target

MAX_ATTEMPTS = 2
# vLLM has no answer of this status; proxies in front of a server have it.
BUSY = 429
NOT_FOUND = 404
# Those that may be failures of an attempt.
REPEATED_STATUSES = frozenset({NOT_FOUND, BUSY, 500, 503})


class AttemptFailure(StrEnum):
    """Why an attempt brought no whole answer.

    `UNREACHABLE`: no connection was made, so the engine has not seen the request. `BROKEN`: the connection ended early,
    or what came is no answer. `ENGINE_DEAD`: the engine's server answered that its engine process is dead.
    `ENGINE_ERROR`: it answered with an error of its own before the first token. `ENGINE_FULL`: it answered 503, or
    429 while another engine takes requests, which is no fault of the engine. `NOT_SERVED`: it does not know the model
    (any more), and another engine may.
    """

    UNREACHABLE = "unreachable"
    BROKEN = "broken"
    ENGINE_DEAD = "engine_dead"
    ENGINE_ERROR = "engine_error"
    ENGINE_FULL = "engine_full"
    NOT_SERVED = "not_served"


class NextStep(Enum):
    """What follows a failed attempt: choose a target again, answer with an error, or end the answer that has begun."""

    RETRY = "retry"
    REFUSE = "refuse"
    BREAK_OFF = "break_off"


@dataclass(slots=True)
class RequestAttempts:
    """The state of one request between its arrival and the beginning of its answer.

    Attributes:
        hold_timeout_s: longest time without an engine, in seconds.
        waiting_since_s: when the request arrived, or lost the last engine that had received it.
        deadline_s: when the answer must have begun.
        count: attempts that count against `MAX_ATTEMPTS`.
        failed_targets: targets that failed it; they are chosen again only when there is no other.
        is_answering: whether the answer has begun.
    """

    hold_timeout_s: float
    waiting_since_s: float
    deadline_s: float = math.inf
    count: int = 0
    failed_targets: set[Target] = field(default_factory=set)
    is_answering: bool = False
    _is_received: bool = False

    def may_wait(self, now_s: float) -> bool:
        """Whether the request may still be without an engine: held, or tried at engines that cannot be reached."""
        return now_s - self.waiting_since_s < self.hold_timeout_s

    def is_late(self, now_s: float) -> bool:
        """Whether the deadline has passed before the answer began."""
        return now_s >= self.deadline_s and not self.is_answering

    @property
    def may_repeat(self) -> bool:
        """Whether the request may be sent once more after this attempt."""
        return self.count < MAX_ATTEMPTS and not self.is_answering

    def begin(self) -> None:
        """An attempt begins: a target was chosen."""
        self.count += 1

    def receive(self) -> None:
        """The request was written to the connection of an engine."""
        self._is_received = True

    def failure_of_status(self, status: int, *, is_accepting: bool, has_other: bool = False) -> AttemptFailure | None:
        """The failure that an HTTP status stands for; None when it is the answer for the client.

        An engine that is full or about to end answers 503, and 500 while it drains. With no attempt left, both are
        passed on. So are 429, which may be meant for the client, and 404, unless another engine takes the request.

        Args:
            status: of the engine's answer.
            is_accepting: whether its target takes new requests; a drained one does not.
            has_other: whether another target takes the request at once, and for 404 whether it is about a model's name.
        """
        if self.count >= MAX_ATTEMPTS:
            return None
        if status == 503 or (status == BUSY and has_other):
            return AttemptFailure.ENGINE_FULL
        if status == NOT_FOUND and has_other:
            return AttemptFailure.NOT_SERVED
        return AttemptFailure.BROKEN if status == 500 and not is_accepting else None

    def after_failure(
        self, target: Target, failure: AttemptFailure, now_s: float, *, can_go_on: bool = False
    ) -> NextStep:
        """Counts the failure of an attempt at `target` and returns what to do with the request.

        Args:
            target: where it failed.
            failure: why.
            now_s: the time.
            can_go_on: whether an answer that has begun can go on at another engine.
        """
        if self.is_answering and not can_go_on:
            return NextStep.BREAK_OFF
        if failure is AttemptFailure.UNREACHABLE and self.may_wait(now_s):
            self.count -= 1
        if self.count >= MAX_ATTEMPTS:
            return NextStep.BREAK_OFF if self.is_answering else NextStep.REFUSE
        self.failed_targets.add(target)
        if self._is_received:
            self._is_received, self.waiting_since_s = False, now_s
        return NextStep.RETRY

    def move(self, now_s: float) -> None:
        """A stream that has begun leaves a target that drains, which is no failure."""
        self.count -= 1
        self._is_received, self.waiting_since_s = False, now_s
