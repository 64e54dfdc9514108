"""Layer 2: the choice of the engine for a request, called by the gateway for each request and by the simulator.

`choose_target` reads the books and changes nothing: the caller then tells the books and the prefix index what it did.

A policy is a function that picks one of the candidates. All policies share what stands around it: which targets are
candidates, when a request is held, what is predicted for the target that was picked.

Invariants: the answer depends on the arguments alone; a target that does not accept or is excluded is never chosen;
among equals the choice goes round with `turn`.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import NamedTuple

from moe_scheduling.engine.target_list import LARGE_FLEET, TargetList
from moe_scheduling.engine.target_state import TargetState
from moe_scheduling.engine.ttft_model import DEFAULT_STEP_TIME
from moe_scheduling.request.fairness import ANONYMOUS_TENANT
from moe_scheduling.signals import StepTime, Target


class DispatchPolicy(StrEnum):
    """How a target is chosen."""

    LEAST_REQUESTS = "leastRequests"
    PREDICTED = "predicted"
    ROUND_ROBIN = "roundRobin"

    # Enum's own is a function in Python; this is looked up for each request.
    __hash__ = str.__hash__


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """Choice of the engine.

    Attributes:
        policy: `predicted` takes the least predicted time to first token; the others are there to compare with.
        stickiness_s: under `predicted`, a session stays at its last target while that one's prediction is worse by at
            most so many seconds.
        stale_after_s: age at which a signal is no longer believed and the gateway's own books stand alone.
        saturation_s: predicted wait before the own prefill at which a target is saturated; the request is held in the
            gateway's queue when every target is. None never holds.

    Raises:
        ValueError: a value is out of its range or not finite.
    """

    policy: DispatchPolicy = DispatchPolicy.PREDICTED
    stickiness_s: float = 0.1
    stale_after_s: float = 2.0
    saturation_s: float | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.stickiness_s < math.inf:
            raise ValueError("stickiness_s must be at least 0 and finite")
        if not 0.0 < self.stale_after_s < math.inf:
            raise ValueError("stale_after_s must be greater than 0 and finite")
        if self.saturation_s is not None and not 0.0 < self.saturation_s < math.inf:
            raise ValueError("saturation_s must be greater than 0 and finite, or absent")


class Job(NamedTuple):
    """What a request asks of an engine.

    A tuple, as `Send` is: one is made for each request, and a frozen dataclass takes twice as long to make.

    Attributes:
        prompt_tokens: tokens of the prompt, estimated.
        cached: how many of them each target holds in its prefix cache; absent means none.
        session_target: where the session's last request went; None without a session or before its first.
        priority: level for the hold queue; lower is more urgent.
        tenant: whose it is, for the hold queue.
    """

    prompt_tokens: int
    cached: Mapping[Target, int] = MappingProxyType({})
    session_target: Target | None = None
    priority: int = 0
    tenant: str = ANONYMOUS_TENANT

    def uncached_tokens(self, target: Target) -> int:
        """Tokens that this target has to compute; at least 1, since the last token of a prompt is always computed."""
        uncached = self.prompt_tokens
        if self.cached and (held := self.cached.get(target, 0)) > 0:
            uncached -= held
        return uncached if uncached > 1 else 1  # noqa: FURB136 - half the time of max

    @property
    def size_tokens(self) -> int:
        """Size of the job for the order of requests: the uncached tokens where most is cached."""
        return max(1, self.prompt_tokens - max(0, *self.cached.values(), 0))


class SendReason(StrEnum):
    """Why this target; a metric label."""

    LEAST_PREDICTED = "least_predicted"
    LEAST_REQUESTS = "least_requests"
    SESSION = "session"
    TURN = "turn"

    __hash__ = str.__hash__


class HoldReason(StrEnum):
    """Why the request has to wait in the gateway; a metric label."""

    SATURATED = "saturated"


class RefuseReason(StrEnum):
    """Why there is no target; a metric label."""

    NO_ENGINE = "no_engine"
    NO_OTHER_ENGINE = "no_other_engine"


class Send(NamedTuple):
    """Send it to this target, whose first token is predicted in so many seconds."""

    target: Target
    predicted_s: float
    reason: SendReason


@dataclass(frozen=True, slots=True)
class Hold:
    """Keep it in the gateway's queue."""

    reason: HoldReason


@dataclass(frozen=True, slots=True)
class Refuse:
    """Nobody can take it now."""

    reason: RefuseReason


Decision = Send | Hold | Refuse


def choose_target(
    job: Job,
    books: Sequence[TargetState],
    settings: EngineSettings,
    *,
    turn: int,
    now_s: float,
    exclude: Collection[Target] = (),
) -> Decision:
    """Which target takes the job.

    Under `predicted` the one with the least predicted time to first token: the prefill tokens ahead and the own that it
    does not hold, through the engine's pace (see `pace.py`). Remaining prefill work, KV use and expert pressure are the
    signals of the second Gimbal paper's dispatch (arXiv 2606.15177); counting uncached instead of all prompt tokens
    follows the KV router of NVIDIA Dynamo; a session that yields by a margin stands between Gimbal's first paper, which
    keeps a user on an engine, and its second, which dropped that.

    O(targets); of a large fleet, given as a `TargetList`, `predicted` looks at a sample alone, and so it holds a
    request when the whole sample is saturated.

    Args:
        job: the request.
        books: one for each known target, in an order that stays.
        settings: the policy and its figures.
        turn: a number that rises by one with each request: whose turn it is, under `roundRobin` and among equals.
        now_s: the time, on the clock of the books.
        exclude: targets that failed this request before.
    """
    if len(books) > LARGE_FLEET and settings.policy is _PREDICTED and isinstance(books, TargetList):
        sample = books.sample(job.cached, job.session_target, turn)
        decision = choose_target(job, sample, settings, turn=turn, now_s=now_s, exclude=exclude)
        if type(decision) is not Refuse:
            return decision
    candidates = [book for book in books if book.accepting]
    if not candidates:
        return _NO_ENGINE
    if exclude:
        candidates = [book for book in candidates if book.target not in exclude]
        if not candidates:
            return _NO_OTHER_ENGINE
    line = books[0].line or _common_line(books)
    saturation_s = settings.saturation_s
    if saturation_s is not None and _all_wait(saturation_s, candidates, line, settings, now_s):
        return _SATURATED
    # Whose turn it is comes first, and the first of equals is chosen.
    if start := turn % len(candidates):
        candidates = candidates[start:] + candidates[:start]
    return _POLICIES[settings.policy](job, candidates, line, settings, now_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """What is predicted of one target, term by term.

    Attributes:
        target: the target.
        ahead_tokens: prefill tokens ahead.
        uncached_tokens: own tokens to compute.
        requests: requests there.
        fresh: whether its signal is believed.
        kv_s: seconds until KV blocks are free, part of the wait.
        wait_s: seconds until the own prefill begins.
        predicted_s: seconds until the first token.
    """

    target: Target
    ahead_tokens: int
    uncached_tokens: int
    requests: int
    fresh: bool
    kv_s: float
    wait_s: float
    predicted_s: float


def explain(job: Job, books: Sequence[TargetState], settings: EngineSettings, *, now_s: float) -> list[Explanation]:
    """What `choose_target` compares, for each accepting target in their order: for logs, not for each request."""
    line, stale_after_s = _common_line(books), settings.stale_after_s
    return [_explanation(job, book, line, now_s, stale_after_s) for book in books if book.accepting]


def _explanation(
    job: Job, books: TargetState, common_line: StepTime, now_s: float, stale_after_s: float
) -> Explanation:
    pace = books.pace(common_line, now_s, stale_after_s)
    ahead_tokens = books.ahead_prefill_tokens(now_s, stale_after_s)
    uncached_tokens = job.uncached_tokens(books.target)
    return Explanation(
        target=books.target,
        ahead_tokens=ahead_tokens,
        uncached_tokens=uncached_tokens,
        requests=books.requests(now_s, stale_after_s),
        fresh=books.is_fresh(now_s, stale_after_s),
        kv_s=pace.kv_s,
        wait_s=pace.wait_s(ahead_tokens),
        predicted_s=pace.first_token_s(ahead_tokens + uncached_tokens),
    )


_NO_ENGINE = Refuse(RefuseReason.NO_ENGINE)
_NO_OTHER_ENGINE = Refuse(RefuseReason.NO_OTHER_ENGINE)
_SATURATED = Hold(HoldReason.SATURATED)
# Looking a member up in its enum takes longer than the rest of making a decision of it.
_PREDICTED = DispatchPolicy.PREDICTED
_SESSION = SendReason.SESSION
_LEAST_PREDICTED = SendReason.LEAST_PREDICTED


def _common_line(books: Sequence[TargetState]) -> StepTime:
    """The line of the first engine that has one: what has not been seen at work yet is taken to be like its peers."""
    for book in books:
        if book.line is not None:
            return book.line
    return DEFAULT_STEP_TIME


def _all_wait(
    least_s: float, candidates: Sequence[TargetState], line: StepTime, settings: EngineSettings, now_s: float
) -> bool:
    stale_after_s = settings.stale_after_s
    for books in candidates:
        ahead_tokens = books.ahead_prefill_tokens(now_s, stale_after_s)
        if books.pace(line, now_s, stale_after_s).wait_s(ahead_tokens) < least_s:
            return False
    return True


def _by_prediction(
    job: Job, candidates: Sequence[TargetState], line: StepTime, settings: EngineSettings, now_s: float
) -> Send:
    stale_after_s, session = settings.stale_after_s, job.session_target
    chosen = candidates[0].target
    least_s = session_s = math.inf
    for books in candidates:
        target = books.target
        predicted_s = books.first_token_s(job.uncached_tokens(target), line, now_s, stale_after_s)
        if predicted_s < least_s:
            chosen, least_s = target, predicted_s
        if target == session:
            session_s = predicted_s
    if session is not None and session_s <= least_s + settings.stickiness_s:
        return Send(session, session_s, _SESSION)
    return Send(chosen, least_s, _LEAST_PREDICTED)


def _by_requests(
    job: Job, candidates: Sequence[TargetState], line: StepTime, settings: EngineSettings, now_s: float
) -> Send:
    """The requests that are known of, whoever sent them, and nothing else."""
    stale_after_s = settings.stale_after_s
    requests = [books.requests(now_s, stale_after_s) for books in candidates]
    chosen = candidates[requests.index(min(requests))]
    return _send(job, chosen, line, settings, now_s, SendReason.LEAST_REQUESTS)


def _by_turn(
    job: Job, candidates: Sequence[TargetState], line: StepTime, settings: EngineSettings, now_s: float
) -> Send:
    return _send(job, candidates[0], line, settings, now_s, SendReason.TURN)


def _send(
    job: Job, chosen: TargetState, line: StepTime, settings: EngineSettings, now_s: float, reason: SendReason
) -> Send:
    """A choice made without predictions, with the prediction of the chosen."""
    own_tokens = job.uncached_tokens(chosen.target)
    predicted_s = chosen.first_token_s(own_tokens, line, now_s, settings.stale_after_s)
    return Send(chosen.target, predicted_s, reason)


_Policy = Callable[[Job, Sequence[TargetState], StepTime, EngineSettings, float], Send]
_POLICIES: Mapping[DispatchPolicy, _Policy] = {
    DispatchPolicy.LEAST_REQUESTS: _by_requests,
    DispatchPolicy.PREDICTED: _by_prediction,
    DispatchPolicy.ROUND_ROBIN: _by_turn,
}
