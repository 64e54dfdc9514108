"""Step times before and after a move, compared under the same load, and the measured cost of expert work.

A step that carries more tokens takes longer, so steps are compared only within a class of load, and the classes are
weighted as they occurred after the move. Owned by the controller on the group's first rank. Steps are classified when
they are compared: `StepTimes.add` runs in every step.
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, variance

# Newest steps kept, in all and of each class; older ones ran under other conditions.
_KEPT_STEPS = 2048
_KEPT_OF_CLASS = 256
_MIN_SAMPLES = 8
# Standard errors from which a gain or a loss counts as more than noise.
_CLEAR_ERRORS = 2.0

LoadClass = tuple[int, int]
Samples = Mapping[LoadClass, Sequence[float]]


@dataclass(frozen=True, slots=True)
class Gain:
    """Seconds that a step of the same load takes less, with its standard error and the steps compared.

    Attributes:
        mean_s: seconds gained a step; negative: lost.
        error_s: standard error of `mean_s`.
        before: steps before the move.
        after: steps after the move.
    """

    mean_s: float
    error_s: float
    before: int
    after: int

    @property
    def is_clear(self) -> bool:
        """Whether the gain or loss exceeds the noise of these steps."""
        return abs(self.mean_s) >= _CLEAR_ERRORS * self.error_s


def load_class(tokens: int, most_tokens: int) -> LoadClass:
    """Returns the class of a step that carries `tokens` over all ranks and `most_tokens` on one: eighths of a
    doubling.
    """
    return _bucket(tokens), _bucket(most_tokens)


def _bucket(tokens: int) -> int:
    return round(8.0 * math.log2(tokens)) if tokens > 0 else -1


class StepTimes:
    """The newest step times, each with its step number and its tokens."""

    def __init__(self) -> None:
        self._steps: deque[tuple[int, int, int, float]] = deque(maxlen=_KEPT_STEPS)

    def add(self, step: int, tokens: int, most_tokens: int, step_s: float) -> None:
        """Adds a step that carried `tokens` over all ranks and `most_tokens` on one."""
        self._steps.append((step, tokens, most_tokens, step_s))

    def since(self, step: int) -> Samples:
        """Returns the seconds of this step and later ones by class, the newest of each class."""
        by_class: dict[LoadClass, deque[float]] = {}
        for number, tokens, most_tokens, step_s in self._steps:
            if number >= step:
                kind = load_class(tokens, most_tokens)
                by_class.setdefault(kind, deque(maxlen=_KEPT_OF_CLASS)).append(step_s)
        return {kind: list(samples) for kind, samples in by_class.items()}

    def clear(self) -> None:
        """Forgets the step times recorded so far."""
        self._steps.clear()


def compare_step_times(before: Samples, after: Samples) -> Gain | None:
    """Returns the gain within classes of load; None where no class has enough steps on both sides.

    It is the mean over classes of (mean before - mean after), weighted by the steps after. The slowest tenth of each
    side is left out, because a step delayed by the machine says nothing about the experts.
    """
    rows = [
        (_trimmed(before[kind]), _trimmed(samples))
        for kind, samples in after.items()
        if kind in before and min(len(samples), len(before[kind])) >= _MIN_SAMPLES
    ]
    if not rows:
        return None
    total = sum(len(late) for _, late in rows)
    mean_s = sum(len(late) * (fmean(early) - fmean(late)) for early, late in rows) / total
    errors = [
        (len(late) / total) ** 2 * (variance(early) / len(early) + variance(late) / len(late)) for early, late in rows
    ]
    return Gain(mean_s, math.sqrt(sum(errors)), sum(len(early) for early, _ in rows), total)


def _trimmed(samples: Sequence[float]) -> list[float]:
    return sorted(samples)[: max(2, math.ceil(len(samples) * 0.9))]


# Weight of a call after one more.
_DECAY = 0.999
# Variance of the tokens below which the slope is meaningless and the mean is used.
_MIN_VARIANCE = 1.0


class WorkMeter:
    """Seconds of expert work for one token more: the slope of a line through (tokens, seconds), newer calls weighted
    more.

    Fed by the CPU kernel at each call of a layer, on a GPU by each step. A call also takes a fixed time, which no
    placement changes; hence the slope and not the mean. `on` says whether calls are timed.
    """

    def __init__(self) -> None:
        self.on = False
        self._weight = self._tokens = self._seconds = self._squares = self._products = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        """Adds a call that computed this number of (token, expert) pairs."""
        self._weight = self._weight * _DECAY + 1.0
        self._tokens = self._tokens * _DECAY + tokens
        self._seconds = self._seconds * _DECAY + seconds
        self._squares = self._squares * _DECAY + tokens * tokens
        self._products = self._products * _DECAY + tokens * seconds

    @property
    def token_s(self) -> float:
        """Seconds for one (token, expert) pair more; 0 before the first call."""
        if not self._tokens:
            return 0.0
        variance = self._squares / self._weight - (self._tokens / self._weight) ** 2
        if variance < _MIN_VARIANCE:
            return self._seconds / self._tokens
        covariance = self._products / self._weight - self._tokens * self._seconds / self._weight**2
        return max(0.0, covariance / variance)
