"""Step times before and after a move, compared under the same load, and the measured cost of expert work.

A step that carries more tokens takes longer, so steps are compared only within a class of load, and the classes are
weighted as they occurred after the move. Owned by the controller on the group's first rank. Steps are classified when
they are compared: `StepTimes.add` runs in every step.
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, variance

from moe_scheduling.expert.gpu_priors import WorkCosts

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
# Part of the variance of tokens and of experts that the other one must leave unexplained, or both are one to the fit.
_MIN_APART = 0.01


class WorkMeter:
    """Seconds of expert work for one token and for one expert more: a plane through (tokens, experts, seconds), newer
    calls weighted more.

    Fed by the CPU kernel at each call of a layer, on a GPU by each step without its experts. A call also takes a fixed
    time, which no placement changes; hence the slopes and not the means. `on` says whether calls are timed.
    """

    def __init__(self) -> None:
        self.on = False
        self._weight = 0.0
        self._sums = [0.0] * 3
        self._products = [0.0] * 5

    def add(self, tokens: int, seconds: float, experts: int = 0) -> None:
        """Adds a call that computed this number of (token, expert) pairs of this number of distinct experts."""
        products = (tokens * tokens, tokens * experts, experts * experts, tokens * seconds, experts * seconds)
        self._weight = self._weight * _DECAY + 1.0
        self._sums = [old * _DECAY + new for old, new in zip(self._sums, (tokens, experts, seconds), strict=True)]
        self._products = [old * _DECAY + new for old, new in zip(self._products, products, strict=True)]

    @property
    def costs(self) -> WorkCosts:
        """Seconds for one (token, expert) pair more and for one expert more; 0 before the first call.

        Where tokens and experts rise and fall together, or a slope is negative, all time is that of tokens.
        """
        tokens, _, seconds = self._sums
        if not tokens:
            return WorkCosts(token_s=0.0)
        token_variance, both, expert_variance, token_slope, expert_slope = self._covariances()
        if token_variance < _MIN_VARIANCE:
            return WorkCosts(token_s=seconds / tokens)
        apart = token_variance * expert_variance - both * both
        if apart > _MIN_APART * token_variance * expert_variance:
            token_s = (token_slope * expert_variance - expert_slope * both) / apart
            expert_s = (expert_slope * token_variance - token_slope * both) / apart
            if token_s > 0.0 and expert_s > 0.0:
                return WorkCosts(token_s=token_s, expert_s=expert_s)
        return WorkCosts(token_s=max(0.0, token_slope / token_variance))

    def _covariances(self) -> list[float]:
        tokens, experts, seconds = (value / self._weight for value in self._sums)
        means = (tokens * tokens, tokens * experts, experts * experts, tokens * seconds, experts * seconds)
        return [product / self._weight - mean for product, mean in zip(self._products, means, strict=True)]


def work_costs(measured: WorkCosts, prior: WorkCosts | None) -> WorkCosts:
    """Returns the costs of expert work: as measured where reading an expert was measured or nothing is known before.

    On a GPU the measured time of a token is an upper bound, since all time of the step is attributed to it; a prior
    above it is lowered.
    """
    if prior is None or measured.expert_s:
        return measured
    if not 0.0 < measured.token_s < prior.token_s:
        return prior
    return replace(prior, token_s=measured.token_s)
