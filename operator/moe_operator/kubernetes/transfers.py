"""The condition `Disaggregated`: whether KV blocks travel between the engines of a resource, seen by what arrived.

By traffic and never by the resource: a deployment whose engines could exchange blocks and do not says so. The condition
stands in the status of resources whose `engine.roles` are not unified. `TransferWatch` is owned by the reconciler; all
else is pure.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from moe_contract.agent_state import AgentState
from moe_contract.engine_process import NO_CONNECTOR
from moe_contract.kv_transfer import KvTransferState
from moe_scheduling.engine.disaggregation import EngineRole

from moe_operator.api.reasons import Reason
from moe_operator.api.roles import RoleMode
from moe_operator.api.status import Condition, ConditionStatus
from moe_operator.autoscale.signal import States
from moe_operator.experts.report import Verdict
from moe_operator.kubernetes.store import Key

CONDITION = "Disaggregated"
# For so long a transfer counts as traffic, in seconds.
RECENT_S = 60.0
# Reasons that need a person.
TO_ACT_ON = frozenset({Reason.CONNECTOR_MISSING, Reason.PEERS_DIFFER, Reason.TRANSFERS_FAILING})
_NONE = float("-inf")


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Transfers to the engines of a resource within the last minute.

    Attributes:
        moved: whether one succeeded.
        failed: whether one failed.
    """

    moved: bool = False
    failed: bool = False


@dataclass(slots=True)
class _Seen:
    """The counters of one engine, and when each last rose (monotonic seconds)."""

    transfers: int
    failed: int
    moved_s: float = _NONE
    failed_s: float = _NONE


class TransferWatch:
    """Remembers the counters of engines from pass to pass."""

    def __init__(self) -> None:
        self._seen: dict[Key, dict[str, _Seen]] = {}

    def forget(self, key: Key) -> None:
        """Drops what is kept for a resource that was deleted."""
        self._seen.pop(key, None)

    def judge(self, key: Key, states: States, before: Condition | None, now_s: float) -> Verdict | None:
        """Returns the verdict over a resource; None where there is none to keep.

        Args:
            key: of the resource.
            states: of its agents. Where they were not asked, the verdict of before stands and no counter is touched.
            before: the condition until now.
            now_s: monotonic time.
        """
        if states.asked:
            return judge_transfers(states.engines, self.observe(key, states.engines, now_s))
        if before is None or before.reason not in set(Reason):
            return None
        return before.status, Reason(before.reason), before.message

    def observe(self, key: Key, engines: Mapping[str, AgentState], now_s: float) -> Traffic:
        """The traffic of the last minute, as far as the passes of this operator have seen it.

        Args:
            key: of the resource.
            engines: states of its agents, by pod.
            now_s: monotonic time.
        """
        before = self._seen.get(key, {})
        states = {name: state.kv_transfer for name, state in engines.items() if state.kv_transfer is not None}
        seen = {name: _look(before.get(name), state, now_s) for name, state in states.items()}
        # Of an engine that has gone, what it did last still counts.
        gone = {name: row for name, row in before.items() if name not in seen and _is_recent(row, now_s)}
        self._seen[key] = {**gone, **seen}
        rows = self._seen[key].values()
        return Traffic(
            moved=any(now_s - row.moved_s <= RECENT_S for row in rows),
            failed=any(now_s - row.failed_s <= RECENT_S for row in rows),
        )


def _look(before: _Seen | None, state: KvTransferState, now_s: float) -> _Seen:
    if before is None:
        # Counters of an engine that is seen for the first time say nothing of when.
        return _Seen(state.transfers, state.failed)
    # An engine that was started anew counts from zero.
    moved = state.transfers > (before.transfers if state.transfers >= before.transfers else 0)
    failed = state.failed > (before.failed if state.failed >= before.failed else 0)
    return _Seen(
        state.transfers, state.failed, now_s if moved else before.moved_s, now_s if failed else before.failed_s
    )


def _is_recent(row: _Seen, now_s: float) -> bool:
    return now_s - max(row.moved_s, row.failed_s) <= RECENT_S


def judge_transfers(engines: Mapping[str, AgentState], traffic: Traffic) -> tuple[ConditionStatus, Reason, str]:
    """The verdict over a resource whose engines should exchange KV blocks."""
    if traffic.moved:
        return ConditionStatus.TRUE, Reason.TRANSFERRING, "KV blocks have arrived at an engine in the last minute"
    return (ConditionStatus.FALSE, *_why_not(engines, traffic))


def _why_not(engines: Mapping[str, AgentState], traffic: Traffic) -> tuple[Reason, str]:
    without = sorted(name for name, state in engines.items() if state.engine.last_exit.startswith(NO_CONNECTOR))
    if without:
        return Reason.CONNECTOR_MISSING, f"{', '.join(without)}: {engines[without[0]].engine.last_exit}"
    if traffic.failed:
        advice = (
            "look at the engines' logs, whether their pods reach each other on all ports, and whether their nodes' "
            "clocks agree within 10 s"
        )
        return Reason.TRANSFERS_FAILING, f"transfers failed in the last minute and none succeeded; {advice}"
    known = [state.kv_transfer for state in engines.values() if state.ready and state.kv_transfer is not None]
    known = [state for state in known if state.peers]
    if not has_pair(known):
        if len({state.peers for state in known}) > 1:
            advice = "they differ in version, model, types or arguments; give all engines the same image and arguments"
            return Reason.PEERS_DIFFER, f"no two engines can exchange KV blocks: {advice}"
        return Reason.NO_PEERS, "there are no two ready engines yet of which one may compute for the other"
    return Reason.NO_TRANSFERS, "no KV blocks have arrived in the last minute: no request was split, or none came"


def is_apart(document: Mapping[str, Any]) -> bool:
    """Whether the engines of a resource should exchange KV blocks; one that is not valid says it as far as it can."""
    part: Any = document.get("spec")
    for name in ("engine", "roles", "mode"):
        part = part.get(name) if isinstance(part, Mapping) else None
    return part in (RoleMode.AUTO, RoleMode.FIXED)


def has_pair(engines: Iterable[KvTransferState]) -> bool:
    """Whether one of the engines may compute prompts for another one that fits it."""
    rows = [*engines]
    return any(
        first.peers == second.peers and first.role is not EngineRole.DECODE and second.role is not EngineRole.PREFILL
        for place, first in enumerate(rows)
        for other, second in enumerate(rows)
        if place != other
    )
