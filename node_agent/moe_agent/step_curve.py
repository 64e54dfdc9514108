"""Online fit of how a step's time bends with its tokens, where `step_time` has a line.

`base_s + token_s * prefill_tokens + decode_s * decoding_requests + sum(bend_s * max(0, all_tokens - bend))`

A step of few tokens takes as long as reading the weights; only beyond some number of tokens does computation decide
(the roofline of Williams, Waterman, Patterson, 2009), and for experts, which all ranks of a group share, that number is
one of the tokens of all ranks. So prefill tokens are cheap up to there and dear beyond: where to cut a prompt.

Called by the scheduler plugin with one observation for each step. Pure: the caller measures the time.

Invariants: no coefficient is negative; a direction in which nothing new is seen keeps its last estimate; a single freak
step moves the curve by little.
"""

import math
from collections.abc import Sequence

import numpy as np
from moe_scheduling.pace import LINE_MEMORY_STEPS
from moe_scheduling.prefill import Bend, Curve

# All tokens of a step at which it may begin to take longer for each.
BENDS = (512, 1024, 1536, 2048, 3072, 4096, 8192)
# Brings the columns to like sizes.
_SCALE = np.array([1.0, 1024.0, 32.0, *(1024.0 for _ in BENDS)])
_COLUMNS = len(_SCALE)
_SWEEPS = 12


class StepCurve:
    """See the module; least squares with exponential forgetting, weighted by relative error, as `StepTimeFit`.

    Args:
        memory_steps: steps after which an observation weighs 1/e.
        least_steps: steps before there is a curve.
        refit_every: steps between two fits after that.
        outlier_factor: a step that takes more than so many times the prediction counts as that many times.
    """

    def __init__(
        self,
        *,
        memory_steps: float = 4 * LINE_MEMORY_STEPS,
        least_steps: int = 64,
        refit_every: int = 64,
        outlier_factor: float = 3.0,
    ) -> None:
        self._keep = 1.0 - 1.0 / memory_steps
        self._refit_every = refit_every
        self._outlier_factor = outlier_factor
        self._batch: list[tuple[float, float, float, float]] = []
        self._batch_size = least_steps
        self._normal = np.zeros((_COLUMNS, _COLUMNS))
        self._right = np.zeros(_COLUMNS)
        self._scaled = np.zeros(_COLUMNS)
        self.is_known = False
        self.base_s = 0.0
        self.token_s = 0.0
        self.decode_s = 0.0
        self.bends: tuple[Bend, ...] = ()

    def at(self, decoding: int) -> Curve | None:
        """For so many decoding requests of the fullest rank; None until enough steps were seen."""
        if not self.is_known:
            return None
        return Curve(self.token_s, self.base_s + self.decode_s * decoding, self.bends)

    def observe(self, *, prefill_tokens: int, decoding_requests: int, all_tokens: int, step_s: float) -> None:
        """Takes one step into account: the tokens and requests of its fullest rank, and the tokens of all ranks."""
        if 0.0 < step_s < math.inf and all_tokens > 0:
            self._batch.append((prefill_tokens, decoding_requests, all_tokens, step_s))
            if len(self._batch) == self._batch_size:
                self._accumulate()
                self._refit()
                self._batch.clear()
                self._batch_size = self._refit_every

    def _accumulate(self) -> None:
        batch = np.array(self._batch)
        columns = np.empty((len(batch), _COLUMNS))
        columns[:, 0] = 1.0
        columns[:, 1:3] = batch[:, :2]
        columns[:, 3:] = np.maximum(0.0, batch[:, 2:3] - np.array(BENDS))
        columns /= _SCALE
        step_s = batch[:, 3]
        expected_s = columns @ self._scaled if self.is_known else step_s
        expected_s = np.where(expected_s > 0.0, expected_s, step_s)
        step_s = np.minimum(step_s, self._outlier_factor * expected_s)
        age = np.arange(len(batch) - 1, -1, -1)
        weighted = columns * (self._keep**age / expected_s**2)[:, None]
        fade = self._keep ** len(batch)
        self._normal = fade * self._normal + weighted.T @ columns
        self._right = fade * self._right + weighted.T @ step_s

    def _refit(self) -> None:
        # A ridge towards the last estimate: it decides only where the observations say nothing.
        ridge = 1e-6 * self._normal[0, 0]
        matrix = self._normal + ridge * np.eye(_COLUMNS)
        right = self._right + ridge * self._scaled
        self._scaled = np.array(_descend(matrix.tolist(), right.tolist(), self._scaled.tolist()))
        base, token, decode, *bends = (self._scaled / _SCALE).tolist()
        self.base_s, self.token_s, self.decode_s = base, token, decode
        self.bends = tuple(Bend(at, slope) for at, slope in zip(BENDS, bends, strict=True) if slope > 0.0)
        self.is_known = True


def _descend(matrix: Sequence[Sequence[float]], right: Sequence[float], row: list[float]) -> list[float]:
    """Towards the minimum of `x'Ax - 2b'x` with no part below 0, one part after the other (coordinate descent)."""
    for _ in range(_SWEEPS):
        for place, line in enumerate(matrix):
            rest = right[place] - sum(map(float.__mul__, line, row)) + line[place] * row[place]
            row[place] = max(0.0, rest / line[place])
    return row
