"""Layer 2: the choice of the engine for a request, called by the gateway for each request and by the simulator.

`choose_target` changes nothing: the caller then updates the `TargetState` and the prefix index of the chosen target.

A policy is a function that picks one of the candidates. The rest is common to all policies: which targets are
candidates, when a request is held, and the prediction for the chosen target.

Invariants: the decision depends on the arguments alone; a target that does not accept or is excluded is never chosen;
ties go round with `turn`.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence, Set
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import NamedTuple

from moe_scheduling.engine.disaggregation import LatencyTargets
from moe_scheduling.engine.target_list import LARGE_FLEET, TargetList
from moe_scheduling.engine.target_state import TargetState
from moe_scheduling.engine.ttft_model import DEFAULT_STEP_TIME
from moe_scheduling.request.fairness import ANONYMOUS_TENANT
from moe_scheduling.settings import check_settings, setting
from moe_scheduling.signals import StepTime, Target


class DispatchPolicy(StrEnum):
    """How a target is chosen."""

    LEAST_REQUESTS = "leastRequests"
    PREDICTED = "predicted"
    ROUND_ROBIN = "roundRobin"

    # Enum's own hash is a function in Python; this one is called for each request.
    __hash__ = str.__hash__


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """Choice of the engine for a request.

    Raises:
        ValueError: a value is out of its range or not finite.
    """

    policy: DispatchPolicy = setting(
        DispatchPolicy.PREDICTED,
        "`predicted` takes the engine with the least predicted time to first token, `leastRequests` the one with the "
        "fewest requests in flight, `roundRobin` each engine in turn.",
    )
    stickiness_s: float = setting(
        0.1,
        "Under `predicted`, a session stays at its engine while it is worse than the best by at most this.",
        least=0,
    )
    stale_after_s: float = setting(
        2.0,
        "Age at which the gateway ignores an engine's signal and uses its own in-flight accounting alone.",
        above=0,
    )
    # Off by default: a queue in the gateway was measured to raise TTFT (docs/adr/0017).
    saturation_s: float | None = setting(
        None,
        "Predicted wait at which an engine is saturated; while all are, the gateway holds requests back. Absent: it "
        "never does.",
        above=0,
    )

    targets: LatencyTargets = setting(
        LatencyTargets(),
        "Bounds that the choice keeps under `predicted`, where an engine can keep them, in place of the least "
        "predicted time to first token; sessions then stay at their engine as far as it holds their prefix.",
    )

    def __post_init__(self) -> None:
        check_settings(self)


class Job(NamedTuple):
    """The parts of a request that the choice reads.

    A tuple, as `Send` is: one is made for each request, and a frozen dataclass takes twice as long to make.

    Attributes:
        prompt_tokens: tokens of the prompt, estimated.
        cached: how many of them each target holds in its prefix cache; an absent target holds none.
        session_target: the target of the session's last request; None without a session or before its first.
        priority: level in the hold queue; lower is more urgent.
        tenant: the tenant in the hold queue.
        model: name that the request asks for; None: any. The caller gives `choose_target` only targets that serve it.
        server: the only server that can answer it, because it continues a response kept there; None: any.
        servers: the only servers that may get it, as the only ones that its proxy reaches; None: any.
        splits: whether one server may compute its prompt and another one its answer.
    """

    prompt_tokens: int
    cached: Mapping[Target, int] = MappingProxyType({})
    session_target: Target | None = None
    priority: int = 0
    tenant: str = ANONYMOUS_TENANT
    model: str | None = None
    server: str | None = None
    servers: Set[str] | None = None
    splits: bool = False

    def uncached_tokens(self, target: Target) -> int:
        """Returns the tokens that the target has to compute: at least 1, the last token of a prompt, in any case."""
        uncached = self.prompt_tokens
        if self.cached and (held := self.cached.get(target, 0)) > 0:
            uncached -= held
        return uncached if uncached > 1 else 1  # noqa: FURB136 - half the time of max

    @property
    def size_tokens(self) -> int:
        """Size in the order of requests: the uncached tokens at the target that holds the most, at least 1."""
        return max(1, self.prompt_tokens - max(0, *self.cached.values(), 0))


class SendReason(StrEnum):
    """Why a target was chosen; a metric label."""

    DECODE = "decode"
    LEAST_PREDICTED = "least_predicted"
    LEAST_REQUESTS = "least_requests"
    PREFILL = "prefill"
    SESSION = "session"
    TURN = "turn"

    __hash__ = str.__hash__


class HoldReason(StrEnum):
    """Why a request has to wait in the gateway; a metric label."""

    SATURATED = "saturated"


class RefuseReason(StrEnum):
    """Why no target can take a request; a metric label."""

    NO_ENGINE = "no_engine"
    NO_OTHER_ENGINE = "no_other_engine"


class Send(NamedTuple):
    """Send the request to this target; its first token is predicted in `predicted_s` seconds.

    With `prefill`, another target computes its prompt before, as that says.
    """

    target: Target
    predicted_s: float
    reason: SendReason
    prefill: "Send | None" = None


@dataclass(frozen=True, slots=True)
class Hold:
    """Keep the request in the gateway's queue."""

    reason: HoldReason


@dataclass(frozen=True, slots=True)
class Refuse:
    """No target can take the request now."""

    reason: RefuseReason


Decision = Send | Hold | Refuse


def choose_target(
    job: Job,
    states: Sequence[TargetState],
    settings: EngineSettings,
    *,
    turn: int,
    now_s: float,
    exclude: Collection[Target] = (),
) -> Decision:
    """Returns the target that takes the job, or why none does.

    Under `predicted` it is the one with the least predicted time to first token: the prefill tokens ahead and the job's
    own uncached tokens, through the TTFT model of the engine (`ttft_model.py`). Remaining prefill work and KV use are
    signals of the second Gimbal paper's dispatch (arXiv 2606.15177); counting uncached instead of all prompt tokens
    follows the KV router of NVIDIA Dynamo; a session that yields by a margin stands between Gimbal's first paper, which
    keeps a user on an engine, and its second, which dropped that.

    O(targets). Of a large fleet, given as a `TargetList`, `predicted` compares a sample alone, and so holds a request
    when the whole sample is saturated.

    Args:
        job: the request.
        states: one for each known target, in a stable order.
        settings: the policy and its figures.
        turn: a number that rises by one with each request; decides `roundRobin` and ties.
        now_s: the time, on the clock of the states.
        exclude: targets that failed this request before.
    """
    if len(states) > LARGE_FLEET and settings.policy is _PREDICTED and isinstance(states, TargetList):
        sample = states.sample(job.cached, job.session_target, turn)
        decision = choose_target(job, sample, settings, turn=turn, now_s=now_s, exclude=exclude)
        if type(decision) is not Refuse:
            return decision
    candidates = [state for state in states if state.accepting]
    if not candidates:
        return _NO_ENGINE
    if exclude:
        candidates = [state for state in candidates if state.target not in exclude]
        if not candidates:
            return _NO_OTHER_ENGINE
    fleet_default = states[0].step_time_model or fleet_default_model(states)
    saturation_s = settings.saturation_s
    if saturation_s is not None and _all_saturated(saturation_s, candidates, fleet_default, settings, now_s):
        return _SATURATED
    # The list begins at the turn, and the first of equals is chosen.
    if start := turn % len(candidates):
        candidates = candidates[start:] + candidates[:start]
    return _POLICIES[settings.policy](job, candidates, fleet_default, settings, now_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """The prediction for one target, term by term.

    Attributes:
        target: the target.
        ahead_tokens: prefill tokens ahead.
        uncached_tokens: tokens of the job that the target has to compute.
        requests: requests at the target.
        fresh: whether its signal is young enough to be used.
        kv_s: seconds until KV blocks are free, part of `wait_s`.
        wait_s: seconds until the job's prefill begins.
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


def explain(job: Job, states: Sequence[TargetState], settings: EngineSettings, *, now_s: float) -> list[Explanation]:
    """Returns the terms that `choose_target` compares, for each accepting target in order.

    For logs and metrics, not for each request: O(targets), with an object for each.
    """
    fleet_default, stale_after_s = fleet_default_model(states), settings.stale_after_s
    return [_explanation(job, state, fleet_default, now_s, stale_after_s) for state in states if state.accepting]


def _explanation(
    job: Job, state: TargetState, fleet_default: StepTime, now_s: float, stale_after_s: float
) -> Explanation:
    ahead_tokens = state.ahead_prefill_tokens(now_s, stale_after_s)
    uncached_tokens = job.uncached_tokens(state.target)
    return Explanation(
        target=state.target,
        ahead_tokens=ahead_tokens,
        uncached_tokens=uncached_tokens,
        requests=state.requests(now_s, stale_after_s),
        fresh=state.is_fresh(now_s, stale_after_s),
        kv_s=state.ttft_model(fleet_default, now_s, stale_after_s).kv_s,
        wait_s=state.wait_s(fleet_default, now_s, stale_after_s),
        predicted_s=state.first_token_s(uncached_tokens, fleet_default, now_s, stale_after_s),
    )


_NO_ENGINE = Refuse(RefuseReason.NO_ENGINE)
_NO_OTHER_ENGINE = Refuse(RefuseReason.NO_OTHER_ENGINE)
_SATURATED = Hold(HoldReason.SATURATED)
# A look-up of a member in its enum takes longer than the rest of building a decision.
_PREDICTED = DispatchPolicy.PREDICTED
_SESSION = SendReason.SESSION
_LEAST_PREDICTED = SendReason.LEAST_PREDICTED


def fleet_default_model(states: Sequence[TargetState]) -> StepTime:
    """Returns the step-time model of the first engine that has one; new engines are assumed to be like it."""
    for state in states:
        if state.step_time_model is not None:
            return state.step_time_model
    return DEFAULT_STEP_TIME


def _all_saturated(
    saturation_s: float,
    candidates: Sequence[TargetState],
    fleet_default: StepTime,
    settings: EngineSettings,
    now_s: float,
) -> bool:
    stale_after_s = settings.stale_after_s
    return all(state.wait_s(fleet_default, now_s, stale_after_s) >= saturation_s for state in candidates)


def _by_prediction(
    job: Job, candidates: Sequence[TargetState], fleet_default: StepTime, settings: EngineSettings, now_s: float
) -> Send:
    stale_after_s, session = settings.stale_after_s, job.session_target
    chosen = candidates[0].target
    least_s = session_s = math.inf
    for state in candidates:
        target = state.target
        predicted_s = state.first_token_s(job.uncached_tokens(target), fleet_default, now_s, stale_after_s)
        if predicted_s < least_s:
            chosen, least_s = target, predicted_s
        if target == session:
            session_s = predicted_s
    if session is not None and session_s <= least_s + settings.stickiness_s:
        return Send(session, session_s, _SESSION)
    return Send(chosen, least_s, _LEAST_PREDICTED)


def _by_requests(
    job: Job, candidates: Sequence[TargetState], fleet_default: StepTime, settings: EngineSettings, now_s: float
) -> Send:
    """The fewest requests, of whichever gateway; nothing else counts."""
    requests = [state.requests(now_s, settings.stale_after_s) for state in candidates]
    chosen = candidates[requests.index(min(requests))]
    return _send(job, chosen, fleet_default, settings, now_s, SendReason.LEAST_REQUESTS)


def _by_turn(
    job: Job, candidates: Sequence[TargetState], fleet_default: StepTime, settings: EngineSettings, now_s: float
) -> Send:
    return _send(job, candidates[0], fleet_default, settings, now_s, SendReason.TURN)


def _send(
    job: Job,
    chosen: TargetState,
    fleet_default: StepTime,
    settings: EngineSettings,
    now_s: float,
    reason: SendReason,
) -> Send:
    """Returns a choice that was made without predictions, with the prediction for the chosen target."""
    own_tokens = job.uncached_tokens(chosen.target)
    predicted_s = chosen.first_token_s(own_tokens, fleet_default, now_s, settings.stale_after_s)
    return Send(chosen.target, predicted_s, reason)


_Policy = Callable[[Job, Sequence[TargetState], StepTime, EngineSettings, float], Send]
_POLICIES: Mapping[DispatchPolicy, _Policy] = {
    DispatchPolicy.LEAST_REQUESTS: _by_requests,
    DispatchPolicy.PREDICTED: _by_prediction,
    DispatchPolicy.ROUND_ROBIN: _by_turn,
}
