"""Where stock's knee is: the rate of arrivals at which its mean TTFT is five times that of requests served alone.

Bracketed and bisected from the measured capacity on, each time with the same requests in the same order and other text.
A real engine's TTFT at one rate is noisy, so the rates are few and the answer is the middle of the last interval. It
can lie beyond the capacity of a closed loop because a piece ends: a longer one has its knee at a lower rate.
"""

import math
from collections.abc import Awaitable, Callable

from moe_tools.comparison import mean_ttft_ms
from moe_tools.replay import ReplayResult
from moe_tools.simulator.saturation import KNEE_FACTOR

STEP = 1.35
MOST_STEPS = 4
BISECTIONS = 3

SlowdownAt = Callable[[float], Awaitable[float]]


class NoKnee(ValueError):
    """None is near the capacity, or requests failed."""


async def find_knee(slowdown_at: SlowdownAt, capacity: float) -> float:
    """The rate, in requests a second; as far as `slowdown_at` is right, within 5 %.

    Args:
        slowdown_at: mean TTFT at a rate over that of requests alone.
        capacity: requests a second of a closed loop.

    Raises:
        NoKnee: the slow-down does not pass the factor near the capacity.
    """
    low, high = await _bracket(slowdown_at, capacity)
    for _ in range(BISECTIONS):
        middle = math.sqrt(low * high)
        if await slowdown_at(middle) > KNEE_FACTOR:
            high = middle
        else:
            low = middle
    return math.sqrt(low * high)


async def _bracket(slowdown_at: SlowdownAt, capacity: float) -> tuple[float, float]:
    rate, slowdown = capacity, await slowdown_at(capacity)
    step = STEP if slowdown <= KNEE_FACTOR else 1.0 / STEP
    for _ in range(MOST_STEPS):
        following, before = rate * step, slowdown
        slowdown = await slowdown_at(following)
        if (before > KNEE_FACTOR) != (slowdown > KNEE_FACTOR):
            return min(rate, following), max(rate, following)
        rate = following
    raise NoKnee(
        f"no knee near the capacity: at {rate:.2f} requests/s the mean TTFT is {slowdown:.1f} times that of requests "
        f"alone, and the knee is where it is {KNEE_FACTOR:g} times that; --rate names a rate"
    )


def read_ttft_s(run: ReplayResult) -> float:
    """Mean TTFT of a run in which nothing failed.

    Raises:
        NoKnee: something failed, or nothing was asked.
    """
    ttft_ms = mean_ttft_ms(run)
    if run.failed or ttft_ms is None:
        kinds = ", ".join(sorted({failed.kind for failed in run.failed})) or "nothing was asked"
        raise NoKnee(f"no knee can be found: {kinds}")
    return ttft_ms / 1e3
