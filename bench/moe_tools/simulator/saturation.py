"""Where a workload saturates what serves it: the rate at which vLLM's mean TTFT is five times that on an idle engine.

A finite run has no rate that it cannot serve, only queues that grow; so the saturation is a latency's, found by
bisection on the same requests in the same order. Loads of the experiments are parts of that rate.
"""

import math
from collections.abc import Callable

KNEE_FACTOR = 5.0
# Bisection ends when the bounds are so near: finer than what one more seed would change.
_PRECISION = 1.03
_MOST_DOUBLINGS = 20


def find_saturation(slowdown_at: Callable[[float], float], guess: float) -> float:
    """The rate at which the slow-down passes `KNEE_FACTOR`.

    Args:
        slowdown_at: mean TTFT over that on an idle engine, at a rate in requests a second.
        guess: a rate to begin at.

    Raises:
        ValueError: no rate is found that is served, or none that is too much.
    """
    low, high = _bracket(slowdown_at, guess)
    while high / low > _PRECISION:
        middle = math.sqrt(low * high)
        if slowdown_at(middle) > KNEE_FACTOR:
            high = middle
        else:
            low = middle
    return math.sqrt(low * high)


def _bracket(slowdown_at: Callable[[float], float], guess: float) -> tuple[float, float]:
    step = 2.0 if slowdown_at(guess) <= KNEE_FACTOR else 0.5
    rate = guess
    for _ in range(_MOST_DOUBLINGS):
        following = rate * step
        if (slowdown_at(following) > KNEE_FACTOR) == (step > 1):
            return (rate, following) if step > 1 else (following, rate)
        rate = following
    raise ValueError(f"the slow-down does not pass {KNEE_FACTOR:g} between {guess:g} and {rate:g} requests/s")
