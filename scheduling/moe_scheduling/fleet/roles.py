"""Which engines compute prompts alone: `plan_roles`, called at intervals with the measured load.

Engines start alike (`UNIFIED`). A role is a preference of the dispatch (`engine/pair_choice.py`), so a change needs no
restart, and requests that run at the engine stay there. One engine changes at a time: a unified engine becomes a
prefill engine, or the other way round. All others stay unified, and the choice for each request uses them.

The load of k prefill engines among n alike is predicted by a queueing model. Prompts come as `prefill_s` seconds of
work for each token; a server at utilisation u answers a job of s seconds after s / (1 - u) (processor sharing,
Kleinrock, "Queueing Systems" II, 4.4). Answers decode in steps of base + request_s * n, in the part of the time that
prompts leave; by Little's law n = rate * answer tokens * time between tokens. The ranks of a server end their steps
together, so prompts interrupt its answers while any of them computes one: with independent ranks at utilisation u in
1 - (1 - u)^ranks of the time. No step is longer than one with full chunks. The cost of a request is its time to the
last token, as in `LatencyTargets`; as there, a number of prefill engines does not count whose predicted TTFT exceeds
that without any by more than `ttft_growth`.

A change has to gain `least_gain` of the present cost, for `settle_s` without interruption, and to pay within
`horizon_s` for the answers that it interrupts. The measured costs before and after a change are compared: one that
made things worse is undone, and not tried again for `retry_s`.

Invariants: at least one engine is not a prefill engine; two changes are at least `interval_s` apart; a missing, stale
or implausible observation changes nothing; the decision depends on the arguments alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import NamedTuple

from moe_scheduling.engine.disaggregation import EngineRole
from moe_scheduling.engine.ttft_model import STEP_PREFILL_TOKENS
from moe_scheduling.signals import StepTime

_LONGEST_STEP_S = 10.0
_MOST_ROUNDS = 200
_PRECISION = 1e-4
_ROUNDS_OF_PART = 12
# No rate, length or time of a fleet is greater.
_LARGEST = 1e9


class RoleReason(StrEnum):
    """Why a role changes, or why none does; a metric label."""

    GAIN = "gain"
    ROLLBACK = "rollback"
    FLOOR = "floor"
    IDLE = "idle"
    INTERVAL = "interval"
    NO_GAIN = "no_gain"
    RETRY = "retry"
    SETTLING = "settling"
    UNKNOWN = "unknown"
    UNPROFITABLE = "unprofitable"


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleSettings:
    """When a role changes.

    Attributes:
        least_gain: part of the present cost that a change has to gain.
        settle_s: seconds for which it has to be predicted without interruption.
        interval_s: least seconds between two changes.
        horizon_s: seconds within which a change has to pay for itself.
        tolerance: part of the measured cost by which a change may make things worse before it is undone.
        retry_s: seconds for which a change that was undone is not tried again.
        ttft_growth: part by which prefill engines may lengthen the predicted TTFT, as in `LatencyTargets`.
        stale_after_s: age of an observation from which it changes nothing.

    Raises:
        ValueError: a value is negative or not finite.
    """

    least_gain: float = 0.05
    settle_s: float = 15.0
    interval_s: float = 60.0
    horizon_s: float = 60.0
    tolerance: float = 0.1
    retry_s: float = 600.0
    ttft_growth: float = 0.5
    stale_after_s: float = 10.0

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least 0 and finite")


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
    answer_tokens: float = 0.0
    transfer_s: float = 0.0
    measured_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleHistory:
    """The evidence that decisions leave to later ones.

    Attributes:
        changed_s: time of the last change.
        favoured: number of prefill engines that is predicted to gain; None: none.
        since_s: since when.
        trial: the engine and its role before the last change, while that change may be undone.
        before_s: the measured cost before it.
        refused: number of prefill engines that was undone; None: none.
        refused_s: when.
    """

    changed_s: float = -math.inf
    favoured: int | None = None
    since_s: float = 0.0
    trial: tuple[str, EngineRole] | None = None
    before_s: float = 0.0
    refused: int | None = None
    refused_s: float = -math.inf


@dataclass(frozen=True, slots=True)
class SetRole:
    """Prefer this server for `role` from now on; `gain` is the predicted part of the cost, 0 for a rollback."""

    server: str
    role: EngineRole
    reason: RoleReason
    gain: float


@dataclass(frozen=True, slots=True)
class KeepRoles:
    """No role changes, for this reason."""

    reason: RoleReason


def plan_roles(
    observation: RoleObservation, settings: RoleSettings, history: RoleHistory, now_s: float
) -> tuple[SetRole | KeepRoles, RoleHistory]:
    """Returns the change of one role, or why none changes, and the history for the next call.

    Args:
        observation: the load.
        settings: when a role changes.
        history: of the call before.
        now_s: the time.
    """
    if not _is_usable(observation, settings, now_s):
        return KeepRoles(RoleReason.UNKNOWN), replace(history, favoured=None)
    if observation.measured_s is not None and not 0.0 <= observation.measured_s < _LARGEST:
        observation = replace(observation, measured_s=None)
    if now_s - history.changed_s < settings.interval_s:
        return KeepRoles(RoleReason.INTERVAL), history
    if history.trial is not None and observation.measured_s is not None:
        undone = _undo(observation, settings, history, history.trial, observation.measured_s, now_s)
        if undone is not None:
            return undone
        history = replace(history, trial=None)
    return _improve(observation, settings, history, now_s)


def _is_usable(observation: RoleObservation, settings: RoleSettings, now_s: float) -> bool:
    values = (
        observation.requests_per_s,
        observation.prompt_tokens,
        observation.answer_tokens,
        observation.transfer_s,
        observation.ranks - 1,
    )
    fresh = abs(now_s - observation.observed_s) <= settings.stale_after_s
    return fresh and observation.step_time is not None and all(0.0 <= value < _LARGEST for value in values)


def _undo(
    observation: RoleObservation,
    settings: RoleSettings,
    history: RoleHistory,
    trial: tuple[str, EngineRole],
    measured_s: float,
    now_s: float,
) -> tuple[SetRole, RoleHistory] | None:
    """Returns the change back, where the last change made things worse and its engine is still there."""
    server, role = trial
    is_there = any(row.name == server and row.role is not role for row in observation.servers)
    if not is_there or measured_s <= history.before_s * (1.0 + settings.tolerance):
        return None
    later = RoleHistory(changed_s=now_s, refused=_prefilling(observation), refused_s=now_s)
    return SetRole(server, role, RoleReason.ROLLBACK, 0.0), later


def _improve(
    observation: RoleObservation, settings: RoleSettings, history: RoleHistory, now_s: float
) -> tuple[SetRole | KeepRoles, RoleHistory]:
    now, most = _prefilling(observation), len(observation.servers) - 1
    waiting = replace(history, favoured=None)
    if most < 1 or observation.requests_per_s == 0.0:
        return KeepRoles(RoleReason.FLOOR if most < 1 else RoleReason.IDLE), waiting
    costs_s = [predict_cost_s(observation, count, settings.ttft_growth) for count in range(most + 1)]
    present_s = costs_s[now] if now <= most else math.inf
    best = min(range(most + 1), key=lambda count: (costs_s[count], abs(count - now)))
    gain = _gain(present_s, costs_s[best])
    if now <= most and (best == now or gain < settings.least_gain):
        return KeepRoles(RoleReason.NO_GAIN), waiting
    following = now + (1 if best > now else -1)
    if following == history.refused and now_s - history.refused_s < settings.retry_s:
        return KeepRoles(RoleReason.RETRY), waiting
    if history.favoured is None or (history.favoured > now) != (best > now):
        history = replace(history, favoured=best, since_s=now_s)
    if now_s - history.since_s < settings.settle_s:
        return KeepRoles(RoleReason.SETTLING), history
    server = _victim(observation, best > now)
    if best > now and not _pays(observation, settings, server, present_s - costs_s[best]):
        return KeepRoles(RoleReason.UNPROFITABLE), history
    role = EngineRole.PREFILL if best > now else EngineRole.UNIFIED
    return SetRole(server.name, role, RoleReason.GAIN, gain), _changed(observation, history, server, now_s)


def _changed(observation: RoleObservation, history: RoleHistory, server: ServerLoad, now_s: float) -> RoleHistory:
    """Returns the history after a change of this server, with the measured cost before it."""
    measured_s = observation.measured_s
    return RoleHistory(
        changed_s=now_s,
        trial=None if measured_s is None else (server.name, server.role),
        before_s=measured_s or 0.0,
        refused=history.refused,
        refused_s=history.refused_s,
    )


def _prefilling(observation: RoleObservation) -> int:
    return sum(server.role is EngineRole.PREFILL for server in observation.servers)


def _gain(present_s: float, best_s: float) -> float:
    """Returns the part of the present cost that is gained; 1 where the present load cannot be served."""
    if present_s == math.inf:
        return 0.0 if best_s == math.inf else 1.0
    return 1.0 - best_s / present_s if present_s else 0.0


def _victim(observation: RoleObservation, to_prefill: bool) -> ServerLoad:
    """Returns the engine that changes: of those that can, the one with the fewest answers; ties by name."""
    able = [row for row in observation.servers if (row.role is EngineRole.PREFILL) is not to_prefill]
    return min(able, key=lambda row: (row.decoding, row.name))


def _pays(observation: RoleObservation, settings: RoleSettings, server: ServerLoad, won_s: float) -> bool:
    """Returns whether the gain within the horizon exceeds the seconds that the engine's answers are interrupted.

    The answers that run there last for half of their tokens on average, each of which may meet a prompt.
    """
    assert observation.step_time is not None
    prompt_s = observation.step_time.prefill_s * observation.prompt_tokens / observation.ranks
    interrupted_s = server.decoding * min(observation.answer_tokens / 2, observation.requests_per_s) * prompt_s
    return won_s * observation.requests_per_s * settings.horizon_s > interrupted_s


def predict_cost_s(observation: RoleObservation, prefilling: int, ttft_growth: float) -> float:
    """Returns the predicted mean time to the last token with this many prefill engines; infinite where they are full.

    Args:
        observation: the load; its `step_time` is known.
        prefilling: engines that compute prompts alone, fewer than all.
        ttft_growth: as in `RoleSettings`.
    """
    ttft_s, inter_token_s = predict_latency_s(observation, prefilling, ttft_growth)
    if ttft_s == math.inf or ttft_s > (1.0 + ttft_growth) * predict_latency_s(observation, 0, ttft_growth)[0]:
        return math.inf
    return ttft_s + observation.answer_tokens * inter_token_s


def predict_latency_s(observation: RoleObservation, prefilling: int, ttft_growth: float) -> tuple[float, float]:
    """Returns the predicted mean TTFT and time between tokens (seconds); both infinite where engines are full.

    Args:
        observation: the load; its `step_time` is known.
        prefilling: engines that compute prompts alone, fewer than all.
        ttft_growth: as in `RoleSettings`.
    """
    apart = _find_part_apart(observation, prefilling, ttft_growth) if prefilling else 0.0
    whole_s, prefill_s, inter_token_s = _latencies_s(observation, prefilling, apart)
    if apart:
        # A request that arrives at the one that decodes waits for half of a step, and takes part in the next.
        prefill_s += observation.transfer_s + 1.5 * inter_token_s
    return (1.0 - apart) * whole_s + (apart * prefill_s if apart else 0.0), inter_token_s


def find_prefill_wait_s(observation: RoleObservation, ttft_growth: float) -> float:
    """Returns the seconds that a prompt may wait at a prefill engine; 0 where nothing is known of the load.

    With them a prompt of mean length is computed within `1 + ttft_growth` times the predicted TTFT of a fleet without
    prefill engines.

    Args:
        observation: the load.
        ttft_growth: as in `RoleSettings`.
    """
    model = observation.step_time
    if model is None or not observation.servers or not observation.requests_per_s:
        return 0.0
    own_s = model.base_s + model.prefill_base_s + model.prefill_s * observation.prompt_tokens
    return max(0.0, (1.0 + ttft_growth) * _latencies_s(observation, 0, 0.0)[0] - own_s)


def _find_part_apart(observation: RoleObservation, prefilling: int, ttft_growth: float) -> float:
    """Returns the part of the prompts that go to prefill engines: as many as are computed there in time.

    The choice for each request sends a prompt there while that is done within `1 + ttft_growth` times what it takes at
    the other engines, or would without prefill engines.
    """
    least, most = 0.0, 1.0
    without_s = _latencies_s(observation, 0, 0.0)[0]
    for _ in range(_ROUNDS_OF_PART):
        part = most if most == 1.0 and least == 0.0 else (least + most) / 2
        whole_s, prefill_s, _ = _latencies_s(observation, prefilling, part)
        if prefill_s <= (1.0 + ttft_growth) * max(whole_s, without_s) and prefill_s < math.inf:
            least = part
            if part == 1.0:
                break
        else:
            most = part if part < 1.0 else 1.0 - _PRECISION
    return least


def _latencies_s(observation: RoleObservation, prefilling: int, apart: float) -> tuple[float, float, float]:
    """TODO ttft whole, until computed at prefill engine, inter-token."""
    unified = len(observation.servers) - prefilling
    prompts = observation.requests_per_s / observation.ranks
    mixed = _settle_steps(observation, (1.0 - apart) * prompts / unified, observation.answer_tokens * prompts / unified)
    alone = _settle_steps(observation, apart * prompts / prefilling, 0.0) if prefilling else None
    whole_s = math.inf if mixed is None else mixed.first_token_s
    prefill_s = math.inf if alone is None else alone.first_token_s
    return whole_s, prefill_s, math.inf if mixed is None else mixed.mean_s


class _Steps(NamedTuple):
    """The steps of a server that a steady load settles at.

    Attributes:
        mean_s: mean length.
        first_token_s: from the arrival of a prompt to the end of the step that computes it.
    """

    mean_s: float
    first_token_s: float


def _settle_steps(observation: RoleObservation, prompts_per_s: float, answers_per_s: float) -> _Steps | None:
    """Returns the steps of a server; None where it is full.

    Args:
        observation: the load.
        prompts_per_s: prompts a second of each of its ranks.
        answers_per_s: tokens of answers a second of each.
    """
    model, ranks, step_tokens, prompt = (
        observation.step_time,
        observation.ranks,
        observation.step_tokens,
        observation.prompt_tokens,
    )
    assert model is not None
    prompt_s = prompt * model.prefill_s
    busy = min(1.0, prompts_per_s * prompt_s)
    left = (1.0 - busy) ** ranks
    # How much the tokens of the fullest rank exceed those of one.
    spread = (1.0 - left) / busy if busy else 1.0
    steps_per_s = ranks * prompts_per_s * max(1.0, prompt / step_tokens)
    full_s = model.prefill_base_s + model.prefill_s * step_tokens
    mean_s, decode_s, share = 0.0, model.base_s, 0.0
    for _ in range(_MOST_ROUNDS):
        decode_s = model.decode_step_s(answers_per_s * mean_s)
        share = -math.expm1(-steps_per_s * mean_s)
        open_s = (decode_s + model.prefill_base_s * share) / left if left else math.inf
        before_s, mean_s = mean_s, min(open_s, decode_s + full_s)
        if mean_s > _LONGEST_STEP_S:
            return None
        if mean_s - before_s <= _PRECISION * mean_s:
            break
    if prompts_per_s * prompt * mean_s > step_tokens:
        return None
    own_s = decode_s + model.prefill_base_s + prompt_s
    if answers_per_s:
        beside_s = (mean_s - (1.0 - share) * decode_s) / share if share else own_s
        meets_s = (share * beside_s**2 + (1.0 - share) * decode_s**2) / mean_s
        met = 1.0
    else:
        # Without answers there is a step only while there are prompts.
        meets_s = max(own_s, mean_s)
        met = min(1.0, ranks * prompts_per_s * own_s)
    others = met * prompts_per_s * meets_s * spread
    tokens = prompt * (1.0 + others)
    more = max(1.0, tokens / step_tokens)
    first_token_s = met * meets_s / 2 + more * (decode_s + model.prefill_base_s) + prompt_s * (1.0 + others)
    return _Steps(mean_s, first_token_s)
