"""Layer 1: an engine's prefill speed as measured from its steps, and the speed that each waiting request counts with.

The order of requests weighs a second of waiting by it (`order.py`). `PrefillSpeed` belongs to the scheduler of a rank,
which passes each step on. `SpeedHistory` belongs to a waiting queue, so that its order stays consistent while the
measured speed moves.

Invariants: a speed is positive and finite whatever is observed; what one step says is bounded, so that a step which
compiles kernels moves the speed by little; the speed that a request counts with never falls while it waits, and is
never less than that of a request that arrived later.
"""

import math
from bisect import bisect_left
from statistics import median

from moe_scheduling.signals import StepTime

# Prompt tokens a second until an engine has been measured: that of a small GPU. Where it is too much, requests of the
# first steps are served nearly by arrival, where it is too little, they count with the measured speed as soon as there
# is one.
UNMEASURED_TOKENS_PER_S = 16_000.0
# Bounds of what a step is; their products are finite and not 0.
_MOST_TOKENS = 2**31
_SHORTEST_STEP_S, _LONGEST_STEP_S = 1e-6, 3600.0
# A speed takes the place of another one that differs by this factor or more.
_STEP = 1.25


class PrefillSpeed:
    """Fits `step_s = prompt_tokens / speed` to the steps that compute prompt tokens: least squares, with forgetting.

    Full steps decide: only in these the speed matters, because only then requests wait. A light step takes as long for
    few tokens as for many, and has little weight.

    Args:
        memory_steps: steps with prompt tokens after which one weighs 1/e.
        least_steps: steps with prompt tokens before there is a measured speed.
        outlier_factor: a step that takes longer than this many times the usual one, or than as many of them as hold its
            tokens, counts as that long.
    """

    __slots__ = ("_first", "_keep", "_least_steps", "_outlier_factor", "_right", "_square", "_usual_s", "_usual_tokens")

    def __init__(self, *, memory_steps: float = 256.0, least_steps: int = 8, outlier_factor: float = 4.0) -> None:
        self._keep = 1.0 - 1.0 / memory_steps
        self._least_steps = least_steps
        self._outlier_factor = outlier_factor
        self._first: list[tuple[float, float]] = []
        # Decayed sums of tokens * tokens and tokens * seconds; tokens and time of a usual step.
        self._square = self._right = self._usual_tokens = self._usual_s = 0.0

    @property
    def tokens_per_s(self) -> float | None:
        """Prompt tokens that the engine computes in a second; None until enough steps were seen."""
        return self._square / self._right if self._right > 0.0 else None

    def observe(self, prefill_tokens: int, step_s: float) -> None:
        """Takes one step into account; one without prompt tokens, and a time that no step takes, is ignored."""
        if not (0 < prefill_tokens < _MOST_TOKENS and _SHORTEST_STEP_S < step_s < _LONGEST_STEP_S):
            return
        if self._usual_s > 0.0:
            self._add(prefill_tokens, step_s)
            return
        self._first.append((prefill_tokens, step_s))
        if len(self._first) == self._least_steps:
            self._usual_tokens, self._usual_s = map(median, zip(*self._first, strict=True))
            for row in self._first:
                self._add(*row)
            self._first.clear()

    def _add(self, tokens: float, step_s: float) -> None:
        usual_steps = max(1.0, tokens / self._usual_tokens)
        step_s = min(step_s, self._outlier_factor * usual_steps * self._usual_s)
        self._usual_tokens += (1.0 - self._keep) * (tokens - self._usual_tokens)
        self._usual_s += (1.0 - self._keep) * (step_s - self._usual_s)
        self._square = self._keep * self._square + tokens * tokens
        self._right = self._keep * self._right + tokens * step_s


def speed_of(step_time: StepTime | None, step_tokens: int) -> float | None:
    """Returns the prompt tokens a second of full steps without answers; None where the model is not known, or empty.

    Args:
        step_time: of the engine.
        step_tokens: most tokens of a step.
    """
    if step_time is None:
        return None
    step_s = step_time.base_s + step_time.prefill_base_s + step_time.prefill_s * step_tokens
    return step_tokens / step_s if step_s > 0.0 else None


class SpeedHistory:
    """The speeds of an engine that waiting requests count with, by their arrival.

    A request counts with the greatest speed that was in force since it arrived. So a speed that rises moves all waiting
    requests towards the order of arrival, and one that falls concerns later requests alone: nothing that waits falls
    back.

    `at` is O(log speeds), `take` amortised O(1). Speeds fall along the list, each by a factor, so it is short.
    """

    __slots__ = ("_last_s", "_since_s", "_speeds")

    def __init__(self) -> None:
        # Arrivals after which each speed is in force, ascending, and the speeds, descending.
        self._since_s: list[float] = [-math.inf]
        self._speeds: list[float] = [UNMEASURED_TOKENS_PER_S]
        self._last_s = -math.inf

    @property
    def tokens_per_s(self) -> float:
        """The speed that later arrivals count with."""
        return self._speeds[-1]

    def note(self, arrival_s: float) -> None:
        """A request that arrived then is waiting: later speeds are those of later arrivals."""
        self._last_s = max(self._last_s, arrival_s)

    def at(self, arrival_s: float) -> float:
        """Returns the speed that a request of this arrival counts with, in tokens a second."""
        return self._speeds[max(0, bisect_left(self._since_s, arrival_s) - 1)]

    def take(self, tokens_per_s: float | None) -> bool:
        """Puts a measured speed in force; returns whether requests that wait now count with another one.

        One that differs little from the one in force, or is no speed, changes nothing.
        """
        if tokens_per_s is None or not 0.0 < tokens_per_s < math.inf:
            return False
        now = self._speeds[-1]
        if now / _STEP < tokens_per_s < now * _STEP:
            return False
        since_s, rises = self._last_s, tokens_per_s > now
        while self._speeds and (self._speeds[-1] <= tokens_per_s or self._since_s[-1] == since_s):
            self._speeds.pop()
            since_s = self._since_s.pop()
        self._since_s.append(since_s)
        self._speeds.append(tokens_per_s)
        return rises
