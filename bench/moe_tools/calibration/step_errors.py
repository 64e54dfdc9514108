"""Errors of fitted step times on measurements that they were not fitted on: cross-validation and the table.

Pure. Measurements are held out by group, not one by one: all of a run where there are several runs, else all of a shape
(such as a batch size), so that no step of the tested size was fitted. Steps of the sizes beside it were.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt
from rich.table import Table

from moe_tools.calibration.step_fit import MEDIAN_ERROR, Floats, StepMeasurement, fit_coefficients, predict
from moe_tools.simulator.step_time import StepModel

FOLDS = 5
# Times the median of a shape; some 1 % of an engine's steps take longer.
_OUTLIER = 3.0
# Times the prediction.
_COMPILING = 5.0


class StepKind(StrEnum):
    """Content of the measured steps."""

    DECODE = "decode steps"
    PROMPT = "whole prompts alone"
    MIXED = "prompts beside answers"


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorRow:
    """Relative errors, |predicted - measured| / measured, of one kind of steps.

    Attributes:
        kind: of the steps.
        measurements: how many.
        left_out: measurements of more than three times the median of their shape or five times their prediction, such
            as first steps that compile kernels; in no figure of this row.
        median: of their errors.
        p90: 90th percentile of their errors.
        shapes: kinds of work among them.
        shape_median: median over the shapes of the error of the median step.
        shape_p90: 90th percentile of the same.
        bias: predicted / measured, both summed; 1 is none.
        bias_of_all: the same with the measurements that were left out.
    """

    kind: StepKind
    measurements: int
    left_out: int
    median: float
    p90: float
    shapes: int
    shape_median: float
    shape_p90: float
    bias: float
    bias_of_all: float


def kind_of(measurement: StepMeasurement) -> StepKind:
    """Returns the kind of a measurement by the work of its first rank."""
    own = [works[0] for works in measurement.steps]
    if not any(work.prefill_tokens for work in own):
        return StepKind.DECODE
    return StepKind.MIXED if any(work.decode_requests for work in own) else StepKind.PROMPT


def by_shape(measurements: Sequence[StepMeasurement], seed: int = 0) -> list[int]:
    """Returns the fold of each measurement: all of one shape are in one fold."""
    names = sorted({row.shape for row in measurements})
    order = np.random.default_rng(seed).permutation(len(names))
    fold = {names[place]: number % FOLDS for number, place in enumerate(order)}
    return [fold[row.shape] for row in measurements]


def cross_validate(
    model: StepModel, measurements: Sequence[StepMeasurement], folds: Sequence[int], near: float = MEDIAN_ERROR
) -> list[float]:
    """Returns the predicted seconds of each measurement, from a fit on the other folds.

    Args:
        model: of the engine.
        measurements: all.
        folds: of each measurement.
        near: of the fits (`fit_coefficients`).

    Raises:
        ValueError: all are in one fold, so that nothing is left to fit on.
    """
    if len(set(folds)) < 2:
        raise ValueError("all measurements are in one fold, none is left to fit on")
    predicted = [0.0] * len(measurements)
    for fold in sorted(set(folds)):
        fitted = [row for row, of in zip(measurements, folds, strict=True) if of != fold]
        coefficients = fit_coefficients(model, fitted, near)
        for number, row in enumerate(measurements):
            if folds[number] == fold:
                predicted[number] = predict(model, coefficients, row)
    return predicted


def summarize(measurements: Sequence[StepMeasurement], predicted: Sequence[float]) -> tuple[ErrorRow, ...]:
    """Returns the errors of each kind that there is."""
    rows = []
    pairs = list(zip(measurements, predicted, strict=True))
    for kind in StepKind:
        of_kind = [(row, seconds) for row, seconds in pairs if kind_of(row) is kind]
        if of_kind:
            rows.append(_summarize(kind, of_kind))
    return tuple(rows)


def _summarize(kind: StepKind, all_pairs: Sequence[tuple[StepMeasurement, float]]) -> ErrorRow:
    shapes = _by_shape(all_pairs)
    pairs = np.concatenate(list(shapes.values()))
    everything = np.array([(row.seconds, seconds) for row, seconds in all_pairs])
    errors = np.abs(pairs[:, 1] / pairs[:, 0] - 1.0)
    of_shapes = np.array([abs(np.median(rows[:, 1]) / np.median(rows[:, 0]) - 1.0) for rows in shapes.values()])
    return ErrorRow(
        kind=kind,
        measurements=len(pairs),
        left_out=len(all_pairs) - len(pairs),
        median=float(np.median(errors)),
        p90=float(np.percentile(errors, 90)),
        shapes=len(shapes),
        shape_median=float(np.median(of_shapes)),
        shape_p90=float(np.percentile(of_shapes, 90)),
        bias=float(pairs[:, 1].sum() / pairs[:, 0].sum()),
        bias_of_all=float(everything[:, 1].sum() / everything[:, 0].sum()),
    )


def _by_shape(pairs: Sequence[tuple[StepMeasurement, float]]) -> dict[str, Floats]:
    """Returns [measurement, (measured, predicted)] of each shape, without the outliers."""
    groups: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for row, seconds in pairs:
        groups[row.shape].append((row.seconds, seconds))
    arrays = {name: np.array(rows) for name, rows in groups.items()}
    usual = {name: rows[_is_usual(rows)] for name, rows in arrays.items()}
    return {name: rows for name, rows in usual.items() if len(rows)}


def _is_usual(rows: Floats) -> npt.NDArray[np.bool_]:
    measured, predicted = rows[:, 0], rows[:, 1]
    return np.asarray((measured <= _OUTLIER * np.median(measured)) & (measured <= _COMPILING * predicted))


def render_errors(rows: Mapping[str, Sequence[ErrorRow]], title: str) -> Table:
    """Returns a table of the errors, by name of the preset."""
    table = Table(title=title, title_justify="left")
    numbers = ("n", "left out", "median", "p90", "sum", "sum of all", "shapes", "median of shapes", "p90 of shapes")
    for name in ("", "kind", *numbers):
        table.add_column(name, justify="right" if name in numbers else "left")
    for name, of_name in rows.items():
        for row in of_name:
            table.add_row(*_cells(name, row))
    return table


def _cells(name: str, row: ErrorRow) -> tuple[str, ...]:
    percent: Callable[[float], str] = "{:.1%}".format
    counts = (f"{row.measurements:,}", f"{row.left_out}")
    errors = (percent(row.median), percent(row.p90), f"{row.bias - 1:+.1%}", f"{row.bias_of_all - 1:+.1%}")
    return (name, row.kind.value, *counts, *errors, f"{row.shapes}", percent(row.shape_median), percent(row.shape_p90))
