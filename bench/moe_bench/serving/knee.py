"""Where stock's knee is: the rate of arrivals at which its mean TTFT is five times that of requests served alone.

Found by bisection about the measured capacity, each time with the same requests in the same order and other text. A
real engine's TTFT at one rate is noisy, so the rates are few and the answer is that of the middle of what is left.
"""

import math
from collections.abc import Awaitable, Callable

from moe_bench.comparison import mean_ttft_ms
from moe_bench.experiments.saturation import KNEE_FACTOR
from moe_bench.replay import Run

PROBES = 5
# Of the capacity: bounds that a knee is looked for between. A closed loop's capacity is what full batches reach.
LEAST, MOST = 0.6, 1.5

SlowdownAt = Callable[[float], Awaitable[float]]


class NoKnee(ValueError):
    """Requests that failed, or a rate at which nothing was answered."""


async def find_knee(slowdown_at: SlowdownAt, capacity: float) -> float:
    """The rate, in requests a second.

    Args:
        slowdown_at: mean TTFT at a rate over that of requests alone.
        capacity: requests a second of a closed loop.
    """
    low, high = capacity * LEAST, capacity * MOST
    for _ in range(PROBES):
        middle = math.sqrt(low * high)
        if await slowdown_at(middle) > KNEE_FACTOR:
            high = middle
        else:
            low = middle
    return math.sqrt(low * high)


def read_ttft_s(run: Run) -> float:
    """Mean TTFT of a run in which nothing failed.

    Raises:
        NoKnee: something failed, or nothing was asked.
    """
    ttft_ms = mean_ttft_ms(run)
    if run.failed or ttft_ms is None:
        kinds = ", ".join(sorted({failed.kind for failed in run.failed})) or "nothing was asked"
        raise NoKnee(f"no knee can be found: {kinds}")
    return ttft_ms / 1e3
