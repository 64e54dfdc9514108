"""How much slower each target answers than is predicted, learned from what was predicted and what was measured.

A line of step times knows the engine's steps alone. What else takes time (the server around the engine, the network, a
step that the line misses, no line at all) shows in the time to the first token. The gateway's dispatcher owns one
`TtftCalibration`, tells it each first token, and writes the factors into the books (`TargetBooks.ttft_factor`) a few
times a second.

A factor is a ratio of two sums, measured over predicted seconds, both forgotten over `MEMORY_S`: long predictions count
for more than short ones, in which what every request costs alike weighs most. A target of which little was seen is
taken to be like the fleet, and the fleet like its lines: else a new engine would look fast beside others whose lines
are all too fast.

Invariants: a factor is within `LEAST` and `MOST`; one observation counts as no more than twice and no less than half of
what was believed, with a weight that is bounded; without observations a factor goes to 1; observations that are no
times change nothing. All calls are O(1).
"""

import math

from moe_scheduling.signals import Target

MEMORY_S = 30.0
LEAST, MOST = 1 / 8, 8.0
# Seconds of predictions that say as much of a target as was taken for granted before.
PRIOR_S = 1.0
# A queue is one cause of many late answers: none of them counts as more than a usual prefill.
MOST_WEIGHT_S = 0.25
# A stall, a preemption, a request that overtook many.
OUTLIER = 2.0
_LONGEST_S = 1e9


class TtftCalibration:
    """See the module. `now_s` is on one clock; a time before that of an earlier call counts as that one's."""

    __slots__ = ("_fleet", "_targets")

    def __init__(self) -> None:
        self._fleet = _Sums()
        self._targets: dict[Target, _Sums] = {}

    def observe(self, target: Target, predicted_s: float, measured_s: float, now_s: float) -> None:
        """A first token came after `measured_s`; the books had predicted `predicted_s`, without a correction."""
        if not (0.0 < predicted_s < _LONGEST_S and 0.0 <= measured_s < _LONGEST_S):
            return
        believed = self.factor(target, now_s)
        ratio = _within(measured_s / predicted_s, believed / OUTLIER, believed * OUTLIER)
        weight_s = min(predicted_s, MOST_WEIGHT_S)
        for sums in (self._fleet, self._targets.setdefault(target, _Sums())):
            sums.add(weight_s, weight_s * _within(ratio, LEAST, MOST), now_s)

    def factor(self, target: Target, now_s: float) -> float:
        """What a prediction for this target is to be multiplied with."""
        common = self._fleet.ratio(1.0, now_s)
        sums = self._targets.get(target)
        return common if sums is None else sums.ratio(common, now_s)

    def forget(self, target: Target) -> None:
        """This target is another engine from now on, or gone."""
        self._targets.pop(target, None)


class _Sums:
    """Of predicted and measured seconds, as of `at_s`."""

    __slots__ = ("_at_s", "_measured_s", "_predicted_s")

    def __init__(self) -> None:
        self._at_s = -math.inf
        self._predicted_s = self._measured_s = 0.0

    def add(self, predicted_s: float, measured_s: float, now_s: float) -> None:
        kept = self._kept(now_s)
        self._predicted_s = kept * self._predicted_s + predicted_s
        self._measured_s = kept * self._measured_s + measured_s
        self._at_s = max(self._at_s, now_s)

    def ratio(self, prior: float, now_s: float) -> float:
        kept = self._kept(now_s)
        ratio = (PRIOR_S * prior + kept * self._measured_s) / (PRIOR_S + kept * self._predicted_s)
        # Sums round; the bound is exact.
        return _within(ratio, LEAST, MOST)

    def _kept(self, now_s: float) -> float:
        return math.exp(min(0.0, (self._at_s - now_s) / MEMORY_S))


def _within(value: float, least: float, most: float) -> float:
    return min(most, max(least, value))
