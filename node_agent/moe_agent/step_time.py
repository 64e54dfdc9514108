"""Online fit of an engine's step time.

`base_s + decode_s * decoding_requests + decode_root_s * sqrt(decoding_requests)`, and in steps with prompt tokens
`+ prefill_base_s + prefill_s * prefill_tokens`.

Called by the scheduler plugin with one observation for each engine step. Pure: the caller measures the time.

Invariants: the coefficients are never negative; a direction in which nothing new is seen keeps its last estimate; a
single freak step (a compilation, a stopped process) moves the line by little.
"""

import math
from collections.abc import Sequence
from functools import cache
from itertools import chain, product

import numpy as np
from moe_scheduling.signals import StepTime

_Row = tuple[float, float, float]
_TERMS = 5

# Steps after which an observation weighs 1/e in a step-time model.
LINE_MEMORY_STEPS = 500.0

# Brings the columns to like sizes, so that the small ridge below weighs on each alike: one, prompt tokens, decoding
# requests, their square root, one with prompt tokens.
_SCALE = np.array([1.0, 1024.0, 32.0, 32.0**0.5, 1.0])
_PER_SCALE = 1.0 / _SCALE
_IDENTITY = np.eye(_TERMS)


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
        self._normal = np.zeros((_TERMS, _TERMS))
        self._right = np.zeros(_TERMS)
        self._scaled = np.zeros(_TERMS)
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
        columns = np.empty((_TERMS, len(self._batch)))
        columns[0] = 1.0
        np.multiply(batch[:2], _PER_SCALE[1:3, None], out=columns[1:3])
        np.sqrt(columns[2], out=columns[3])
        columns[4] = batch[0] > 0.0
        step_s = batch[2]
        expected_s = self._scaled @ columns if self._model is not None else step_s
        normal, right, fade = weigh_steps(columns, step_s, expected_s, self._keep, self._outlier_factor)
        self._normal = fade * self._normal + normal
        self._right = fade * self._right + right

    def _refit(self) -> None:
        # A ridge towards the last estimate: it decides only where the observations say nothing.
        ridge = 1e-6 * self._normal[0, 0]
        matrix = self._normal + ridge * _IDENTITY
        right = self._right + ridge * self._scaled
        self._scaled = solve_not_below_0(matrix[None], right[None])[0][0]
        base, prefill, decode, decode_root, prefill_base = (self._scaled * _PER_SCALE).tolist()
        self._model = StepTime(
            base_s=base, prefill_s=prefill, decode_s=decode, decode_root_s=decode_root, prefill_base_s=prefill_base
        )


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


def solve_not_below_0(matrix: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The least of `x'Mx - 2b'x` with no coefficient below 0, for several fits at once.

    Every choice of coefficients that are 0 is solved; the best one that has none below 0 is the bounded minimum
    (Karush-Kuhn-Tucker).

    Args:
        matrix: M of each fit, positive definite, of shape (fits, terms, terms).
        right: b of each fit, of shape (fits, terms).

    Returns:
        x of each fit, of shape (fits, terms), and its value, of shape (fits,).
    """
    terms = right.shape[-1]
    kept = _choices(terms)[None]
    # A coefficient that is not kept gets the equation "itself = 0".
    masked = matrix[:, None] * kept[..., :, None] * kept[..., None, :] + np.eye(terms) * (1.0 - kept[..., None])
    found = np.linalg.solve(masked, (right[:, None] * kept)[..., None])[..., 0]
    value = np.einsum("fki,fij,fkj->fk", found, matrix, found) - 2.0 * np.einsum("fi,fki->fk", right, found)
    value[(found < 0.0).any(axis=-1)] = math.inf
    best, fits = value.argmin(axis=-1), np.arange(len(value))
    return found[fits, best], value[fits, best]


@cache
def _choices(terms: int) -> np.ndarray:
    """Which coefficients are not 0, in every way; none of them is the last resort and always possible."""
    return np.array(list(product((0.0, 1.0), repeat=terms)))
