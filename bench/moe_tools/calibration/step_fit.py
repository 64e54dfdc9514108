"""Fits the coefficients of step times to measured steps: robust, relative, none negative.

Pure. A measurement is a run of steps with one duration: mostly a single step; the chunks of a prompt where an engine
counts their times in each other (asynchronous scheduling). The largest of a step's alternatives counts, so fitting
alternates: which alternative is the longest under the present coefficients, then coefficients for these.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moe_tools.simulator.costs import Work
from moe_tools.simulator.step_time import Coefficients, FittedCost, StepModel

Floats = npt.NDArray[np.float64]

# Alternations; the choice of the longest hardly changes after these.
_ROUNDS = 30
# Rounds without progress after which it ends, and the loss beside the least one that is progress.
_PATIENCE, _PROGRESS = 4, 0.999
# Errors below this part count by their square, larger ones in a line: one step in a hundred of a GPU takes over three
# times the median. So small, the fit is one to medians.
MEDIAN_ERROR = 0.02
# Of the measured steps with prompt tokens: where the least times start.
_START_QUANTILES = (0.1, 0.3)
# Time of a step with prompt tokens beside a decode step's, without its tokens' own.
_START_BASES = (1.0, 2.0)
_PROMPT_TERMS = ("prefill_base_s", "request_s", "prefill_s", "group_token_s", "pair_s", "piecewise_s", "eager_s")
_LEAST_S = 1e-9
# Scaled coefficients below this are 0 but for rounding.
_VANISHED = 1e-14
_TURNS = 3
# Squares of singular values below this are rounding: their columns are scaled to 1.
_SINGULAR = 1e-12
_COLUMN = {name: number for number, name in enumerate(Coefficients._fields)}


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMeasurement:
    """Steps that followed each other, and what they took together.

    Attributes:
        steps: the works of the group's ranks, one entry for each step.
        seconds: of all steps.
        shape: name of the kind of work, such as the batch; measurements of one shape are held out together.
        weight: of the measurement in the fit.
    """

    steps: tuple[tuple[Work, ...], ...]
    seconds: float
    shape: str
    weight: float = 1.0


def fit_coefficients(
    model: StepModel, measurements: Sequence[StepMeasurement], near: float = MEDIAN_ERROR
) -> Coefficients:
    """Returns the coefficients with the least robust relative error; terms that never occur are 0.

    Args:
        model: of the engine.
        measurements: of its steps.
        near: relative error up to which errors count by their square; the larger, the nearer a fit is to means.

    Raises:
        ValueError: there is no measurement.
    """
    if not measurements:
        raise ValueError("no steps to fit")
    table = _Table.of(model, measurements)
    starts = [_alternate(table, guess, near) for guess in _guesses(table)]
    losses = [table.loss(found) for found in starts]
    return Coefficients(*map(float, starts[losses.index(min(losses))]))


def predict(model: StepModel, coefficients: Coefficients, measurement: StepMeasurement) -> float:
    """Returns the seconds that the measured steps should take."""
    cost = FittedCost(model=model, coefficients=coefficients, source="")
    return sum(cost.group_step_s(works) for works in measurement.steps)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Table:
    """Measurements as arrays.

    Attributes:
        alternatives: [step, alternative, term], missing alternatives all 0.
        owners: measurement of each step.
        seconds: of each measurement.
        weights: of each measurement.
    """

    alternatives: Floats
    owners: npt.NDArray[np.int64]
    seconds: Floats
    weights: Floats

    @classmethod
    def of(cls, model: StepModel, measurements: Sequence[StepMeasurement]) -> "_Table":
        steps = [(number, works) for number, row in enumerate(measurements) for works in row.steps]
        alternatives = np.zeros((len(steps), 3, len(Coefficients._fields)))
        for row, (_, works) in zip(alternatives, steps, strict=True):
            found = model.alternatives(works)
            row[: len(found)] = found
        return cls(
            alternatives=alternatives,
            owners=np.array([number for number, _ in steps]),
            seconds=np.array([row.seconds for row in measurements]),
            weights=np.array([row.weight for row in measurements]),
        )

    def sum_longest(self, found: Floats) -> Floats:
        """Returns [measurement, term] with the longest alternative of each step."""
        longest = np.argmax(self.alternatives @ found, axis=1)
        return self.sum_steps(self.alternatives[np.arange(len(longest)), longest])

    def sum_steps(self, terms: Floats) -> Floats:
        """Returns [measurement, term] of the terms of each step, whose measurements follow each other."""
        return np.asarray(np.add.reduceat(terms, np.searchsorted(self.owners, np.arange(len(self.seconds))), axis=0))

    def errors(self, found: Floats) -> Floats:
        """Returns the distance of the logarithms of prediction and measurement, at most 1."""
        predicted = self.sum_longest(found) @ found
        return np.asarray(np.minimum(1.0, np.abs(np.log(np.maximum(predicted, _LEAST_S) / self.seconds))))

    def loss(self, found: Floats) -> float:
        """Returns the weighted mean of the relative error."""
        return float(self.weights @ self.errors(found) / self.weights.sum())


def _guesses(table: _Table) -> Iterator[Floats]:
    """Yields coefficients to start from: without a least time, and with such as the measured steps suggest."""
    rows = table.sum_steps(table.alternatives[:, 0])
    flat = _least_squares(rows / table.seconds[:, None], np.ones(len(table.seconds)))
    yield flat
    terms, least = table.alternatives[:, 0], table.alternatives[:, 1]
    step_s = (table.seconds / np.bincount(table.owners, minlength=len(table.seconds)))[table.owners]
    is_eager = least[:, _COLUMN["eager_s"]] > 0.0
    is_piecewise = (least[:, _COLUMN["piecewise_s"]] > 0.0) & ~is_eager
    if not (is_eager.any() and is_piecewise.any()):
        return
    # The GPU's own time shows in the largest steps.
    tokens = terms[:, _COLUMN["prefill_s"]]
    is_large = tokens >= np.quantile(tokens[is_eager], 0.75)
    for bases, quantile in itertools.product(_START_BASES, _START_QUANTILES):
        start = flat.copy()
        start[[_COLUMN[name] for name in _PROMPT_TERMS]] = 0.0
        base_s = bases * start[_COLUMN["decode_s"]]
        start[_COLUMN["prefill_base_s"]] = base_s
        start[_COLUMN["prefill_s"]] = max(0.0, float(np.median((step_s - base_s)[is_large] / tokens[is_large])))
        piecewise_s = float(np.quantile(step_s[is_piecewise], quantile))
        start[_COLUMN["piecewise_s"]] = piecewise_s
        start[_COLUMN["eager_s"]] = max(0.0, float(np.quantile(step_s[is_eager], quantile)) - piecewise_s)
        yield start


def _alternate(table: _Table, found: Floats, near: float) -> Floats:
    """Returns the best coefficients on the way from a start: the longest alternatives, then a fit to these.

    Errors are relative to the prediction of the round before: relative to the measurement, noise would pull it down.
    """
    best, least, rest = found, table.loss(found), _PATIENCE
    for _ in range(_ROUNDS):
        rows = table.sum_longest(found)
        expected_s = np.maximum(rows @ found, 0.1 * table.seconds)
        ratios = table.seconds / expected_s
        robust = np.sqrt(table.weights / np.maximum(np.abs(ratios - 1.0), near))
        found = _least_squares(rows / expected_s[:, None] * robust[:, None], ratios * robust)
        rest -= 1
        if (loss := table.loss(found)) < least:
            rest = _PATIENCE if loss < least * _PROGRESS else rest
            best, least = found, loss
        if rest == 0:
            break
    return best


def _least_squares(rows: Floats, values: Floats) -> Floats:
    """Returns non-negative least squares (Lawson and Hanson, 1974), columns scaled to like sizes."""
    scale = np.linalg.norm(rows, axis=0)
    scale[scale == 0.0] = 1.0
    scaled = rows / scale
    sizes, turns = np.linalg.eigh(scaled.T @ scaled)
    roots = np.sqrt(sizes[sizes > _SINGULAR])
    corner = roots[:, None] * turns.T[sizes > _SINGULAR]
    target = turns.T[sizes > _SINGULAR] @ (scaled.T @ values) / roots
    least = 1e-9 * float(np.linalg.norm(values))
    found = np.zeros(rows.shape[1])
    kept: list[int] = []
    barred: list[int] = []
    # Rounding could make columns come and go for ever.
    for _ in range(_TURNS * rows.shape[1]):
        gradient = corner.T @ (target - corner @ found)
        gradient[kept + barred] = -np.inf
        entering = int(np.argmax(gradient))
        if not gradient[entering] > least:
            break
        found, kept = _settle(corner, target, found, [*kept, entering])
        barred = [] if entering in kept else [*barred, entering]
    return np.asarray(found / scale)


def _settle(corner: Floats, target: Floats, found: Floats, kept: list[int]) -> tuple[Floats, list[int]]:
    """Returns the solution on the kept columns, columns left out until none is negative."""
    while True:
        settled = np.zeros_like(found)
        if not kept:
            return settled, kept
        solved = np.linalg.lstsq(corner[:, kept], target, rcond=None)[0]
        if solved.min() >= 0.0:
            settled[kept] = solved
            return settled, kept
        present, negative = found[kept], solved < 0.0
        step = float(np.min(present[negative] / (present[negative] - solved[negative])))
        settled[kept] = np.maximum(0.0, present + step * (solved - present))
        found, kept = settled, [column for column in kept if settled[column] > _VANISHED]
