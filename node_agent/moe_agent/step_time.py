"""Online fit of an engine's step time: `base_s + prefill_s * prefill_tokens + decode_s * decoding_requests`.

Called by the scheduler plugin with one observation for each engine step. Pure: the caller measures the time.

Invariants: the coefficients are never negative; a direction in which nothing new is seen keeps its last estimate; a
single freak step (a compilation, a stopped process) moves the line by little.
"""

import math
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import chain
from operator import mul

import numpy as np
from moe_scheduling.signals import StepTime

_Row = tuple[float, float, float]

# Steps after which an observation weighs 1/e in a step-time model.
LINE_MEMORY_STEPS = 500.0

# Brings the three columns to like sizes, so that the small ridge below weighs on each alike.
_SCALE = np.array([1.0, 1024.0, 32.0])
_PER_SCALE = 1.0 / _SCALE
_IDENTITY = np.eye(3)


class StepTimeFit:
    """Least squares with exponential forgetting, weighted by relative error.

    A decode step takes milliseconds and a prefill step may take seconds: by absolute errors the latter would decide.
    Observations are kept and worked in together every few steps, which costs a tenth of working in one at a time.

    Args:
        memory_steps: steps after which an observation weighs 1/e.
        least_steps: steps before `line` answers.
        refit_every: steps between two fits after that.
        outlier_factor: a step that takes longer than this many times the prediction counts as that many times.
    """

    def __init__(
        self,
        *,
        memory_steps: float = LINE_MEMORY_STEPS,
        least_steps: int = 16,
        refit_every: int = 128,
        outlier_factor: float = 3.0,
    ) -> None:
        self._keep = 1.0 - 1.0 / memory_steps
        self._refit_every = refit_every
        self._outlier_factor = outlier_factor
        self._batch: list[_Row] = []
        self._batch_size = least_steps
        self._normal = np.zeros((3, 3))
        self._right = np.zeros(3)
        self._scaled = np.zeros(3)
        self._model: StepTime | None = None

    @property
    def line(self) -> StepTime | None:
        """The fitted line; None until enough steps were seen."""
        return self._model

    def observe(self, *, prefill_tokens: int, decoding_requests: int, step_s: float) -> None:
        """Takes one step into account. Steps that carried nothing, and times that are no time, are ignored."""
        if 0.0 < step_s < math.inf and (prefill_tokens or decoding_requests):
            self._batch.append((prefill_tokens, decoding_requests, step_s))
            if len(self._batch) == self._batch_size:
                self._accumulate()
                self._refit()
                self._batch.clear()
                self._batch_size = self._refit_every

    def _accumulate(self) -> None:
        batch = stack_rows(self._batch)
        columns = np.empty((3, len(self._batch)))
        columns[0] = 1.0
        np.multiply(batch[:2], _PER_SCALE[1:, None], out=columns[1:])
        step_s = batch[2]
        expected_s = self._scaled @ columns if self._model is not None else step_s
        normal, right, fade = weigh_steps(columns, step_s, expected_s, self._keep, self._outlier_factor)
        self._normal = fade * self._normal + normal
        self._right = fade * self._right + right

    def _refit(self) -> None:
        # A ridge towards the last estimate: it decides only where the observations say nothing.
        ridge = 1e-6 * self._normal[0, 0]
        matrix = (self._normal + ridge * _IDENTITY).tolist()
        right = (self._right + ridge * self._scaled).tolist()
        row = _solve(matrix, right)
        if min(row) < 0.0:
            # Each of them is stationary in its own coefficients, so that its objective is `-b'x`.
            row = max(_on_the_bound(matrix, right), key=lambda row: sum(map(mul, right, row)))
        self._scaled = np.array(row)
        base, prefill, decode = (self._scaled / _SCALE).tolist()
        self._model = StepTime(base_s=base, prefill_s=prefill, decode_s=decode)


class StepTimeLines:
    """The line of all steps, and that of the steps that compute prompt tokens.

    On a GPU a step with prompt tokens runs outside the captured graphs and has a least time of its own, several times
    that of a step that only decodes: one line for both finds few prompt tokens too cheap and many too dear.
    """

    def __init__(self) -> None:
        self._all, self._prompts = StepTimeFit(), StepTimeFit()

    @property
    def line(self) -> StepTime | None:
        """The line of all steps; None until enough were seen."""
        return self._all.line

    @property
    def prompt_line(self) -> StepTime | None:
        """The line of the steps with prompt tokens; None until enough were seen."""
        return self._prompts.line

    def observe(self, *, prefill_tokens: int, decoding_requests: int, step_s: float) -> None:
        """Takes one step into account, as `StepTimeFit.observe`."""
        self._all.observe(prefill_tokens=prefill_tokens, decoding_requests=decoding_requests, step_s=step_s)
        if prefill_tokens:
            self._prompts.observe(prefill_tokens=prefill_tokens, decoding_requests=decoding_requests, step_s=step_s)

    def step_s(self, prefill_tokens: int, decoding_requests: int) -> float:
        """Returns the predicted seconds of a step, by the line of its kind; 0 until that is known."""
        line = self._prompts.line if prefill_tokens else self._all.line
        if line is None:
            return 0.0
        return line.base_s + line.prefill_s * prefill_tokens + line.decode_s * decoding_requests


def stack_rows(rows: Sequence[tuple[float, ...]]) -> np.ndarray:
    """Observations of shape (values, steps), from one tuple for each step; twice as fast as `np.array`."""
    values = len(rows[0])
    flat = np.fromiter(chain.from_iterable(rows), float, values * len(rows))
    return np.ascontiguousarray(flat.reshape(-1, values).T)


def weigh_steps(
    columns: np.ndarray, step_s: np.ndarray, expected_s: np.ndarray, keep: float, outlier_factor: float
) -> tuple[np.ndarray, np.ndarray, float]:
    """The normal matrix and right side of a batch of steps, by relative error, and the weight left to earlier batches.

    Args:
        columns: of shape (coefficients, steps), the newest step last.
        step_s: of shape (steps,): how long each took.
        expected_s: the same by the last fit; a value that is not above 0 counts as not known.
        keep: weight of a step against that of the next.
        outlier_factor: a step that took longer than this many times the expected time counts as that many times.
    """
    expected_s = np.where(expected_s > 0.0, expected_s, step_s)
    step_s = np.minimum(step_s, outlier_factor * expected_s)
    weighted = columns * (_fading(keep, len(step_s)) / (expected_s * expected_s))
    return weighted @ columns.T, weighted @ step_s, keep ** len(step_s)


@cache
def _fading(keep: float, steps: int) -> np.ndarray:
    """Weights of the steps of a batch, the newest last."""
    return keep ** np.arange(steps - 1, -1, -1)


def _solve(matrix: Sequence[Sequence[float]], right: Sequence[float]) -> _Row:
    """The unbounded minimum, by Cramer's rule."""
    (a, b, c), (_, d, e), (_, _, f) = matrix
    minor_a, minor_b, minor_c = d * f - e * e, c * e - b * f, b * e - c * d
    determinant = a * minor_a + b * minor_b + c * minor_c
    x, y, z = right
    return (
        (minor_a * x + minor_b * y + minor_c * z) / determinant,
        (minor_b * x + (a * f - c * c) * y + (b * c - a * e) * z) / determinant,
        (minor_c * x + (b * c - a * e) * y + (a * d - b * b) * z) / determinant,
    )


def _on_the_bound(matrix: Sequence[Sequence[float]], right: Sequence[float]) -> Iterator[_Row]:
    """Solutions with a part that is 0 and none negative; the bounded minimum is one of them (Karush-Kuhn-Tucker)."""
    yield (0.0, 0.0, 0.0)
    for kept in range(3):
        row = [0.0, 0.0, 0.0]
        row[kept] = max(0.0, right[kept] / matrix[kept][kept])
        yield row[0], row[1], row[2]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        determinant = matrix[first][first] * matrix[second][second] - matrix[first][second] ** 2
        row = [0.0, 0.0, 0.0]
        row[first] = (right[first] * matrix[second][second] - right[second] * matrix[first][second]) / determinant
        row[second] = (right[second] * matrix[first][first] - right[first] * matrix[first][second]) / determinant
        if min(row) >= 0.0:
            yield row[0], row[1], row[2]
