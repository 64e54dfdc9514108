"""Layer 2: the choice of the engine for a request, called by the gateway for each request and by the simulator.

`choose_target` reads the books and changes nothing: the caller then tells the books and the prefix index what it did.

A policy is a function that ranks predictions. All policies share what stands around it: which targets may be chosen, when
a request is held, what is predicted for the target that was chosen.

Invariants: the answer depends on the arguments alone; a target that does not accept or is excluded is never chosen; among
equals the choice goes round with `turn`.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from moe_scheduling.books import TargetBooks
from moe_scheduling.signals import StepTime, Target

# vLLM's default budget of prefill tokens in a step, for online serving on all but the largest GPUs. A greater budget makes fewer
# steps than predicted here, on every target alike.
STEP_PREFILL_TOKENS = 2048
# Until some engine has a fitted line: a middling model on one GPU. Alike for all targets, so it decides between none of them.
DEFAULT_STEP_TIME = StepTime(base_s=0.01, prefill_s=0.00005, decode_s=0.0001)
# KV use from which new requests begin to wait for blocks: theta_k of Gimbal (arXiv 2602.21626; vLLM's own balancer starts at 0.5).
KV_PRESSURE_FROM = 0.9
# Decode steps until a running request ends and leaves its blocks when there are none left: outputs are some hundred tokens
# long, and in a full batch some request is always near its end.
KV_PRESSURE_STEPS = 64
# Part of the recent imbalance of the experts that is added to the time: the step-time line is fitted on the same steps, with
# a longer memory, so it holds most of a lasting imbalance already. The pressure that the second Gimbal paper (arXiv
# 2606.15177) feeds back to the dispatch; its weight there is not published.
EXPERT_PRESSURE = 0.25


class DispatchPolicy(StrEnum):
    """How a target is chosen."""

    LEAST_REQUESTS = "leastRequests"
    PREDICTED = "predicted"
    ROUND_ROBIN = "roundRobin"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """Choice of the engine.

    Attributes:
        policy: `predicted` takes the least predicted time to first token.
        stickiness_s: under `predicted`, a session stays at its last target while that one's prediction is worse by at most so
            many seconds.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a request asks of an engine.

    Attributes:
        prompt_tokens: tokens of the prompt, estimated.
        cached: how many of them each target holds in its prefix cache; absent means none.
        session_target: where the session's last request went; None without a session or before its first.
        priority: level for the hold queue; lower is more urgent.
    """

    prompt_tokens: int
    cached: Mapping[Target, int] = field(default_factory=dict)
    session_target: Target | None = None
    priority: int = 0

    def uncached_tokens(self, target: Target) -> int:
        """Tokens that this target has to compute; at least 1, since the last token of a prompt is always computed."""
        if not self.cached:
            return max(1, self.prompt_tokens)
        return max(1, self.prompt_tokens - max(0, self.cached.get(target, 0)))

    @property
    def size_tokens(self) -> int:
        """Size of the job for the order of requests: the uncached tokens where most is cached."""
        return max(1, self.prompt_tokens - max(0, max(self.cached.values(), default=0)))


class SendReason(StrEnum):
    """Why this target; a metric label."""

    LEAST_PREDICTED = "least_predicted"
    LEAST_REQUESTS = "least_requests"
    SESSION = "session"
    TURN = "turn"


class HoldReason(StrEnum):
    """Why the request has to wait in the gateway; a metric label."""

    SATURATED = "saturated"


class RefuseReason(StrEnum):
    """Why there is no target; a metric label."""

    NO_ENGINE = "no_engine"
    NO_OTHER_ENGINE = "no_other_engine"


@dataclass(frozen=True, slots=True)
class Send:
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


class Prediction(NamedTuple):
    """What is expected of one target, in seconds, term by term.

    Attributes:
        books: the books that it was made from.
        wait_s: until the prefill of this request begins: `queue_s + kv_s`.
        predicted_s: until the first token: `queue_s + kv_s + prefill_s`.
        queue_s: for the prefill tokens ahead.
        kv_s: for KV blocks to become free.
        prefill_s: for the own uncached tokens.
    """

    books: TargetBooks
    wait_s: float
    predicted_s: float
    queue_s: float
    kv_s: float
    prefill_s: float


def choose_target(
    job: Job,
    books: Sequence[TargetBooks],
    settings: EngineSettings,
    *,
    turn: int,
    now_s: float,
    exclude: Collection[Target] = (),
) -> Decision:
    """Which target takes the job.

    Args:
        job: the request.
        books: one for each known target, in an order that stays.
        settings: the policy and its figures.
        turn: a number that rises by one with each request: whose turn it is, under `roundRobin` and among equals.
        now_s: the time, on the clock of the books.
        exclude: targets that failed this request before.
    """
    accepting = [book for book in books if book.accepting]
    if not accepting:
        return _NO_ENGINE
    if exclude:
        accepting = [book for book in accepting if book.target not in exclude]
        if not accepting:
            return _NO_OTHER_ENGINE
    predictions = _predictions(job, accepting, now_s, settings.stale_after_s)
    saturation_s = settings.saturation_s
    if saturation_s is not None and all(prediction.wait_s >= saturation_s for prediction in predictions):
        return _SATURATED
    start = turn % len(predictions)
    # Whose turn it is comes first; `min` keeps the first of equals.
    in_turn = predictions[start:] + predictions[:start] if start else predictions
    chosen, reason = _POLICIES[settings.policy](job, in_turn, settings, now_s)
    return Send(chosen.books.target, chosen.predicted_s, reason)


def explain(job: Job, books: Sequence[TargetBooks], settings: EngineSettings, *, now_s: float) -> list[Prediction]:
    """The predictions that `choose_target` compares, for those who want to see them: logs and tests, not each request."""
    return _predictions(job, [book for book in books if book.accepting], now_s, settings.stale_after_s)


_NO_ENGINE = Refuse(RefuseReason.NO_ENGINE)
_NO_OTHER_ENGINE = Refuse(RefuseReason.NO_OTHER_ENGINE)
_SATURATED = Hold(HoldReason.SATURATED)


def _predictions(job: Job, books: Sequence[TargetBooks], now_s: float, stale_after_s: float) -> list[Prediction]:
    line = _common_line(books)
    return [_predict(job, book, line, now_s, stale_after_s) for book in books]


def _common_line(books: Sequence[TargetBooks]) -> StepTime:
    """The line of the first engine that has one: what has not been seen at work yet is taken to be like its peers."""
    for book in books:
        if book.signal is not None and book.signal.step_time is not None:
            return book.signal.step_time
    return DEFAULT_STEP_TIME


def _predict(job: Job, books: TargetBooks, common_line: StepTime, now_s: float, stale_after_s: float) -> Prediction:
    """Prefill is bound by compute, so it takes its tokens' time plus the fixed part of as many steps as the budget makes of them.

        first_token_s = prefill_s * (ahead + own) + ceil((ahead + own) / budget) * (base_s + decode_s * decoding) + kv_s

    Remaining prefill work, KV use and expert pressure are the signals of Gimbal's dispatch (arXiv 2606.15177); uncached
    instead of all prompt tokens follows the KV router of NVIDIA Dynamo. A line outlives its signal's freshness: it is a
    property of the engine, not of the moment.
    """
    ahead = books.ahead_prefill_tokens(now_s, stale_after_s)
    total = ahead + job.uncached_tokens(books.target)
    line = (books.signal and books.signal.step_time) or common_line
    step_s = line.base_s + line.decode_s * books.decoding_requests(now_s, stale_after_s)
    queue_s = ahead * line.prefill_s + ahead // STEP_PREFILL_TOKENS * step_s
    first_s = total * line.prefill_s + -(-total // STEP_PREFILL_TOKENS) * step_s
    kv_s = 0.0
    if (signal := books.fresh_signal(now_s, stale_after_s)) is not None:
        slower = 1.0 + EXPERT_PRESSURE * (signal.expert_balance - 1.0)
        queue_s *= slower
        first_s *= slower
        if signal.kv_usage > KV_PRESSURE_FROM:
            kv_s = KV_PRESSURE_STEPS * step_s * (signal.kv_usage - KV_PRESSURE_FROM) / (1.0 - KV_PRESSURE_FROM)
    return Prediction(books, queue_s + kv_s, first_s + kv_s, queue_s, kv_s, first_s - queue_s)


_Choice = tuple[Prediction, SendReason]


def _by_prediction(job: Job, in_turn: Sequence[Prediction], settings: EngineSettings, now_s: float) -> _Choice:
    best = min(in_turn, key=_predicted_s)
    if job.session_target is not None:
        for prediction in in_turn:
            if prediction.books.target == job.session_target:
                if prediction.predicted_s <= best.predicted_s + settings.stickiness_s:
                    return prediction, SendReason.SESSION
                break
    return best, SendReason.LEAST_PREDICTED


def _predicted_s(prediction: Prediction) -> float:
    return prediction.predicted_s


def _by_requests(job: Job, in_turn: Sequence[Prediction], settings: EngineSettings, now_s: float) -> _Choice:
    """As vLLM's own data-parallel balancer counts (0.32, `DPLBAsyncMPClient`), without its KV term."""
    stale_after_s = settings.stale_after_s
    return min(in_turn, key=lambda one: one.books.requests(now_s, stale_after_s)), SendReason.LEAST_REQUESTS


def _by_turn(job: Job, in_turn: Sequence[Prediction], settings: EngineSettings, now_s: float) -> _Choice:
    return in_turn[0], SendReason.TURN


_POLICIES: Mapping[DispatchPolicy, Callable[[Job, Sequence[Prediction], EngineSettings, float], _Choice]] = {
    DispatchPolicy.LEAST_REQUESTS: _by_requests,
    DispatchPolicy.PREDICTED: _by_prediction,
    DispatchPolicy.ROUND_ROBIN: _by_turn,
}
