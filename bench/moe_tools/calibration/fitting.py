"""Step times of a real engine: the fit of `step_fit` to its steps, checked on shapes of steps not fitted on.

Pure. The model is the same as of the simulator's fitted presets (`moe_tools.simulator.step_time`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import log2

from moe_tools.calibration.step_errors import ErrorRow, by_shape, cross_validate, summarize
from moe_tools.calibration.step_fit import StepMeasurement, fit_coefficients
from moe_tools.simulator.costs import Work
from moe_tools.simulator.step_time import FittedCost, StepModel

LEAST_STEPS = 50
# Errors of a CPU's steps are as large, and what counts in a simulation are sums: nearly a fit to means.
_NEAR = 0.3


class TooFewSteps(ValueError):
    """No step times can be fitted to so few."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredStep:
    """A step of one rank and what it took."""

    work: Work
    step_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """Fitted step times, and how far such a fit is from steps of shapes that it was not fitted on.

    Attributes:
        cost: fitted to all steps.
        steps: it was fitted on.
        errors: of fits to four fifths of the shapes on the last fifth, all five in turn.
    """

    cost: FittedCost
    steps: int
    errors: tuple[ErrorRow, ...]


def fit_cost(steps: Sequence[MeasuredStep], model: StepModel, source: str) -> FittedCost:
    """Returns the step times fitted to all steps.

    Raises:
        TooFewSteps: there are too few.
    """
    if len(steps) < LEAST_STEPS:
        raise TooFewSteps(f"{len(steps)} steps are too few, {LEAST_STEPS} are needed")
    coefficients = fit_coefficients(model, _measurements(steps), _NEAR)
    return FittedCost(model=model, coefficients=coefficients, source=source)


def fit_and_check(steps: Sequence[MeasuredStep], model: StepModel, source: str, seed: int = 0) -> Fit:
    """Returns the step times fitted to all steps, with their errors on held-out shapes, drawn with the seed.

    Raises:
        TooFewSteps: there are too few, or all are of one shape.
    """
    cost = fit_cost(steps, model, source)
    rows = _measurements(steps)
    folds = by_shape(rows, seed)
    if len(set(folds)) < 2:
        raise TooFewSteps("all steps are of one shape, none is left to check a fit on")
    predicted = cross_validate(model, rows, folds, _NEAR)
    return Fit(cost=cost, steps=len(steps), errors=summarize(rows, predicted))


def _measurements(steps: Sequence[MeasuredStep]) -> list[StepMeasurement]:
    return [StepMeasurement(steps=((step.work,),), seconds=step.step_s, shape=_shape(step.work)) for step in steps]


def _shape(work: Work) -> str:
    """Returns the batch of a decode step, or the prompt tokens to a fourth of an octave with the batch's octave."""
    if not work.prefill_tokens:
        return f"decode {work.decode_requests}"
    beside = f" beside some {1 << work.decode_requests.bit_length()}" if work.decode_requests else ""
    return f"prompt of about {2 ** (round(4 * log2(work.prefill_tokens)) / 4):.0f}{beside}"
