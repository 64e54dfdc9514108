"""Step times by class of load, and the honest comparison of those before a move with those after it.

A step that carries more tokens takes longer, so only steps of one class are compared, and the classes weigh as they
came after the move. Owned by the controller on the group's first rank.
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, variance

# Of each class the newest; older steps ran on another machine, so to say.
_KEPT = 256
_LEAST_SAMPLES = 8
# Standard errors from which on a gain or a loss is more than noise.
_CLEAR_ERRORS = 2.0

LoadClass = tuple[int, int]
Samples = Mapping[LoadClass, Sequence[float]]


@dataclass(frozen=True, slots=True)
class Gain:
    """Seconds that a step of the same load takes less, its standard error, and the steps compared on either side."""

    mean_s: float
    error_s: float
    before: int
    after: int

    @property
    def is_clear(self) -> bool:
        """Whether it is more than the noise of these steps."""
        return abs(self.mean_s) >= _CLEAR_ERRORS * self.error_s


def load_class(tokens: int, most_tokens: int) -> LoadClass:
    """Class of a step that carries `tokens` over all ranks and `most_tokens` on one: eighths of a doubling."""
    return _bucket(tokens), _bucket(most_tokens)


def _bucket(tokens: int) -> int:
    return round(8.0 * math.log2(tokens)) if tokens > 0 else -1


class StepTimes:
    """The newest step times of each class, each with the number of its step."""

    def __init__(self) -> None:
        self._by_class: dict[LoadClass, deque[tuple[int, float]]] = {}

    def add(self, kind: LoadClass, step_s: float, step: int) -> None:
        self._by_class.setdefault(kind, deque(maxlen=_KEPT)).append((step, step_s))

    def since(self, step: int) -> Samples:
        """Those of this step and later ones."""
        return {
            kind: [step_s for number, step_s in samples if number >= step] for kind, samples in self._by_class.items()
        }

    def clear(self) -> None:
        """Forgets all."""
        self._by_class = {}


def compare_step_times(before: Samples, after: Samples) -> Gain | None:
    """What was won by step of the same class; None where no class has enough steps on both sides.

    The mean over classes of (mean before - mean after), weighted by the steps after; the slowest tenth of each side is
    left out, because a step that the machine itself held up says nothing of the experts.
    """
    rows = [
        (_trimmed(before[kind]), _trimmed(samples))
        for kind, samples in after.items()
        if kind in before and min(len(samples), len(before[kind])) >= _LEAST_SAMPLES
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
