"""Which engines compute prompts alone: `plan_roles`, called at intervals with the measured load.

Engines start alike (`UNIFIED`). A role is a preference of the dispatch (`engine/pair_choice.py`), so a change needs no
restart, and requests that run at the engine stay there. One engine changes at a time: a unified engine becomes a
prefill engine, or the other way round. All others stay unified, and the choice for each request uses them.

The cost of each number of prefill engines is predicted (`role_latency.py`): the mean time to the last token, as in
`LatencyTargets`; as there, a number does not count whose predicted TTFT exceeds that without prefill engines by more
than `ttft_growth`.

A change has to gain `least_gain` of the present cost, for `settle_s` without interruption, and to pay within
`horizon_s` for the answers that it interrupts. The measured costs before and after a change are compared: one that
made things worse is undone, and not tried again for `retry_s`.

Invariants: at least one engine is not a prefill engine; two changes are at least `interval_s` apart; a missing, stale
or implausible observation changes nothing; the decision depends on the arguments alone.
"""

import math
from dataclasses import dataclass, replace
from enum import StrEnum

from moe_scheduling.engine.disaggregation import EngineRole
from moe_scheduling.fleet.role_latency import RoleObservation, ServerLoad, predict_costs_s

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
        observation.prompt_variation,
        observation.answer_tokens,
        observation.transfer_s,
        observation.ranks - 1,
        observation.step_tokens - 1,
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
    costs_s = predict_costs_s(observation, settings.ttft_growth)
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
