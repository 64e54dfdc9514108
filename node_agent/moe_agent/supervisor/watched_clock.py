"""A clock that stands still while its process does: stopped by a signal, or frozen with its container.

Used by the supervisor, which reads it at each health check. An engine that was frozen together with its agent has
answered nothing meanwhile, and is not to blame for it.
"""

import math
import time
from collections.abc import Callable

# Far above the time between two health checks, each of which waits for its answer for some seconds.
MOST_GAP_S = 30.0


class WatchedClock:
    """Monotonic seconds without the gaps between two readings that are longer than a working process makes.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._last_s, self._left_out_s = clock, math.inf, 0.0

    def read(self) -> float:
        """The time; never more than `time.monotonic` says."""
        now_s = self._clock()
        if (gap_s := now_s - self._last_s) > MOST_GAP_S:
            self._left_out_s += gap_s
        self._last_s = now_s
        return now_s - self._left_out_s
