"""TTFT calibration: the ratio of measured to predicted time to first token, for each engine.

A step-time model covers the engine's steps alone. Everything else that takes time (the HTTP server of the engine, the
network, steps that the model misses, no model at all) shows in the TTFT. The gateway's dispatcher owns one
`TtftCalibration`, feeds it each first token, and copies the factors to `TargetState.ttft_factor` a few times a second.

The ranks of an engine have one factor. They step together, so none is slower than another: where the predictions for
one rank alone are wrong, its queue is the reason, and a factor for that rank would drive requests to the others.

A factor is a ratio of two sums, measured over predicted seconds, both decaying over `MEMORY_S`. So long predictions
count for more than short ones, in which the fixed cost of a request dominates. An engine with few observations is
assumed to be like the fleet, and the fleet like its step-time models: else a new engine would look fast beside others
whose models are all too fast.

Invariants: a factor is between `LEAST` and `MOST`; one observation counts as at most `OUTLIER` times and at least
1 / `OUTLIER` of the present factor, with a bounded weight; without observations a factor goes to 1; values that are not
plausible times change nothing. All calls are O(1).
"""

import math

from moe_scheduling.signals import Target

# Time constant of the sums, in seconds.
MEMORY_S = 30.0
LEAST, MOST = 1 / 8, 8.0
# Weight of the assumption about an engine before observations, in seconds of predictions.
PRIOR_S = 1.0
# Most weight of one observation. One long queue makes many answers late at once: none counts for more than a usual
# prefill.
MOST_WEIGHT_S = 0.25
# A stall, a preemption, a request that overtook many.
OUTLIER = 2.0
_LONGEST_S = 1e9


class TtftCalibration:
    """Learns the TTFT factor of each engine from first tokens.

    `now_s` is on one clock; a time before that of an earlier call counts as that one's.
    """

    __slots__ = ("_engines", "_fleet")

    def __init__(self) -> None:
        self._fleet = _Sums()
        self._engines: dict[str, _Sums] = {}

    def observe(self, target: Target, predicted_s: float, measured_s: float, now_s: float) -> None:
        """Takes one first token into account.

        Args:
            target: where it came from.
            predicted_s: the prediction, without any factor.
            measured_s: the TTFT.
            now_s: the time.
        """
        if not (0.0 < predicted_s < _LONGEST_S and 0.0 <= measured_s < _LONGEST_S):
            return
        present = self.factor(target, now_s)
        ratio = _within(measured_s / predicted_s, present / OUTLIER, present * OUTLIER)
        weight_s = min(predicted_s, MOST_WEIGHT_S)
        for sums in (self._fleet, self._engines.setdefault(target.server, _Sums())):
            sums.add(weight_s, weight_s * _within(ratio, LEAST, MOST), now_s)

    def factor(self, target: Target, now_s: float) -> float:
        """Returns the factor to multiply predictions for this target with."""
        fleet = self._fleet.ratio(1.0, now_s)
        sums = self._engines.get(target.server)
        return fleet if sums is None else sums.ratio(fleet, now_s)

    def forget(self, target: Target) -> None:
        """Drops the observations of the engine of a target, which was replaced or is gone."""
        self._engines.pop(target.server, None)


class _Sums:
    """Decaying sums of predicted and measured seconds, as of `_at_s`."""

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
