"""Step times as measured engines have them: a few physical terms, linear in coefficients that cannot be negative.

Pure. A `StepModel` turns the work of a lockstep group into the terms (`StepModel.terms`), a `FittedCost` multiplies
them with coefficients. Both the fit (`step_fit`) and the simulator use the same terms.

There are three kinds of steps, by how vLLM runs them:

- decode: no prompt token, and not more tokens than the largest captured CUDA graph. Tokens are padded to the next
  captured size, on all ranks alike: time is a staircase.
- piecewise: prompt tokens, all in a captured size: attention runs outside the graph, a step has a least time.
- eager: more tokens than any graph has: launching the kernels takes a least time, which the GPU's work hides or not.

Time of a step: the longer of the least time of its kind and the sum of its terms; never less than its decoding requests
alone would take. So more work never takes less time.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from moe_tools.simulator.costs import Work

# vLLM's default sizes to capture on a GPU: 1, 2, 4, then each 8 below 256, each 16 to 512 (`CompilationConfig`).
VLLM_GRAPH_SIZES = (1, 2, 4, *range(8, 256, 8), *range(256, 513, 16))


class Coefficients(NamedTuple):
    """Seconds for one unit of each term; none is negative.

    Attributes:
        decode_s: of each decode step.
        prefill_base_s: of each step with prompt tokens.
        expert_s: for each distinct expert of a rank that gets a token, expected.
        token_s: for each token of a decode step, padding included.
        request_s: for each decoding request beside prompt tokens.
        prefill_s: for each prompt token of the fullest rank.
        group_token_s: for each token of the group, divided by the ranks.
        context_s: for each token that a rank's decoding requests attend to.
        pair_s: for each pair of the prefills' attention.
        compression_s: of a step in which a decoding request completes a compressed piece of its context.
        piecewise_s: least time of a step with prompt tokens.
        eager_s: by which the least time is longer where no captured graph is large enough.
    """

    decode_s: float = 0.0
    prefill_base_s: float = 0.0
    expert_s: float = 0.0
    token_s: float = 0.0
    request_s: float = 0.0
    prefill_s: float = 0.0
    group_token_s: float = 0.0
    context_s: float = 0.0
    pair_s: float = 0.0
    compression_s: float = 0.0
    piecewise_s: float = 0.0
    eager_s: float = 0.0


Terms = Coefficients
"""Units of each term in a step; the same fields, counted instead of seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepModel:
    """Properties of an engine that decide the terms of its steps.

    Attributes:
        experts: routed experts of a layer; 1 for a dense model.
        top_k: of them for a token.
        expert_ranks: over which the experts of a layer are spread.
        ranks: of the data-parallel group, which step together.
        graph_sizes: captured CUDA graph sizes, rising; empty: none, as on a CPU.
    """

    experts: int = 1
    top_k: int = 1
    expert_ranks: int = 1
    ranks: int = 1
    graph_sizes: tuple[int, ...] = VLLM_GRAPH_SIZES

    def padded(self, tokens: int) -> int | None:
        """Returns the least captured size with room for these tokens; None where there is none."""
        index = bisect_left(self.graph_sizes, max(1, tokens))
        return self.graph_sizes[index] if index < len(self.graph_sizes) else None

    def distinct_experts(self, group_tokens: float) -> float:
        """Returns how many experts of a rank get a token, expected where all are equally popular."""
        missed = (1.0 - self.top_k / self.experts) ** group_tokens if self.top_k < self.experts else 0.0
        return self.experts / self.expert_ranks * (1.0 - missed)

    def decode_terms(self, works: Sequence[Work]) -> Terms:
        """Returns the terms of the decoding requests alone, prompt tokens left out."""
        most = max(work.decode_requests for work in works)
        padded = self.padded(most)
        tokens = max(1, most) if padded is None else padded
        return Terms(
            decode_s=1.0,
            expert_s=self.distinct_experts(tokens * len(works)),
            token_s=tokens,
            context_s=max(work.context_tokens for work in works),
            compression_s=float(any(work.compressions for work in works)),
        )

    def prefill_terms(self, works: Sequence[Work]) -> Terms:
        """Returns the terms of a step with prompt tokens, without its least time."""
        group = sum(work.tokens for work in works)
        return Terms(
            prefill_base_s=1.0,
            expert_s=self.distinct_experts(group),
            request_s=max(work.decode_requests for work in works),
            prefill_s=max(work.prefill_tokens for work in works),
            group_token_s=group / len(works),
            context_s=max(work.context_tokens for work in works),
            pair_s=max(work.prefill_pairs for work in works),
            compression_s=float(any(work.compressions for work in works)),
        )

    def least_terms(self, works: Sequence[Work]) -> Terms:
        """Returns the least time of a step with prompt tokens, as terms."""
        is_eager = self.padded(max(work.tokens for work in works)) is None
        return Terms(piecewise_s=1.0, eager_s=float(is_eager))

    def alternatives(self, works: Sequence[Work]) -> tuple[Terms, ...]:
        """Returns sums of terms of which the longest is the time of the step."""
        is_decode = not any(work.prefill_tokens for work in works)
        if is_decode and (not self.graph_sizes or self.padded(max(work.tokens for work in works)) is not None):
            return (self.decode_terms(works),)
        return (self.prefill_terms(works), self.least_terms(works), self.decode_terms(works))


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedCost:
    """A `CostModel` with fitted coefficients.

    Attributes:
        model: decides the terms.
        coefficients: seconds for each.
        source: where they come from, for reports.
        memory_blocks: KV blocks of 16 tokens that a rank has; None where it is not known.
    """

    model: StepModel
    coefficients: Coefficients
    source: str
    memory_blocks: int | None = None

    def group_step_s(self, works: Sequence[Work]) -> float:
        """Returns the seconds of the step, as `CostModel` has it."""
        coefficients = self.coefficients
        return max(
            sum(units * seconds for units, seconds in zip(terms, coefficients, strict=True))
            for terms in self.model.alternatives(works)
        )

    def expert_pressures(self, works: Sequence[Work]) -> tuple[float, tuple[float, ...]]:
        """Returns all 1: how the experts lay while the steps were measured is not known."""
        return 1.0, (1.0,) * len(works)
