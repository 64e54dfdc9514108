"""How often the group's steps are small and large: small steps go by the experts that they read, large ones by their
tokens (`moe_scheduling.expert.layer_time`).

Owned by the controller. Sizes are those of the first rank's batches, or of all ranks where it knows them; only their
proportions count. The classes are doublings, and older steps lose weight as in the load's window.
"""

import math
from collections import Counter

from moe_scheduling.expert.decision import StepSizes


class StepSizeWindow:
    """Sliding window over the sizes of steps, exponentially weighted."""

    def __init__(self) -> None:
        self._new: Counter[int] = Counter()
        self._steps: dict[int, float] = {}
        self._tokens: dict[int, float] = {}

    def add(self, tokens: int) -> None:
        """Adds a step with this number of tokens; one without any does no expert work."""
        if tokens > 0:
            self._new[tokens] += 1

    def fold(self, steps: int, window_steps: int) -> None:
        """Takes the steps added since the last call into the window; `steps` have passed since then."""
        kept = math.exp(-steps / window_steps)
        for table in (self._steps, self._tokens):
            for size in table:
                table[size] *= kept
        for tokens, count in self._new.items():
            size = tokens.bit_length()
            self._steps[size] = self._steps.get(size, 0.0) + count
            self._tokens[size] = self._tokens.get(size, 0.0) + count * tokens
        self._new.clear()

    def clear(self) -> None:
        """Forgets all sizes that were added so far."""
        self._new.clear()
        self._steps.clear()
        self._tokens.clear()

    @property
    def sizes(self) -> StepSizes | None:
        """The sizes with their parts of the steps; None before the first. Classes next to never seen are left out."""
        total = sum(self._steps.values())
        seen = sorted(size for size, steps in self._steps.items() if steps > 1e-6 * total)
        if not seen:
            return None
        total = sum(self._steps[size] for size in seen)
        return StepSizes(
            tokens=tuple(self._tokens[size] / self._steps[size] for size in seen),
            parts=tuple(self._steps[size] / total for size in seen),
        )
