"""Online fit of a piecewise-linear step time with one knee, where `step_time` fits a line.

`base_s + token_s * prefill_tokens + decode_s * decoding_requests + knee_s * max(0, all_tokens - knee)`

A step of few tokens takes as long as reading the weights; only beyond some number of tokens does computing decide (the
roofline of Williams, Waterman, Patterson, 2009). All ranks of a group share the experts, so for them that number is one
of the tokens of all ranks. Prefill tokens are cheap up to the knee and dear beyond: where to cut a prompt.

Called by the scheduler plugin with one observation for each step. Pure: the caller measures the time.

Invariants: no coefficient is negative; a direction in which nothing new is seen keeps its last estimate; a single freak
step moves the curve by little.
"""

import math

import numpy as np
from moe_scheduling.request.prefill_budget import RooflineKnee, StepTimeCurve

from moe_agent.step_time import LINE_MEMORY_STEPS, solve_not_below_0, stack_rows, weigh_steps

# Candidates for the knee, in tokens of all ranks in a step.
KNEES = (512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12_288, 16_384)
_KNEES = np.array(KNEES)
_LINE = 3
# Brings the columns to like sizes: one, prefill tokens, decoding requests, tokens beyond each knee.
_SCALE = np.array([1.0, 1024.0, 32.0, *(1024.0 for _ in KNEES)])
_PER_SCALE = 1.0 / _SCALE
# The columns of each fit: those of the line, and one knee.
_COLUMNS = np.array([[0, 1, 2, _LINE + number] for number in range(len(KNEES))])
_FIRST_FIT_STEPS = 64
# Observations are worked in together: the more at once, the less each costs.
_MOST_ROWS = 256


class StepTimeCurveFit:
    """Least squares with exponential forgetting, weighted by relative error, as `StepTimeFit`, over all knees.

    All candidates for the knee are tried at each fit, the first after 64 steps and the later ones ever further apart.

    Args:
        memory_steps: steps after which an observation weighs 1/e.
        least_steps: steps before there is a curve.
        refit_every: most steps between two fits.
        outlier_factor: a step that takes longer than this many times the prediction counts as that many times.
    """

    def __init__(
        self,
        *,
        memory_steps: float = 4 * LINE_MEMORY_STEPS,
        least_steps: int = _FIRST_FIT_STEPS,
        refit_every: int = 8 * _FIRST_FIT_STEPS,
        outlier_factor: float = 3.0,
    ) -> None:
        self._keep = 1.0 - 1.0 / memory_steps
        self._refit_every = refit_every
        self._outlier_factor = outlier_factor
        self._rows: list[tuple[float, float, float, float]] = []
        self._steps = 0
        self._refit_at = least_steps
        self._rows_at_once = min(least_steps, _MOST_ROWS)
        self._normal = np.zeros((len(_SCALE), len(_SCALE)))
        self._right = np.zeros(len(_SCALE))
        self._scaled = np.zeros(len(_SCALE))
        self._base_s = self._token_s = self._decode_s = 0.0
        self._knees: tuple[RooflineKnee, ...] = ()
        self._is_known = False

    def at(self, decoding: int) -> StepTimeCurve | None:
        """The curve with this many decoding requests in the fullest rank; None until enough steps were seen."""
        if not self._is_known:
            return None
        return StepTimeCurve(self._token_s, self._base_s + self._decode_s * decoding, self._knees)

    def step_s(self, prefill_tokens: int, decoding_requests: int, all_tokens: int) -> float:
        """Seconds of a step with these tokens and requests of its fullest rank; 0 until enough steps were seen."""
        step_s = self._base_s + self._token_s * prefill_tokens + self._decode_s * decoding_requests
        for knee_tokens, knee_s in self._knees:
            if all_tokens > knee_tokens:
                step_s += knee_s * (all_tokens - knee_tokens)
        return step_s

    def observe(self, *, prefill_tokens: int, decoding_requests: int, all_tokens: int, step_s: float) -> None:
        """Takes one step into account: the tokens and requests of its fullest rank, and the tokens of all ranks."""
        if not (0.0 < step_s < math.inf and all_tokens > 0):
            return
        self._rows.append((prefill_tokens, decoding_requests, all_tokens, step_s))
        if len(self._rows) == self._rows_at_once:
            self._steps += self._rows_at_once
            self._accumulate()
            self._rows.clear()
            if self._steps >= self._refit_at:
                self._refit()
                self._refit_at = self._steps + min(self._steps, self._refit_every)
            self._rows_at_once = min(self._refit_at - self._steps, _MOST_ROWS)

    def _accumulate(self) -> None:
        rows = stack_rows(self._rows)
        columns = np.empty((len(_SCALE), len(self._rows)))
        columns[0] = 1.0
        columns[1:_LINE] = rows[:2]
        np.maximum(0.0, rows[2] - _KNEES[:, None], out=columns[_LINE:])
        columns *= _PER_SCALE[:, None]
        step_s = rows[3]
        expected_s = self._scaled @ columns if self._is_known else step_s
        normal, right, fade = weigh_steps(columns, step_s, expected_s, self._keep, self._outlier_factor)
        self._normal = fade * self._normal + normal
        self._right = fade * self._right + right

    def _refit(self) -> None:
        # A ridge towards the last estimate: it decides only where the observations say nothing.
        ridge = 1e-6 * self._normal[0, 0]
        matrix = self._normal[_COLUMNS[:, :, None], _COLUMNS[:, None, :]] + ridge * np.eye(_LINE + 1)
        right = self._right[_COLUMNS] + ridge * self._scaled[_COLUMNS]
        found, value = solve_not_below_0(matrix, right)
        knee = int(np.argmin(value))
        self._scaled = np.zeros(len(_SCALE))
        self._scaled[_COLUMNS[knee]] = found[knee]
        base, token, decode, *slopes = (self._scaled / _SCALE).tolist()
        self._base_s, self._token_s, self._decode_s = base, token, decode
        self._knees = tuple(RooflineKnee(at, slope) for at, slope in zip(KNEES, slopes, strict=True) if slope > 0.0)
        self._is_known = True
