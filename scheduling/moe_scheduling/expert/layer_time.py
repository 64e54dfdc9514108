"""Time of a rank in one layer of experts: reading the weights of the experts that its tokens meet, and computing them.

A fused kernel takes, beside what no placement changes, about `expert_s * D + token_s * T` seconds on a rank with `D`
distinct experts that got a token and `T` (token, expert) pairs. Small steps (decode) go by D: skew makes them faster,
and a copy of a hot expert is one more expert to read. Large ones (prefill) go by T. `expert_s` is all that one expert
more takes: reading its weights, and the part of its last tile that is computed in vain.

`python -m moe_lab.experts routed DATA` fits such a plane to a table of vLLM 0.24's fused kernel and prints its median
error: 4.0 % for Qwen3-30B-A3B in bfloat16 on H200.
"""

import math
from dataclasses import dataclass

import numpy as np

from moe_scheduling.expert.idle_slots import serving_copies, serving_slots
from moe_scheduling.expert.placement import Floats, Ints


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSizes:
    """How often engine steps have which size.

    Attributes:
        tokens: tokens of a step, by class of size.
        parts: part of the steps in each class; they add up to 1.

    Raises:
        ValueError: there is no class, the lengths differ, or a value is not positive and finite.
    """

    tokens: tuple[float, ...]
    parts: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.tokens or len(self.tokens) != len(self.parts):
            raise ValueError("step sizes need as many parts as sizes, at least one")
        if not all(0.0 < value < math.inf for value in (*self.tokens, *self.parts)):
            raise ValueError("step sizes and their parts must be positive and finite")
        if abs(sum(self.parts) - 1.0) > 1e-6:
            raise ValueError("the parts of the step sizes must add up to 1")

    @property
    def factors(self) -> Floats:
        """Tokens of each class over those of the mean step."""
        tokens = np.asarray(self.tokens)
        return np.asarray(tokens / float(tokens @ np.asarray(self.parts)))


MEAN_STEP = StepSizes(tokens=(1.0,), parts=(1.0,))
"""All steps alike, where their sizes were not recorded."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerTime:
    """The time of a rank in a layer under a recorded load.

    Attributes:
        by_expert: [layer, expert], tokens of the mean step.
        sizes: sizes of the steps.
        expert_s: seconds for one expert more that got a token.
        token_s: seconds to compute one token of one expert.
    """

    by_expert: Floats
    sizes: StepSizes
    expert_s: float
    token_s: float

    def of_ranks(self, table: Ints, ranks: int) -> Floats:
        """Returns the seconds of each rank, [size, layer, rank], with the expert in each slot, [layer, slot]."""
        copies = serving_copies(table, self.by_expert.shape[1], ranks)
        serving = serving_slots(table, ranks)
        share = self.by_expert / np.maximum(copies, 1)
        return np.stack(
            [
                (np.take_along_axis(self._seconds(share * factor), table, 1) * serving)
                .reshape(len(table), ranks, -1)
                .sum(2)
                for factor in self.sizes.factors
            ]
        )

    def mean_step(self, by_size: Floats) -> Floats:
        """Returns [layer], the mean over the steps of values by size, [size, layer]."""
        return np.asarray(np.asarray(self.sizes.parts) @ by_size)

    def slot_work(self, copies: Ints) -> Floats:
        """Returns [layer, expert]: what one of an expert's slots adds to the time of its rank in the mean step.

        Args:
            copies: [layer, expert], slots that share an expert's tokens.
        """
        share, total = self.by_expert / np.maximum(copies, 1), np.zeros_like(self.by_expert)
        for part, factor in zip(self.sizes.parts, self.sizes.factors, strict=True):
            total += part * self._seconds(share * factor)
        return total

    def slot_work_of_large(self, copies: Ints) -> Floats:
        """Returns the same, [layer, expert], in steps so large that each expert with a load is read."""
        share = self.by_expert / np.maximum(copies, 1)
        return np.asarray(self.token_s * share + self.expert_s * (share > 0))

    def _seconds(self, tokens: Floats) -> Floats:
        """Returns the seconds of slots with these expected tokens; the chance that one gets any is Poisson's."""
        return np.asarray(self.token_s * tokens - self.expert_s * np.expm1(-tokens))
