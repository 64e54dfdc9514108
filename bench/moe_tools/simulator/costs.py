"""Time of a step: in goes the work of each rank, out come seconds.

A model answers for a whole lockstep group: the ranks of a group end a step together, and under expert parallelism
their experts work on the tokens of all of them. A single engine is a group of one.

Invariants: no step takes less than 0 s; more work of any kind never takes less time.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

# DeepSeek-V4 compresses each 128 tokens of the context into one entry: a step in which a request completes such a
# piece runs more kernels.
COMPRESSED_TOKENS = 128


class Work(NamedTuple):
    """Work of one rank in one step.

    Attributes:
        prefill_tokens: prompt tokens (and tokens computed again after a preemption).
        decode_requests: requests that decode, one token each.
        context_tokens: tokens that the decoding requests attend to, summed.
        prefill_pairs: (token, earlier token) pairs of the prefills' attention.
        compressions: decoding requests that complete a piece of `COMPRESSED_TOKENS` of their context.
    """

    prefill_tokens: int = 0
    decode_requests: int = 0
    context_tokens: int = 0
    prefill_pairs: int = 0
    compressions: int = 0

    @property
    def tokens(self) -> int:
        """Tokens that go through the model."""
        return self.prefill_tokens + self.decode_requests


IDLE = Work()


class CostModel(Protocol):
    """Model of the seconds that a step takes."""

    @property
    def source(self) -> str:
        """Where its figures come from, for reports."""

    def group_step_s(self, works: Sequence[Work]) -> float:
        """Seconds of a step in which the ranks of a group do this work; `IDLE` is a dummy step."""

    def expert_pressures(self, works: Sequence[Work]) -> tuple[float, tuple[float, ...]]:
        """Max / mean of the experts' tokens over the ranks, and each rank's tokens over the mean."""


class LinearCost(NamedTuple):
    """A line, as the product fits it online, with the attention's two quadratic terms beside it.

    `base_s + prefill_s * prefill_tokens + decode_s * decode_requests + context_s * context_tokens + pair_s * pairs`; a
    group takes as long as its slowest rank.

    Attributes:
        base_s: seconds of a step, whatever it carries.
        prefill_s: seconds for each prefill token.
        decode_s: seconds for each decoding request.
        context_s: seconds for each token that a decoding request attends to.
        pair_s: seconds for each pair of the prefills' attention.
        source: where the figures come from.
    """

    base_s: float
    prefill_s: float
    decode_s: float
    context_s: float = 0.0
    pair_s: float = 0.0
    source: str = "given in the scenario"

    def group_step_s(self, works: Sequence[Work]) -> float:
        """Seconds of the step, as `CostModel` has it."""
        base_s, prefill_s, decode_s, context_s, pair_s, _ = self
        return base_s + max(
            prefill_s * work.prefill_tokens
            + decode_s * work.decode_requests
            + context_s * work.context_tokens
            + pair_s * work.prefill_pairs
            for work in works
        )

    def expert_pressures(self, works: Sequence[Work]) -> tuple[float, tuple[float, ...]]:
        """All 1: this model has no experts."""
        return 1.0, (1.0,) * len(works)
