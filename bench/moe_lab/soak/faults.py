"""The faults of a soak: which comes next follows from the seed. Pure.

In the first pass each kind comes once, in a drawn order; after it all kinds are drawn alike. Short faults end before a
gateway takes an engine for stalled, long ones after that.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

from moe_gateway.engines.target_states import STALL_S

from moe_lab.soak.page import EngineMode

LONG_S = STALL_S + 6.0
_SHORT_S = (0.3, 3.0)


class EngineFault(Enum):
    """What happens to a mock engine: by a signal to its process, or by the mode that it answers in."""

    KILL = "killed"
    FREEZE = "frozen"
    LONG_FREEZE = "frozen for long"
    HANG = "core frozen"
    LONG_HANG = "core frozen for long"
    SLOW = "slowed"
    FAIL = "status 500 at once"
    STREAM_ERROR = "error in a stream of status 200"
    FULL = "status 503 at once"
    NO_HTTP = "no HTTP"
    BAD_CHUNKS = "no chunks after the head"
    EMPTY = "answers without a token"
    CUT = "streams cut after two tokens"
    REFUSE = "port refused"

    @property
    def mode(self) -> EngineMode | None:
        """The mode of the engine's page; None where a signal does it."""
        if self is EngineFault.LONG_HANG:
            return EngineMode.HANG
        return EngineMode[self.name] if self.name in EngineMode.__members__ else None

    @property
    def is_long(self) -> bool:
        """Whether it lasts until the engine is taken for stalled."""
        return self in (EngineFault.LONG_FREEZE, EngineFault.LONG_HANG)


class GatewayFault(Enum):
    """What happens to a gateway."""

    KILL = "gateway killed"
    FREEZE = "gateway frozen"
    LONG_FREEZE = "gateway frozen for long"
    REPLACE = "gateway replaced"

    @property
    def is_long(self) -> bool:
        """Whether it lasts longer than most limits of a gateway."""
        return self is GatewayFault.LONG_FREEZE


class RealFault(Enum):
    """What happens to the real engine."""

    KILL_CORE = "vLLM: core killed"
    FREEZE_CORE = "vLLM: core frozen"
    LONG_FREEZE_CORE = "vLLM: core frozen for long"
    KILL_SERVER = "vLLM: server killed"

    @property
    def is_long(self) -> bool:
        """Whether it lasts until the engine is taken for stalled."""
        return self is RealFault.LONG_FREEZE_CORE


FaultKind = EngineFault | GatewayFault | RealFault


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One fault.

    Attributes:
        kind: what happens.
        victim: a drawn number, from which the victim follows.
        duration_s: until it is healed; a process that was killed is started again after that time.
    """

    kind: FaultKind
    victim: int
    duration_s: float


def plan_faults(seed: int, kinds: Sequence[FaultKind], *, purpose: str) -> Iterator[Fault]:
    """The faults of these kinds, without end.

    Args:
        seed: of the soak.
        kinds: not empty.
        purpose: keeps apart the faults of engines and of gateways.
    """
    chance = random.Random(f"{seed}/{purpose}")
    first = list(kinds)
    chance.shuffle(first)
    while True:
        kind = first.pop() if first else chance.choice(list(kinds))
        duration_s = LONG_S if kind.is_long else chance.uniform(*_SHORT_S)
        yield Fault(kind=kind, victim=chance.randrange(1 << 16), duration_s=duration_s)
