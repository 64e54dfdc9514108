"""The conditions that passes judge by the traffic they have seen: `Disaggregated` and `TargetsMet`.

`TrafficWatch` is owned by the reconciler.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from moe_operator.api.reasons import Reason
from moe_operator.api.resource import MoEServing
from moe_operator.api.status import Condition
from moe_operator.autoscale.signal import States
from moe_operator.experts.report import Verdict
from moe_operator.kubernetes.conditions import ConditionInputs
from moe_operator.kubernetes.store import Key
from moe_operator.kubernetes.transfers import CONDITION as DISAGGREGATED
from moe_operator.kubernetes.transfers import TransferWatch, is_apart
from moe_operator.targets.report import CONDITION as TARGETS_MET
from moe_operator.targets.report import Judgement, judge_targets, read_facts, read_kept

Document = dict[str, object]
# A message with other numbers is written this often, as the numbers of the status are.
NUMBERS_EVERY_S = 30.0


@dataclass(frozen=True, slots=True)
class _Said:
    judged: Judgement
    at_s: float


class TrafficWatch:
    """Remembers from pass to pass what the conditions by traffic look back on.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._transfers = TransferWatch()
        self._said: dict[Key, _Said] = {}

    def forget(self, key: Key) -> None:
        """Drops what is kept for a resource that was deleted."""
        self._transfers.forget(key)
        self._said.pop(key, None)

    def judge(
        self, inputs: ConditionInputs, key: Key, document: Document, states: States, before: Mapping[str, Condition]
    ) -> ConditionInputs:
        """Returns the inputs of the conditions with the verdicts by traffic, of resources that ask for one.

        Args:
            inputs: of the conditions.
            key: of the resource.
            document: the resource.
            states: of its agents and gateways. Where they were not asked, the verdicts of before stand.
            before: the conditions until now.
        """
        if is_apart(document):
            verdict = self._transfers.judge(key, states, before.get(DISAGGREGATED), self._clock())
            inputs = replace(inputs, transfers=verdict)
        return replace(inputs, targets=self._judge_targets(key, document, states, before.get(TARGETS_MET)))

    def _judge_targets(self, key: Key, document: Document, states: States, before: Condition | None) -> Verdict | None:
        facts = read_facts(document)
        if facts is None:
            self._said.pop(key, None)
            return None
        if not states.asked:
            is_known = before is not None and before.reason in set(Reason)
            return (before.status, Reason(before.reason), before.message) if before is not None and is_known else None
        said = self._said.get(key)
        kept = read_kept(facts, before) if said is None else said.judged.kept
        judged, now_s = judge_targets(facts, states.gateways.values(), kept), self._clock()
        if said is not None and _says_the_same(said.judged, judged) and now_s - said.at_s < NUMBERS_EVERY_S:
            return said.judged.verdict
        self._said[key] = _Said(judged, now_s)
        return judged.verdict


def _says_the_same(before: Judgement, now: Judgement) -> bool:
    """Whether both differ in numbers alone."""
    return before.verdict[:2] == now.verdict[:2] and before.kept == now.kept


def changes_unseen(resource: MoEServing) -> bool:
    """Whether a condition of the resource changes by time or by numbers, which bring no pass."""
    engine, targets = resource.spec.engine, resource.spec.scheduling.engine.targets
    is_bounded = targets.ttft is not None or targets.inter_token is not None
    return engine.parallelism.expert or engine.roles.apart or is_bounded
