"""The status of experts in the resource, from the agents' documents: `status.experts` and `ExpertsBalanced`. Pure.

A deployment may have several engines, each with its own expert group: the status is that of the engine in the worst
state.
"""

from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta
from typing import Final

from moe_contract.agent_state import AgentState
from moe_contract.experts_state import OFF, Decision, ExpertsState

from moe_operator.api.reasons import Reason
from moe_operator.api.status import Condition, ConditionStatus, ExpertDecision, ExpertProblem, ExpertsStatus

CONDITION = "ExpertsBalanced"
Verdict = tuple[ConditionStatus, Reason, str]
TRUE, FALSE, UNKNOWN = ConditionStatus.TRUE, ConditionStatus.FALSE, ConditionStatus.UNKNOWN
# Load of the busiest rank over the mean up to which experts count as balanced; an unbalanced group counts as balanced
# again below the second, so that a load between the two gives no series of events.
BALANCED_UP_TO, BALANCED_AGAIN = 1.2, 1.1
_TERSE = 1000
# Kind of the problem of a model whose experts vLLM cannot balance.
_NOT_SUPPORTED = "not_supported"

_PROBLEMS: Final = {
    "version_skew": (Reason.VERSION_SKEW, "its ranks hold different placements; restart that engine"),
    "slow_move": (
        Reason.SLOW_MOVE,
        "moving takes longer than it may; lower scheduling.expert.moveBudget or set mode observe",
    ),
    "no_decision": (
        Reason.NO_DECISION,
        "nothing decides any more; look into the engine's log, restart it if this stays",
    ),
}
# Reasons of the condition that need a person.
TO_ACT_ON = frozenset({*(reason for reason, _ in _PROBLEMS.values()), Reason.MOVE_FAILED})


def build_experts(
    documents: Mapping[str, ExpertsState], now: datetime, agents: Mapping[str, AgentState]
) -> ExpertsStatus:
    """Returns the status of the engine in the worst state: one with problems, else the least balanced, else the first.

    Args:
        documents: what each engine says of its experts.
        now: the present time.
        agents: what each engine's agent says; an engine whose experts cannot be balanced has no document.
    """
    if not documents:
        return _build_not_balanced(agents)
    name = max(sorted(documents), key=lambda name: _badness(documents[name]))
    document = documents[name]
    balance = document.recorded
    return ExpertsStatus(
        engine=name,
        mode=document.mode,
        balance=None if balance is None else _ratio(balance.mean),
        remote_fraction=None if document.remote_fraction is None else round(document.remote_fraction, 2),
        placement_version=document.placement.version,
        last_decision=None if document.newest is None else _build_decision(document.newest, now),
        problems=tuple(ExpertProblem(kind=row.kind, message=row.message[:_TERSE]) for row in document.problems),
    )


def _build_not_balanced(agents: Mapping[str, AgentState]) -> ExpertsStatus:
    """Returns the status of the first engine whose experts vLLM cannot balance, or an empty one."""
    for name, agent in sorted(agents.items()):
        if message := agent.engine.not_balanced[:_TERSE]:
            return ExpertsStatus(engine=name, problems=(ExpertProblem(kind=_NOT_SUPPORTED, message=message),))
    return ExpertsStatus()


def _badness(document: ExpertsState) -> tuple[bool, float]:
    grave = any(row.kind in _PROBLEMS for row in document.problems)
    return grave, 0.0 if document.recorded is None else document.recorded.mean


def _build_decision(decision: Decision, now: datetime) -> ExpertDecision:
    time = (now - timedelta(seconds=decision.age_s)).replace(microsecond=0)
    return ExpertDecision(
        outcome=decision.outcome,
        reason=decision.reason[:_TERSE],
        time=time,
        moves=decision.moves,
        balance_before=None if decision.balance_before is None else _ratio(decision.balance_before),
        balance_after=None if decision.balance_after is None else _ratio(decision.balance_after),
    )


def _ratio(value: float) -> float:
    """Returns a ratio to two digits, at least 1: rounding in the engine may give less."""
    return max(1.0, round(value, 2))


def judge_experts(experts: ExpertsStatus, *, has_group: bool, before: Condition | None) -> Verdict:
    """Returns status, reason and message of the condition.

    Args:
        experts: what the engines say.
        has_group: whether the resource asks for expert parallelism.
        before: the condition as it was; None when it is new.
    """
    if (verdict := _judge_silence(experts, has_group=has_group) or next(_judge_problems(experts), None)) is not None:
        return verdict
    if experts.balance is None:
        return UNKNOWN, Reason.NOT_RECORDED, f"{experts.engine} has recorded no load yet; it does once requests come"
    limit = BALANCED_AGAIN if before is not None and before.status is FALSE else BALANCED_UP_TO
    busiest = f"{experts.engine}: the busiest rank has {experts.balance:.2f} times the mean load"
    if experts.balance <= limit:
        return TRUE, Reason.BALANCED, busiest
    reason, advice = _explain_imbalance(experts)
    return FALSE, reason, f"{busiest}; {advice}"[:_TERSE]


def _judge_silence(experts: ExpertsStatus, *, has_group: bool) -> Verdict | None:
    """Returns the verdict where nothing is known; None where something is."""
    if not has_group:
        message = "spec.engine.parallelism.expert is not set: nothing to balance, scheduling.expert has no effect"
        return UNKNOWN, Reason.NO_EXPERT_GROUP, message
    unsupported = next((row.message for row in experts.problems if row.kind == _NOT_SUPPORTED), None)
    if unsupported is not None:
        message = f"{unsupported}: they lie as vLLM spreads them, and scheduling.expert has no effect"
        return UNKNOWN, Reason.NOT_SUPPORTED, message
    if experts.mode is None:
        return UNKNOWN, Reason.NOT_RECORDED, "no engine says anything of its experts yet"
    if experts.mode == OFF:
        how = "set spec.scheduling.expert.mode to observe or dryRun to see it"
        return UNKNOWN, Reason.OFF, f"the load of the experts is not recorded; {how}"
    return None


def _judge_problems(experts: ExpertsStatus) -> Iterator[Verdict]:
    messages = {row.kind: row.message for row in experts.problems}
    for kind, (reason, advice) in _PROBLEMS.items():
        if kind in messages:
            yield FALSE, reason, f"{experts.engine}: {advice} ({messages[kind]})"[:_TERSE]
    last = experts.last_decision
    if last is not None and last.outcome == "failed":
        advice = "moving experts failed; what holds is the placement before it"
        yield FALSE, Reason.MOVE_FAILED, f"{experts.engine}: {advice} ({last.reason})"[:_TERSE]


def _explain_imbalance(experts: ExpertsStatus) -> tuple[Reason, str]:
    """Returns the reason of an imbalance and the advice."""
    backoff = next((row.message for row in experts.problems if row.kind == "backoff"), None)
    if backoff is not None:
        how = "moving did not pay and was undone; the engine waits before it tries again"
        return Reason.ROLLED_BACK, f"{how}: {backoff}"
    if experts.mode == "observe":
        how = "with spec.scheduling.expert.mode dryRun it tells what would"
        return Reason.IMBALANCED, f"mode observe decides nothing; {how}"
    if experts.last_decision is None:
        how = "the first decision comes after spec.scheduling.expert.interval"
        return Reason.IMBALANCED, f"nothing was decided yet; {how}"
    return _explain_decision(experts.last_decision)


def _explain_decision(last: ExpertDecision) -> tuple[Reason, str]:
    match last.outcome:
        case "dryRun":
            after = "" if last.balance_after is None else f" for a balance of {last.balance_after:.2f}"
            how = "look with `moeserving experts show`, then `apply`, or set spec.scheduling.expert.mode to active"
            return Reason.DRY_RUN_WOULD_MOVE, f"a dry run would move {last.moves} experts{after}: {how}"
        case "rolledBack":
            return Reason.ROLLED_BACK, f"the last move was rolled back: {last.reason}"
        case "stayed":
            return Reason.IMBALANCED, f"nothing was moved: {last.reason}"
        case _:
            return Reason.IMBALANCED, "the last change does not show yet or was not enough; the next decision sees it"
