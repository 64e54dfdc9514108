"""Layer 1: how late the next step may be scheduled while one runs, so that it takes what comes until then.

With asynchronous scheduling an engine schedules a step as soon as the one before it begins. A request that comes then
waits for the rest of the step that runs and for a whole one that was scheduled without it. Scheduled just before the
end of the one that runs, the next step has that request in it, and the device still never waits.

Called by the scheduler of each rank for each step. Pure: the caller measures the time.

Invariants: a wait is never negative and never longer than what is predicted; where predictions are poor it is short.
"""

import math

# Seconds before the end of a step that the next one is scheduled at least: what launching one takes (assumed). Where it
# takes longer, steps overrun, and less of the prediction is waited for.
LEAD_S = 0.003
# Of the steps, the part that may end before the next one is launched: the device idles in these.
EARLY_SHARE = 0.05
# How far one step moves what is believed of all.
_GAIN = 0.05


class DeferredScheduling:
    """Learns which part of its predicted time a step takes at least.

    The part is a low quantile of measured over predicted time, tracked step by step (stochastic approximation: Robbins,
    Monro, "A Stochastic Approximation Method", 1951): it falls fast when steps end sooner than it says, and rises
    slowly while they do not.

    Args:
        early_share: the quantile: the share of steps that may end sooner.
    """

    __slots__ = ("_early_share", "_least_part")

    def __init__(self, *, early_share: float = EARLY_SHARE) -> None:
        self._early_share = early_share
        self._least_part = 0.5

    def observe(self, predicted_s: float, step_s: float, *, overran: bool = False) -> None:
        """A step took so long; what was not predicted, or took no time, teaches nothing.

        Args:
            predicted_s: how long it was to take.
            step_s: how long it took, as far as is known.
            overran: it had ended before the next one was launched: the wait, with what launching takes, was too long.
        """
        if not (0.0 < predicted_s < math.inf and 0.0 < step_s < math.inf):
            return
        is_early = overran or step_s < self._least_part * predicted_s
        moved = self._least_part + _GAIN * (self._early_share - is_early)
        self._least_part = min(1.0, max(0.0, moved))

    def wait_s(self, predicted_s: float) -> float:
        """Seconds after the begin of a step of the predicted time until the next one is scheduled."""
        return max(0.0, self._least_part * predicted_s - LEAD_S) if predicted_s < math.inf else 0.0
