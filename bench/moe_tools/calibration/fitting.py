"""Step times of a real engine as a line with attention's terms: least squares, checked on held-out steps.

Pure. Terms cannot be negative: a step does not get shorter by what it carries.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moe_tools.simulator.costs import LinearCost, Work

HELD_OUT = 0.2
LEAST_STEPS = 50
# Iterations; the weights hardly change after this many.
_ROUNDS = 5
# As the product's own fit (`moe_agent.step_time`).
_OUTLIER = 3.0
# Of like sizes, so that no column is lost beside another: a token of prefill counts as one, a pair as a millionth.
_SCALE = np.array([1.0, 1e3, 1e1, 1e4, 1e6])


class TooFewSteps(ValueError):
    """No line can be fitted to so few."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredStep:
    """A step of one rank and what it took."""

    work: Work
    step_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """A cost and how far it is from steps that it was not fitted on.

    Attributes:
        cost: the line.
        steps: it was fitted on.
        held_out: steps that it was checked on.
        error_median: of |predicted - measured| / measured.
        error_p90: 90th percentile of that error.
        bias: predicted / measured, all held-out steps summed; 1 is none.
    """

    cost: LinearCost
    steps: int
    held_out: int
    error_median: float
    error_p90: float
    bias: float


def fit_cost(steps: Sequence[MeasuredStep], source: str, seed: int = 0) -> Fit:
    """Fits on four fifths of the steps, drawn with the seed, and checks on the rest.

    Raises:
        TooFewSteps: there are too few.
    """
    if len(steps) < LEAST_STEPS:
        raise TooFewSteps(f"{len(steps)} steps are too few, {LEAST_STEPS} are needed")
    order = np.random.default_rng(seed).permutation(len(steps))
    held_out = order[: int(len(steps) * HELD_OUT)]
    rows = np.array([_row(step.work) for step in steps]) / _SCALE
    step_s = np.array([step.step_s for step in steps])
    fitted = np.setdiff1d(order, held_out)
    terms = _solve(rows[fitted], step_s[fitted])
    predicted_s = rows[held_out] @ terms
    errors = np.abs(predicted_s - step_s[held_out]) / step_s[held_out]
    base_s, prefill_s, decode_s, context_s, pair_s = (float(term) for term in terms / _SCALE)
    return Fit(
        cost=LinearCost(base_s, prefill_s, decode_s, context_s, pair_s, source),
        steps=len(fitted),
        held_out=len(held_out),
        error_median=float(np.median(errors)),
        error_p90=float(np.percentile(errors, 90)),
        bias=float(predicted_s.sum() / step_s[held_out].sum()),
    )


def _row(work: Work) -> tuple[float, ...]:
    return 1.0, work.prefill_tokens, work.decode_requests, work.context_tokens, work.prefill_pairs


def _solve(rows: np.ndarray, step_s: np.ndarray) -> np.ndarray:
    """Least squares by error relative to the prediction: relative to the measurement, noise would pull it down.

    What takes far longer than expected, since something else ran on the machine, counts for a bounded part.
    """
    expected_s = step_s
    for _ in range(_ROUNDS):
        bounded_s = np.minimum(step_s, _OUTLIER * expected_s)
        terms = _solve_weighted(rows / expected_s[:, None], bounded_s / expected_s)
        expected_s = np.maximum(rows @ terms, step_s.min())
    return terms


def _solve_weighted(rows: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Least squares; the most negative term is left out until none is negative."""
    kept = list(range(rows.shape[1]))
    while True:
        found = np.linalg.lstsq(rows[:, kept], values, rcond=None)[0]
        if found.min() >= 0:
            terms = np.zeros(rows.shape[1])
            terms[kept] = found
            return terms
        del kept[int(np.argmin(found))]
