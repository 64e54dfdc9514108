"""The beat: what the first rank of an expert group tells all ranks at a step that all share.

Every rank counts the group's forward passes, which are the same on all of them: a pass has collectives of its own, so
no rank can make one more than another. At the pass named by the last beat each rank enters one broadcast of fixed size,
and does what it says; what follows it (a gather of counts, a move) is a collective that all ranks enter because all
read the same beat. So no rank decides for itself whether it enters one.
"""

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]


class Action(IntEnum):
    """What all ranks do at a beat."""

    NONE = 0
    GATHER = 1
    MOVE = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Beat:
    """One beat.

    Attributes:
        next_in: passes until the next beat, at least 1.
        action: what all ranks do now.
        recording: whether ranks count their routing from now on.
        config_version: version of the settings in force.
        version: version of the placement once the action is done.
        layers: how many layers a move changes; their rows follow in a broadcast of their own.
        balance: max / mean of the tokens over ranks.
        pressures: tokens of each rank / their mean.
    """

    next_in: int
    action: Action
    recording: bool
    config_version: int
    version: int
    layers: int
    balance: float
    pressures: tuple[float, ...]


_FIELDS = 7


def beat_size(ranks: int) -> int:
    """Numbers in a beat of a group of so many ranks."""
    return _FIELDS + ranks


def pack_beat(beat: Beat) -> Numbers:
    """As float64, which holds whole numbers up to 2**53."""
    head = (beat.next_in, beat.action, beat.recording, beat.config_version, beat.version, beat.layers, beat.balance)
    return np.array([*head, *beat.pressures], np.float64)


def unpack_beat(numbers: Numbers) -> Beat:
    """The reverse of `pack_beat`."""
    next_in, action, recording, config_version, version, layers, balance, *pressures = numbers.tolist()
    return Beat(
        next_in=int(next_in),
        action=Action(int(action)),
        recording=bool(recording),
        config_version=int(config_version),
        version=int(version),
        layers=int(layers),
        balance=balance,
        pressures=tuple(pressures),
    )
