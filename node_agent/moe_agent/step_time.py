"""Online fit of an engine's step time: `base_s + prefill_s * prefill_tokens + decode_s * decoding_requests`.

Called by the scheduler plugin with one observation for each engine step. Pure: the caller measures the time.

Invariants: the coefficients are never negative; a direction in which nothing new is seen keeps its last estimate; a
single freak step (a compilation, a stopped process) moves the line by little.
"""

from collections.abc import Iterator, Sequence

from moe_scheduling.signals import StepTime

_Row = tuple[float, float, float]

# Brings the three columns to like sizes, so that the small ridge below weighs on each alike.
_SCALE: _Row = (1.0, 1024.0, 32.0)
# Subsets of columns that may be non-zero, the full one first.
_SUPPORTS = ((0, 1, 2), (0, 1), (0, 2), (1, 2), (0,), (1,), (2,))


class StepTimeFit:
    """Least squares with exponential forgetting, weighted by relative error.

    A decode step takes milliseconds and a prefill step may take seconds: by absolute errors the latter would decide.

    Args:
        memory_steps: steps after which an observation weighs 1/e.
        least_steps: steps before `line` answers.
        refit_every: steps between two solutions of the normal equations, the costly part.
        outlier_factor: a step that takes more than so many times the prediction counts as that many times.
    """

    def __init__(
        self, *, memory_steps: float = 500.0, least_steps: int = 16, refit_every: int = 8, outlier_factor: float = 3.0
    ) -> None:
        self._keep = 1.0 - 1.0 / memory_steps
        self._least_steps = least_steps
        self._refit_every = refit_every
        self._outlier_factor = outlier_factor
        self._steps = 0
        # Upper triangle of the normal matrix (00, 01, 02, 11, 12, 22) and the right side.
        self._normal = [0.0] * 6
        self._right = [0.0] * 3
        self._scaled: _Row = (0.0, 0.0, 0.0)
        self._line: StepTime | None = None

    @property
    def line(self) -> StepTime | None:
        """The fitted line; None until enough steps were seen."""
        return self._line

    def observe(self, *, prefill_tokens: int, decoding_requests: int, step_s: float) -> None:
        """Takes one step into account. Steps that carried nothing, and times that are no time, are ignored."""
        if not 0.0 < step_s < float("inf") or not (prefill_tokens or decoding_requests):
            return
        prefill, decode = prefill_tokens / _SCALE[1], decoding_requests / _SCALE[2]
        expected_s = 0.0
        if self._line is not None:
            expected_s = self._scaled[0] + self._scaled[1] * prefill + self._scaled[2] * decode
            step_s = min(step_s, self._outlier_factor * expected_s) if expected_s > 0.0 else step_s
        self._accumulate(prefill, decode, step_s, 1.0 / (expected_s or step_s) ** 2)
        self._steps += 1
        if self._steps >= self._least_steps and (self._line is None or self._steps % self._refit_every == 0):
            self._refit()

    def _accumulate(self, prefill: float, decode: float, step_s: float, weight: float) -> None:
        keep, normal, right = self._keep, self._normal, self._right
        weighted_prefill, weighted_decode = weight * prefill, weight * decode
        normal[0] = keep * normal[0] + weight
        normal[1] = keep * normal[1] + weighted_prefill
        normal[2] = keep * normal[2] + weighted_decode
        normal[3] = keep * normal[3] + weighted_prefill * prefill
        normal[4] = keep * normal[4] + weighted_prefill * decode
        normal[5] = keep * normal[5] + weighted_decode * decode
        right[0] = keep * right[0] + weight * step_s
        right[1] = keep * right[1] + weighted_prefill * step_s
        right[2] = keep * right[2] + weighted_decode * step_s

    def _refit(self) -> None:
        n00, n01, n02, n11, n12, n22 = self._normal
        # A ridge towards the last estimate: it decides only where the observations say nothing.
        ridge = 1e-6 * n00
        matrix = ((n00 + ridge, n01, n02), (n01, n11 + ridge, n12), (n02, n12, n22 + ridge))
        right = tuple(value + ridge * last for value, last in zip(self._right, self._scaled, strict=True))
        self._scaled = min(_feasible(matrix, right), key=lambda row: _objective(matrix, right, row))
        base, prefill, decode = (value / scale for value, scale in zip(self._scaled, _SCALE, strict=True))
        self._line = StepTime(base_s=base, prefill_s=prefill, decode_s=decode)


def _feasible(matrix: Sequence[_Row], right: Sequence[float]) -> Iterator[_Row]:
    """Solutions with no negative part; the least over the non-negative octant is among them (Karush-Kuhn-Tucker)."""
    yield (0.0, 0.0, 0.0)
    for support in _SUPPORTS:
        row = _solve(matrix, right, support)
        if min(row) >= 0.0:
            yield row
            if len(support) == 3:
                return


def _solve(matrix: Sequence[_Row], right: Sequence[float], support: Sequence[int]) -> _Row:
    """Gauss elimination on the columns of `support`; the matrix is positive definite, so no pivoting is needed."""
    rows = [[matrix[i][j] for j in support] + [right[i]] for i in support]
    size = len(rows)
    for pivot in range(size):
        for below in range(pivot + 1, size):
            factor = rows[below][pivot] / rows[pivot][pivot]
            rows[below] = [low - factor * top for low, top in zip(rows[below], rows[pivot], strict=True)]
    values = [0.0, 0.0, 0.0]
    for pivot in reversed(range(size)):
        known = sum(rows[pivot][later] * values[support[later]] for later in range(pivot + 1, size))
        values[support[pivot]] = (rows[pivot][size] - known) / rows[pivot][pivot]
    return values[0], values[1], values[2]


def _objective(matrix: Sequence[_Row], right: Sequence[float], row: _Row) -> float:
    """`x'Ax - 2b'x`, the squared error but for a constant."""
    quadratic = sum(row[i] * row[j] * matrix[i][j] for i in range(3) for j in range(3))
    return quadratic - 2.0 * sum(value * x for value, x in zip(right, row, strict=True))
