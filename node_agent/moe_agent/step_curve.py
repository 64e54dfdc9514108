"""Online fit of how a step's time bends with its tokens, where `step_time` has a line.

`base_s + token_s * prefill_tokens + decode_s * decoding_requests + bent_s * max(0, all_tokens - bend)`

A step of few tokens takes as long as reading the weights; only beyond some number of tokens does computing decide (the
roofline of Williams, Waterman, Patterson, 2009), and for experts, which all ranks of a group share, that number is one
of the tokens of all ranks. So prefill tokens are cheap up to there and dear beyond: where to cut a prompt.

Called by the scheduler plugin with one observation for each step. Pure: the caller measures the time.

Invariants: no coefficient is negative; a direction in which nothing new is seen keeps its last estimate; a single freak
step moves the curve by little.
"""

import math
from itertools import product

import numpy as np
from moe_scheduling.request.prefill_budget import RooflineKnee, StepTimeCurve

from moe_agent.step_time import LINE_MEMORY_STEPS, weigh_steps

# All tokens of a step at which it may begin to take longer for each.
BENDS = (512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12_288, 16_384)
_BENDS = np.array(BENDS)
_LINE = 3
# Brings the columns to like sizes: one, prefill tokens, decoding requests, tokens beyond each bend.
_SCALE = np.array([1.0, 1024.0, 32.0, *(1024.0 for _ in BENDS)])
# The columns of each fit: those of the line, and one bend.
_PLACES = np.array([[0, 1, 2, _LINE + number] for number in range(len(BENDS))])
# Which coefficients are not 0: the best that has none below 0 is the bounded minimum (Karush-Kuhn-Tucker).
_KEPT = np.array([row for row in product((0.0, 1.0), repeat=_LINE + 1) if any(row)])
_BATCH = 64


class StepCurve:
    """See the module; least squares with exponential forgetting, weighted by relative error, as `StepTimeFit`.

    All bends are tried at each fit, which comes after 64 steps, and then the later the longer it has gone on.

    Args:
        memory_steps: steps after which an observation weighs 1/e.
        least_steps: steps before there is a curve.
        refit_every: most steps between two fits.
        outlier_factor: a step that takes more than so many times the prediction counts as that many times.
    """

    def __init__(
        self,
        *,
        memory_steps: float = 4 * LINE_MEMORY_STEPS,
        least_steps: int = _BATCH,
        refit_every: int = 8 * _BATCH,
        outlier_factor: float = 3.0,
    ) -> None:
        self._keep = 1.0 - 1.0 / memory_steps
        self._least_steps, self._refit_every = least_steps, refit_every
        self._outlier_factor = outlier_factor
        self._batch: list[tuple[float, float, float, float]] = []
        self._steps = 0
        self._refit_at = least_steps
        self._normal = np.zeros((len(_SCALE), len(_SCALE)))
        self._right = np.zeros(len(_SCALE))
        self._scaled = np.zeros(len(_SCALE))
        self._base_s = self._token_s = self._decode_s = 0.0
        self._bends: tuple[RooflineKnee, ...] = ()
        self._is_known = False

    def at(self, decoding: int) -> StepTimeCurve | None:
        """For so many decoding requests of the fullest rank; None until enough steps were seen."""
        if not self._is_known:
            return None
        return StepTimeCurve(self._token_s, self._base_s + self._decode_s * decoding, self._bends)

    def step_s(self, prefill_tokens: int, decoding_requests: int, all_tokens: int) -> float:
        """Seconds of a step with these tokens and requests of its fullest rank; 0 until enough steps were seen."""
        if not self._is_known:
            return 0.0
        bent_s = sum(bend.token_s * (all_tokens - bend.tokens) for bend in self._bends if all_tokens > bend.tokens)
        return self._base_s + self._token_s * prefill_tokens + self._decode_s * decoding_requests + bent_s

    def observe(self, *, prefill_tokens: int, decoding_requests: int, all_tokens: int, step_s: float) -> None:
        """Takes one step into account: the tokens and requests of its fullest rank, and the tokens of all ranks."""
        if not (0.0 < step_s < math.inf and all_tokens > 0):
            return
        self._batch.append((prefill_tokens, decoding_requests, all_tokens, step_s))
        if len(self._batch) == min(_BATCH, self._least_steps):
            self._steps += len(self._batch)
            self._accumulate()
            self._batch.clear()
            if self._steps >= self._refit_at:
                self._refit()
                self._refit_at = self._steps + min(self._steps, self._refit_every)

    def _accumulate(self) -> None:
        batch = np.array(self._batch)
        columns = np.empty((len(batch), len(_SCALE)))
        columns[:, 0] = 1.0
        columns[:, 1:_LINE] = batch[:, :2]
        columns[:, _LINE:] = np.maximum(0.0, batch[:, 2:3] - _BENDS)
        columns /= _SCALE
        expected_s = columns @ self._scaled if self._is_known else batch[:, 3]
        normal, right, fade = weigh_steps(columns, batch[:, 3], expected_s, self._keep, self._outlier_factor)
        self._normal = fade * self._normal + normal
        self._right = fade * self._right + right

    def _refit(self) -> None:
        # A ridge towards the last estimate: it decides only where the observations say nothing.
        ridge = 1e-6 * self._normal[0, 0]
        matrix = self._normal[_PLACES[:, :, None], _PLACES[:, None, :]] + ridge * np.eye(_LINE + 1)
        right = self._right[_PLACES] + ridge * self._scaled[_PLACES]
        kept = _KEPT[None]
        # What is not kept gets an equation of its own: itself is 0.
        masked = matrix[:, None] * kept[..., :, None] * kept[..., None, :] + np.eye(_LINE + 1) * (1.0 - kept[..., None])
        found = np.linalg.solve(masked, (right[:, None] * kept)[..., None])[..., 0]
        error = np.einsum("bki,bij,bkj->bk", found, matrix, found) - 2.0 * np.einsum("bi,bki->bk", right, found)
        error[(found < 0.0).any(axis=-1)] = math.inf
        bend, subset = np.unravel_index(int(np.argmin(error)), error.shape)
        self._scaled = np.zeros(len(_SCALE))
        self._scaled[_PLACES[bend]] = found[bend, subset]
        base, token, decode, *bends = (self._scaled / _SCALE).tolist()
        self._base_s, self._token_s, self._decode_s = base, token, decode
        self._bends = tuple(RooflineKnee(at, slope) for at, slope in zip(BENDS, bends, strict=True) if slope > 0.0)
        self._is_known = True
