"""Layer 1: deferred scheduling, how long to wait before the next step is scheduled while one runs.

With asynchronous scheduling an engine schedules a step when the one before it begins. A request that arrives then waits
for the rest of the running step and for a whole step that was scheduled without it. Scheduled just before the end of
the running step, the next step includes that request, and the device still never waits.

Called by the scheduler of each rank for each step. Pure: the caller measures the time.

Invariants: a wait is never negative and never longer than the predicted step; where predictions are poor it is short.
"""

import math

# Seconds before the predicted end of a step at which the next one is scheduled at the latest: an assumption about the
# time of a launch. Where launching takes longer, steps overrun and the wait becomes shorter.
LEAD_S = 0.003
# Part of the steps that may end before the next one is launched; the device idles in these.
EARLY_SHARE = 0.05
# Step size of the tracked quantile.
_GAIN = 0.05


class DeferredScheduling:
    """Learns which part of its predicted time a step takes at least, and derives the wait.

    The part is a low quantile of measured over predicted time, tracked step by step (stochastic approximation: Robbins,
    Monro, "A Stochastic Approximation Method", 1951): it falls fast when steps end sooner, and rises slowly otherwise.

    Args:
        early_share: the quantile: part of the steps that may end sooner, 0 to 1.
    """

    __slots__ = ("_early_share", "_least_part")

    def __init__(self, *, early_share: float = EARLY_SHARE) -> None:
        self._early_share = early_share
        self._least_part = 0.5

    def observe(self, predicted_s: float, step_s: float, *, overran: bool = False) -> None:
        """Takes one step into account; times that are not positive and finite are ignored.

        Args:
            predicted_s: predicted time of the step.
            step_s: its measured time.
            overran: whether it had ended before the next one was launched, so that wait and launch were too long.
        """
        if not (0.0 < predicted_s < math.inf and 0.0 < step_s < math.inf):
            return
        is_early = overran or step_s < self._least_part * predicted_s
        moved = self._least_part + _GAIN * (self._early_share - is_early)
        self._least_part = min(1.0, max(0.0, moved))

    def wait_s(self, predicted_s: float) -> float:
        """Returns the seconds from the begin of a step of this predicted time until the next one is scheduled."""
        return max(0.0, self._least_part * predicted_s - LEAD_S) if predicted_s < math.inf else 0.0
