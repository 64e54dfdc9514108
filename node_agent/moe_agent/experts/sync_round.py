"""Sync rounds: the broadcast by which the first rank of an expert group, its coordinator, directs all ranks.

Every rank counts the group's forward passes. The count is the same on all ranks, because a pass has collectives of its
own and no rank can make one more than another. At the pass named by the last round each rank enters one broadcast of
fixed size and does what it says. What follows (a gather of counts, a move) is a collective that all ranks enter,
because all have read the same round; no rank decides for itself whether to enter one.

A placement change is cut into rounds as well (`Relocation`): each moves as many layers as fit into the bound on a step.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from moe_agent.experts.bookkeeping import DecisionEntry
from moe_agent.experts.step_times import Samples

Slots = NDArray[np.int64]
Numbers = NDArray[np.float64]


class RoundAction(IntEnum):
    """What all ranks do in a sync round."""

    NONE = 0
    GATHER = 1
    MOVE = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncRound:
    """The content of one broadcast.

    Attributes:
        next_in: passes until the next round, at least 1.
        action: what all ranks do now.
        recording: whether ranks record their load from now on.
        config_version: version of the settings in force.
        version: version of the placement after the action.
        layers: number of layers that a move changes; their rows follow in a broadcast of their own.
        balance: tokens of the busiest rank over the mean.
        pressures: [rank], tokens of each rank over the mean.
    """

    next_in: int
    action: RoundAction
    recording: bool
    config_version: int
    version: int
    layers: int
    balance: float
    pressures: tuple[float, ...]


_FIELDS = 7


def round_size(ranks: int) -> int:
    """Returns the length of a packed round of a group with this number of ranks."""
    return _FIELDS + ranks


def pack_round(content: SyncRound) -> Numbers:
    """Returns a round as float64 [round_size], which holds integers up to 2**53 exactly."""
    head = (
        content.next_in,
        content.action,
        content.recording,
        content.config_version,
        content.version,
        content.layers,
        content.balance,
    )
    return np.array([*head, *content.pressures], np.float64)


def unpack_round(numbers: Numbers) -> SyncRound:
    """Returns the round that `pack_round` packed."""
    next_in, action, recording, config_version, version, layers, balance, *pressures = numbers.tolist()
    return SyncRound(
        next_in=int(next_in),
        action=RoundAction(int(action)),
        recording=bool(recording),
        config_version=int(config_version),
        version=int(version),
        layers=int(layers),
        balance=balance,
        pressures=tuple(pressures),
    )


@dataclass(slots=True, kw_only=True)
class Relocation:
    """A change of the placement under way.

    Attributes:
        target: [layer, slot], the placement that it leads to.
        layers: layers not moved yet.
        decision: its line in the log of decisions, as the move began.
        own: whether the group decided it; else a person asked for it.
        judged: whether it is rolled back if it gains nothing.
        before: step times just before it began.
        moving: layers of the last round.
        paid_s: time that its moves took so far.
    """

    target: Slots
    layers: deque[int]
    decision: DecisionEntry
    own: bool
    judged: bool
    before: Samples
    moving: tuple[int, ...] = ()
    paid_s: float = 0.0

    def take_layers(self, moves: Sequence[int], move_s: float, bound_s: float) -> tuple[int, ...]:
        """Takes as many layers as fit into the bound on one step, at least one, and returns them.

        Args:
            moves: [layer], experts that each layer moves to other ranks.
            move_s: seconds of one expert.
            bound_s: bound on the time added to a step.
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
        """Returns the layers of the last round and their rows [layer, slot]."""
        return self.moving, self.target[list(self.moving)]


def changed_layers(before: Slots, after: Slots) -> deque[int]:
    """Returns the layers whose slots differ."""
    return deque(int(layer) for layer in np.flatnonzero((before != after).any(axis=1)))
