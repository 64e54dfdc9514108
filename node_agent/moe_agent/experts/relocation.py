"""A placement under way: which layers move at the next beat, so that no step is held up for longer than its bound.

Made by the controller for each change of the placement, one at a time.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moe_agent.experts.decision_log import Decision
from moe_agent.experts.planning import Slots
from moe_agent.experts.step_times import Samples


@dataclass(slots=True, kw_only=True)
class Relocation:
    """A placement under way.

    Attributes:
        target: where it goes.
        layers: that are still to be moved.
        moving: those of the last beat.
        decision: the line of the log that it is told in.
        own: whether the group does it by itself; else a person asked for it.
        judged: whether it is taken back where it wins nothing.
        before: step times just before it began.
    """

    target: Slots
    layers: deque[int]
    decision: Decision
    own: bool
    judged: bool
    before: Samples
    moving: tuple[int, ...] = ()

    def take_layers(self, moves: Sequence[int], move_s: float, bound_s: float) -> tuple[int, ...]:
        """As many layers as fit into the bound on one step, at least one.

        Args:
            moves: experts that each layer brings to other ranks.
            move_s: seconds of one of them.
            bound_s: on what they may add to a step.
        """
        layer_s = [move_s * max(1, count) for count in moves]
        chosen = [self.layers.popleft()]
        left_s = bound_s - layer_s[chosen[0]]
        while self.layers and layer_s[self.layers[0]] <= left_s:
            left_s -= layer_s[self.layers[0]]
            chosen.append(self.layers.popleft())
        self.moving = tuple(chosen)
        return self.moving

    def rows(self) -> tuple[tuple[int, ...], Slots]:
        """Layers of the last beat, and their rows `[layer, slot]`."""
        return self.moving, self.target[list(self.moving)]


def changed_layers(before: Slots, after: Slots) -> deque[int]:
    """Those whose slots differ."""
    return deque(int(layer) for layer in np.flatnonzero((before != after).any(axis=1)))
