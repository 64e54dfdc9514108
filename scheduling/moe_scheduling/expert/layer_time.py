"""Time of a rank in one layer of experts: reading the weights of the experts that its tokens meet, or computing them.

A fused kernel takes, beside what no placement changes, `max(expert_s * D, token_s * (T + pad_tokens * D))` seconds on a
rank with `D` distinct experts that got a token and `T` (token, expert) pairs. Small steps (decode) go by D: skew makes
them faster, and a copy of a hot expert is one more expert to read. Large ones (prefill) go by T. Kernels compute whole
tiles of tokens, so time against tokens is a staircase: 12 tokens of an expert take what 16 do. `pad_tokens` is what an
expert's last tile wastes in the mean.

The form was fitted to the tables of vLLM 0.24's fused kernels on H100 and H200 in aiconfigurator (`gpu_priors.py`);
its median error there is 4 % in bfloat16.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from moe_scheduling.expert.idle_slots import serving_copies, serving_slots
from moe_scheduling.expert.placement import Flags, Floats, Ints


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
        expert_s: seconds to read the weights of one expert.
        token_s: seconds to compute one token of one expert.
        pad_tokens: tokens by which an expert's last tile is computed in vain.
    """

    by_expert: Floats
    sizes: StepSizes
    expert_s: float
    token_s: float
    pad_tokens: float

    def of_ranks(self, table: Ints, ranks: int) -> Floats:
        """Returns the seconds of each rank, [size, layer, rank], with the expert in each slot, [layer, slot]."""
        return np.stack([np.maximum(reading, computing) for reading, computing in self._by_size(table, ranks)])

    def mean_step(self, by_size: Floats) -> Floats:
        """Returns [layer], the mean over the steps of values by size, [size, layer]."""
        return np.asarray(np.asarray(self.sizes.parts) @ by_size)

    def slot_work(self, copies: Ints, weights_bound: Flags) -> Floats:
        """Returns [layer, expert]: what one of an expert's slots adds to the time of its rank in the mean step.

        Args:
            copies: [layer, expert], slots that share an expert's tokens.
            weights_bound: [size, layer], whether the layer's time is that of reading weights.
        """
        total = np.zeros_like(self.by_expert)
        for part, factor, reads in zip(self.sizes.parts, self.sizes.factors, weights_bound, strict=True):
            tokens, distinct = self._expected(factor, copies)
            computing = self.token_s * (tokens + self.pad_tokens * distinct)
            total += part * np.where(reads[:, None], self.expert_s * distinct, computing)
        return total

    def weights_bound(self, table: Ints, ranks: int) -> Flags:
        """Returns [size, layer]: whether the longest of a layer's ranks is one that reads weights."""
        return np.stack([reading.max(1) >= computing.max(1) for reading, computing in self._by_size(table, ranks)])

    def _by_size(self, table: Ints, ranks: int) -> Iterator[tuple[Floats, Floats]]:
        """Yields for each size the seconds of each rank to read the weights that it needs, and to compute."""
        copies = serving_copies(table, self.by_expert.shape[1], ranks)
        serving = serving_slots(table, ranks)
        for factor in self.sizes.factors:
            tokens, distinct = (
                (np.take_along_axis(values, table, 1) * serving).reshape(len(table), ranks, -1).sum(2)
                for values in self._expected(float(factor), copies)
            )
            yield self.expert_s * distinct, self.token_s * (tokens + self.pad_tokens * distinct)

    def _expected(self, factor: float, copies: Ints) -> tuple[Floats, Floats]:
        """Returns the expected tokens of a slot in a step, and the chance that it gets one (Poisson)."""
        tokens = self.by_expert * factor / np.maximum(copies, 1)
        return tokens, -np.expm1(-tokens)
