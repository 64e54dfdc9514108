"""The load that a decision looks at: what the ranks counted, the newer the more.

Owned by the controller on the group's first rank. Counts of n steps weigh `exp(-m / window_steps)` once m further steps
have passed, so a steady load gives its tokens a step exactly, whatever the window.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from moe_agent.experts.recording import Counted

Floats = NDArray[np.float64]


class LoadWindow:
    """See the module; `sources` are the ranks that have tokens of their own."""

    def __init__(self, sources: int, layers: int, experts: int) -> None:
        self._shape = (sources, layers, experts)
        self.clear()

    def clear(self) -> None:
        """Forgets all load."""
        self._tokens: Floats = np.zeros(self._shape)
        self._pairs: Floats | None = None
        self._steps = self._pair_steps = 0.0

    @property
    def steps(self) -> float:
        """Steps that the load stands for."""
        return self._steps

    def add(self, counted: Sequence[Counted], steps: int, window_steps: int) -> None:
        """What each source counted in the last `steps` steps."""
        kept = math.exp(-steps / window_steps)
        self._tokens = self._tokens * kept + np.stack([rank.tokens for rank in counted])
        self._steps = self._steps * kept + steps
        if counted[0].pairs.size:
            pairs = np.sum([rank.pairs for rank in counted], axis=0)
            passes = max(rank.pair_passes for rank in counted)
            self._pairs = pairs if self._pairs is None else self._pairs * kept + pairs
            self._pair_steps = self._pair_steps * kept + passes

    def tokens_a_step(self) -> Floats:
        """`[source, layer, expert]`."""
        return self._tokens / self._steps if self._steps else self._tokens

    def pairs_a_step(self) -> Floats | None:
        """`[layer, expert, next]`: tokens that one expert and one of the next layer share; None where not counted."""
        return None if self._pairs is None or not self._pair_steps else self._pairs / self._pair_steps
