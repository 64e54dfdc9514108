"""Predicted TTFT and time between tokens of a fleet with k prefill engines, for each k: what `roles.py` compares.

Each server is a queue that is served in batches: a step takes in the prompts that came during the one before it, up to
`step_tokens`, and gives one token to each answer. So a steady load settles at a mean step S in which (all for one rank)

    answers = answer tokens a second * S                                     (Little's law)
    share   = 1 - exp(-steps with prompt tokens a second * S)                (Poisson arrivals)
    S       = (decode_step_s(answers) + prefill_base_s * share) / left

`left` is the part of the time in which no prompt tokens are computed: a rank computes them in `busy` of its time, and
the ranks of a server end their steps together, so it is `(1 - busy)^ranks`. No step is longer than one with
`step_tokens`. A prompt waits for half of the step that it meets, which is long more often than not, in proportion to
its length, and is computed with those that came in that step too.

A prompt goes to a prefill engine while it is computed there in time, as the choice for each request has it; its answer
begins a transfer and `STEPS_TO_FIRST_TOKEN` steps later.

Prompts that no step has room for wait in a queue, the longer the more their lengths differ (`_queue_s`).

On step times of a measured GPU this came within 32 % of simulated TTFT and 44 % of the time between tokens
(docs/adr/0054-what-a-prefill-engine-does-not-see.md).

Invariants: pure; all results are at least 0, and infinite where the engines are full; a wait is finite.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from moe_scheduling.engine.disaggregation import STEPS_TO_FIRST_TOKEN, EngineRole
from moe_scheduling.engine.ttft_model import STEP_PREFILL_TOKENS
from moe_scheduling.signals import StepTime

# A mean step of this length is no service; vLLM's own clients have given up long before.
_LONGEST_STEP_S = 10.0
# Of the mean step, relative, and of the part of the prompts that go to prefill engines.
_PRECISION = 1e-4
_MOST_ROUNDS = 200
_ROUNDS_OF_PART = 12
# Part of the greatest load that a fleet can serve, in place of a greater one.
_MOST_LOAD = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerLoad:
    """One server that takes requests.

    Attributes:
        name: of the server.
        role: its present role.
        decoding: requests that decode there.
    """

    name: str
    role: EngineRole = EngineRole.UNIFIED
    decoding: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleObservation:
    """The load of a fleet of engines that are alike.

    Attributes:
        observed_s: its time, on the clock of `plan_roles`'s `now_s`.
        servers: those that take requests.
        ranks: data-parallel ranks of each, which compute prompts side by side.
        step_time: fitted step time of one server; None: unknown.
        step_tokens: most tokens of a step of a rank.
        requests_per_s: requests a second of the whole fleet.
        prompt_tokens: mean uncached tokens of a prompt.
        prompt_variation: variance of them over the square of the mean, at least 0: prompts of one length have 0.
        answer_tokens: mean tokens of an answer.
        transfer_s: mean seconds of a transfer of KV blocks.
        measured_s: mean measured time to the last token of the requests that ended since the last change; None: none.
    """

    observed_s: float
    servers: Sequence[ServerLoad]
    ranks: int = 1
    step_time: StepTime | None = None
    step_tokens: int = STEP_PREFILL_TOKENS
    requests_per_s: float = 0.0
    prompt_tokens: float = 0.0
    prompt_variation: float = 0.0
    answer_tokens: float = 0.0
    transfer_s: float = 0.0
    measured_s: float | None = None


def predict_costs_s(observation: RoleObservation, ttft_growth: float) -> list[float]:
    """Returns the predicted mean time to the last token for each number of prefill engines, from none to all but one.

    Infinite where engines are full, or the TTFT exceeds that without prefill engines by more than the growth. A load
    that no number can serve counts as one near the greatest that a number can, whatever the TTFT: without prefill
    engines that would grow without bound.

    Args:
        observation: the load; its `step_time` is known.
        ttft_growth: part by which prefill engines may lengthen the TTFT.
    """
    latest_s = (1.0 + ttft_growth) * _predict(observation, 0, 0.0).whole_s
    counts: Sequence[int] = range(len(observation.servers))
    serving = counts

    def predict(part: float, counts: Iterable[int]) -> list[float]:
        load = _part_of(observation, part)
        without_s = _find_whole_s(load)
        return [_predict_cost_s(load, count, ttft_growth, latest_s, without_s) for count in counts]

    def is_served(part: float) -> bool:
        # A number that cannot serve a load serves no greater one.
        nonlocal serving
        found = [count for count, cost_s in zip(serving, predict(part, serving), strict=True) if cost_s < math.inf]
        serving = found or serving
        return bool(found)

    costs_s = predict(1.0, counts)
    if min(costs_s, default=0.0) < math.inf:
        return costs_s
    return predict(_MOST_LOAD * _bisect(is_served, 1.0), counts)


def _predict_cost_s(
    observation: RoleObservation, prefilling: int, ttft_growth: float, latest_s: float, without_s: float
) -> float:
    ttft_s, inter_token_s = _predict_latency_s(observation, prefilling, ttft_growth, without_s)
    if ttft_s == math.inf or ttft_s > latest_s:
        return math.inf
    return ttft_s + observation.answer_tokens * inter_token_s


def predict_latency_s(observation: RoleObservation, prefilling: int, ttft_growth: float) -> tuple[float, float]:
    """Returns the predicted mean TTFT and time between tokens (seconds); both infinite where engines are full.

    Args:
        observation: the load; its `step_time` is known.
        prefilling: engines that compute prompts alone, fewer than all.
        ttft_growth: part by which prefill engines may lengthen the TTFT.
    """
    return _predict_latency_s(observation, prefilling, ttft_growth, _find_whole_s(observation) if prefilling else 0.0)


def _predict_latency_s(
    observation: RoleObservation, prefilling: int, ttft_growth: float, without_s: float
) -> tuple[float, float]:
    """Returns the same; `without_s` is the result of `_find_whole_s`, of which one serves for each number."""
    apart = _find_part_apart(observation, prefilling, ttft_growth, without_s) if prefilling else 0.0
    whole_s, prefill_s, inter_token_s = _predict(observation, prefilling, apart)
    if inter_token_s == math.inf:
        return math.inf, math.inf
    if not apart:
        return whole_s, inter_token_s
    pair_s = prefill_s + _after_prefill_s(observation, prefilling)
    return (1.0 - apart) * whole_s + apart * pair_s, inter_token_s


def find_prefill_wait_s(observation: RoleObservation, ttft_growth: float) -> float:
    """Returns the seconds that a prompt may wait at a prefill engine; 0 where nothing is known of the load.

    With them a prompt of mean length is computed within `1 + ttft_growth` times the predicted TTFT of the fleet without
    prefill engines. Where that fleet would be full it is that TTFT at the greatest load that it can serve, for a queue
    may not grow without bound.

    Args:
        observation: the load.
        ttft_growth: part by which prefill engines may lengthen the TTFT.
    """
    model = observation.step_time
    if model is None or not observation.servers or not observation.requests_per_s:
        return 0.0
    own_s = model.base_s + model.prefill_base_s + model.prefill_s * observation.prompt_tokens
    return max(0.0, (1.0 + ttft_growth) * _find_whole_s(observation) - own_s)


def _find_whole_s(observation: RoleObservation) -> float:
    """Returns the predicted TTFT without prefill engines at this load, or near the greatest one that is served; or 0.

    Near is the part `_MOST_LOAD`: at the very load that fills a fleet its queue has no end.
    """

    def at(part: float) -> float:
        return _predict(_part_of(observation, part), 0, 0.0).whole_s

    most = _find_most(lambda part: at(part) < math.inf, 1.0 / _MOST_LOAD)
    whole_s = at(_MOST_LOAD * most)
    return whole_s if whole_s < math.inf else 0.0


def _part_of(observation: RoleObservation, part: float) -> RoleObservation:
    return replace(observation, requests_per_s=part * observation.requests_per_s)


def _find_most(is_kept: Callable[[float], bool], most: float) -> float:
    """Returns the greatest part up to `most` that keeps a condition, which all below it keep; or 0."""
    return most if is_kept(most) else _bisect(is_kept, most)


def _bisect(is_kept: Callable[[float], bool], most: float) -> float:
    """Returns the same where `most` does not keep it."""
    least = 0.0
    for _ in range(_ROUNDS_OF_PART):
        part = (least + most) / 2
        least, most = (part, most) if is_kept(part) else (least, part)
    return least


def _find_part_apart(observation: RoleObservation, prefilling: int, ttft_growth: float, without_s: float) -> float:
    """Returns the part of the prompts that go to prefill engines, as many as have their first token in time.

    In time is within `1 + ttft_growth` times what it takes at the other engines, or would without prefill engines.
    """
    after_s = _after_prefill_s(observation, prefilling)

    def is_in_time(part: float) -> bool:
        whole_s, prefill_s, _ = _predict(observation, prefilling, part)
        latest_s = (1.0 + ttft_growth) * max(whole_s, without_s)
        return prefill_s < math.inf and prefill_s + after_s <= latest_s

    return _find_most(is_in_time, 1.0)


def _after_prefill_s(observation: RoleObservation, prefilling: int) -> float:
    """Returns the seconds from the end of a prompt at a prefill engine to the first token.

    As if no prompt interrupted the answers: a bound that shrinks with the prompts of the other engines would send them
    more.
    """
    inter_token_s = _predict(observation, prefilling, 1.0).inter_token_s
    return observation.transfer_s + (STEPS_TO_FIRST_TOKEN * inter_token_s if inter_token_s < math.inf else 0.0)


class _Prediction(NamedTuple):
    """Seconds until a prompt is computed at an engine that does everything and at a prefill engine, and between tokens.

    All are infinite where such an engine is full; that of prefill engines too where there is none.
    """

    whole_s: float
    prefill_s: float
    inter_token_s: float


def _predict(observation: RoleObservation, prefilling: int, apart: float) -> _Prediction:
    """Returns the prediction for this many prefill engines, to which a part of the prompts goes."""
    others = len(observation.servers) - prefilling
    prompts_per_s = observation.requests_per_s / observation.ranks
    answers_per_s = observation.answer_tokens * prompts_per_s / others
    mixed = _settle(observation, others, (1.0 - apart) * prompts_per_s / others, answers_per_s)
    alone = _settle(observation, prefilling, apart * prompts_per_s / prefilling, 0.0) if prefilling else _FULL
    return _Prediction(mixed.first_token_s, alone.first_token_s, mixed.mean_s)


class _Steps(NamedTuple):
    """The steps that a steady load settles at, in seconds.

    Attributes:
        mean_s: mean length.
        first_token_s: from the arrival of a prompt to the end of the step that computes it.
    """

    mean_s: float
    first_token_s: float


_FULL = _Steps(math.inf, math.inf)


def _settle(observation: RoleObservation, engines: int, prompts_per_s: float, answers_per_s: float) -> _Steps:
    """Returns the steps of a server; `_FULL` where it cannot serve the load.

    Args:
        observation: the load.
        engines: that share the prompts, of which each goes to the one with the least wait.
        prompts_per_s: prompts a second of each of its ranks.
        answers_per_s: tokens of answers a second of each.
    """
    model, prompt, step_tokens = observation.step_time, observation.prompt_tokens, observation.step_tokens
    assert model is not None
    prompt_s = prompt * model.prefill_s
    left = max(0.0, 1.0 - prompts_per_s * prompt_s) ** observation.ranks
    steps_per_s = observation.ranks * prompts_per_s * max(1.0, prompt / step_tokens)
    mean_s = 0.0
    for _ in range(_MOST_ROUNDS):
        before_s = mean_s
        decode_s = model.decode_step_s(answers_per_s * mean_s)
        share = -math.expm1(-steps_per_s * mean_s)
        mean_s = full_s = decode_s + model.prefill_base_s + model.prefill_s * step_tokens
        if left:
            mean_s = min(full_s, (decode_s + model.prefill_base_s * share) / left)
        if mean_s > _LONGEST_STEP_S:
            return _FULL
        if mean_s - before_s <= _PRECISION * mean_s:
            break
    if prompts_per_s * prompt * mean_s > step_tokens:
        return _FULL
    own_s = decode_s + model.prefill_base_s + prompt_s
    if answers_per_s:
        met, met_s = 1.0, _mean_step_met(mean_s, decode_s, share, full_s)
    else:
        # Without answers a step is made for prompts alone, and a prompt may come to an idle engine.
        met, met_s = min(1.0, observation.ranks * prompts_per_s * own_s), max(own_s, mean_s)
    # Prompts that came in the same step, at the rank with the most: 1 - left is the time of all ranks.
    spread = (1.0 - left) / (prompts_per_s * prompt_s) if prompts_per_s * prompt_s else 1.0
    beside = met * prompts_per_s * met_s * max(1.0, spread)
    steps = max(1.0, prompt * (1.0 + beside) / step_tokens)
    batch_s = met * met_s / 2 + prompt_s * beside + (steps - 1.0) * (decode_s + model.prefill_base_s)
    queue_s = _queue_s(observation, engines, prompts_per_s, full_s)
    return _Steps(mean_s, max(batch_s, queue_s) + own_s) if queue_s < math.inf else _FULL


def _queue_s(observation: RoleObservation, engines: int, prompts_per_s: float, full_s: float) -> float:
    """Returns the mean wait of prompts that are computed in full steps, one after the other.

    That is a queue of M/G/m with m ranks: (1 + variation) / 2 of that of M/M/m (Allen, Cunneen), for which Sakasegawa
    (1977) has rho^(sqrt(2 (m + 1)) - 1) / (m (1 - rho)) times the service.

    Args:
        observation: the load.
        engines: that share the prompts.
        prompts_per_s: of each rank.
        full_s: seconds of a full step.
    """
    service_s = observation.prompt_tokens * full_s / observation.step_tokens
    busy, ranks = prompts_per_s * service_s, engines * observation.ranks
    if busy >= 1.0:
        return math.inf
    power: float = busy ** (math.sqrt(2.0 * (ranks + 1)) - 1.0)
    part = power / (ranks * (1.0 - busy))
    return (1.0 + observation.prompt_variation) / 2 * service_s * part


def _mean_step_met(mean_s: float, decode_s: float, share: float, full_s: float) -> float:
    """Returns the mean length of the step that an arrival meets, where `share` of the steps have prompt tokens."""
    if not mean_s or not share:
        return mean_s
    with_prompts_s = min(full_s, (mean_s - (1.0 - share) * decode_s) / share)
    return (share * with_prompts_s**2 + (1.0 - share) * decode_s**2) / mean_s
