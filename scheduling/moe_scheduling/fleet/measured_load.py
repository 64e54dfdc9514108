"""Rate, sizes and times of the recent requests, as one who sends them measures them: the input of `plan_roles`.

All times are arguments on one clock that begins near 0 or long before the first request.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace

from moe_scheduling.engine.disaggregation import EngineRole
from moe_scheduling.engine.target_state import TargetState
from moe_scheduling.engine.ttft_model import STEP_PREFILL_TOKENS
from moe_scheduling.fleet.role_latency import RoleObservation, ServerLoad
from moe_scheduling.signals import StepTime

# Time constant of the measured rates and means, in seconds.
_MEMORY_S = 30.0
# Weight of one answer in the mean length of answers.
_ANSWER_WEIGHT = 0.02
# Of prompts with hardly a token each the mean says nothing.
_LEAST_MEAN = 0.5
# A sender's part of the traffic counts as at least this.
_LEAST_SHARE = 0.01


@dataclass(slots=True)
class MeasuredLoad:
    """Rate and mean sizes of the recent requests, and their mean time to the last token since the last change.

    Attributes:
        answer_tokens: mean tokens of an answer.
    """

    answer_tokens: float = 128.0
    _count: float = 0.0
    _tokens: float = 0.0
    _squares: float = 0.0
    _at_s: float = 0.0
    _ended: int = 0
    _ended_s: float = 0.0

    def arrived(self, tokens: int, now_s: float) -> None:
        """A request came, with this number of uncached prompt tokens."""
        kept = math.exp((self._at_s - now_s) / _MEMORY_S)
        self._count, self._tokens, self._at_s = kept * self._count + 1.0, kept * self._tokens + tokens, now_s
        self._squares = kept * self._squares + tokens * tokens

    def ended(self, answer_tokens: float, lasted_s: float) -> None:
        """A request ended, `lasted_s` seconds after its arrival."""
        self.answer_tokens += _ANSWER_WEIGHT * (answer_tokens - self.answer_tokens)
        self._ended += 1
        self._ended_s += lasted_s

    def forget_measured(self) -> None:
        """Begins the mean anew after a change."""
        self._ended, self._ended_s = 0, 0.0

    def requests_per_s(self, now_s: float) -> float:
        """Returns arrivals a second; in the first seconds of a run the memory is as long as the run."""
        memory_s = _MEMORY_S * (1.0 - math.exp(-max(now_s, 1.0) / _MEMORY_S))
        return self._count * math.exp((self._at_s - now_s) / _MEMORY_S) / memory_s

    @property
    def prompt_tokens(self) -> float:
        """Mean tokens of the recent prompts."""
        return self._tokens / self._count if self._count else 0.0

    @property
    def prompt_variation(self) -> float:
        """Variance of the tokens of the recent prompts over the square of their mean."""
        mean = self.prompt_tokens
        # After hours without a request the sums of those before are next to nothing, and so is the square of a mean.
        return max(0.0, self._squares / self._count / mean**2 - 1.0) if mean >= _LEAST_MEAN else 0.0

    @property
    def measured_s(self) -> float | None:
        """Mean time to the last token since the last change; None without an answer."""
        return self._ended_s / self._ended if self._ended else None


def observe_roles(
    load: MeasuredLoad,
    states: Sequence[TargetState],
    roles: Mapping[str, EngineRole],
    *,
    transfer_s: float,
    now_s: float,
    stale_after_s: float,
    traffic_share: float = 1.0,
) -> RoleObservation:
    """Returns the load of engines as `plan_roles` reads it.

    Args:
        load: of the requests that one sender measured.
        states: of the targets that may change their role.
        roles: present role of each server; one that is absent is unified.
        transfer_s: seconds of a transfer of a mean prompt.
        now_s: the time.
        stale_after_s: age of a signal from which it is not used.
        traffic_share: part of the requests at the engines that this sender sends.
    """
    decoding: Counter[str] = Counter()
    for state in states:
        decoding[state.target.server] += state.decoding(now_s, stale_after_s)
    return RoleObservation(
        observed_s=now_s,
        servers=[
            ServerLoad(name=name, role=roles.get(name, EngineRole.UNIFIED), decoding=count)
            for name, count in decoding.items()
        ],
        ranks=max(1, round(len(states) / max(1, len(decoding)))),
        step_time=_step_time(states, roles),
        step_tokens=min(state.step_tokens for state in states) if states else STEP_PREFILL_TOKENS,
        requests_per_s=load.requests_per_s(now_s) / max(_LEAST_SHARE, traffic_share),
        prompt_tokens=load.prompt_tokens,
        prompt_variation=load.prompt_variation,
        answer_tokens=load.answer_tokens,
        transfer_s=transfer_s,
        measured_s=load.measured_s,
    )


def _step_time(states: Sequence[TargetState], roles: Mapping[str, EngineRole]) -> StepTime | None:
    """Returns the step-time model of an engine that does everything; None without one.

    Prefill engines decode nothing, and the others compute few prompts: each has the terms that it does not see from
    hardly any steps, or none. So with both there are, the time of steps with prompts is that of the prefill engines.
    """
    models: dict[bool, list[StepTime | None]] = {True: [], False: []}
    for state in states:
        models[roles.get(state.target.server) is EngineRole.PREFILL].append(state.step_time_model)
    prefill, decode = mean_step_time(models[True]), mean_step_time(models[False])
    if prefill is None or decode is None:
        return prefill or decode
    prompt_s = prefill.base_s + prefill.prefill_base_s
    return replace(decode, prefill_s=prefill.prefill_s, prefill_base_s=max(0.0, prompt_s - decode.base_s))


def mean_step_time(models: Iterable[StepTime | None]) -> StepTime | None:
    """Returns the mean of the models that are known; None without one."""
    known = [model for model in models if model is not None]
    if not known:
        return None
    terms = (field.name for field in fields(StepTime))
    return StepTime(**{term: sum(getattr(model, term) for model in known) / len(known) for term in terms})
