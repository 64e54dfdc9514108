"""The faults of a run: which come follows from the seed. Pure. All kinds come equally often, in a drawn order."""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum


class SplitFault(Enum):
    """What happens to the engines of one role, or to what they tell each other."""

    PREFILL_CORE_KILLED = "prefill: core killed"
    PREFILL_AGENT_KILLED = "prefill: engine and agent killed, started again"
    PREFILL_FROZEN = "prefill: core frozen for 8 s"
    DECODE_CORE_KILLED = "decode: core killed"
    DECODE_AGENT_KILLED = "decode: engine and agent killed, started again"
    DECODE_FROZEN = "decode: core frozen for 8 s"
    TRANSFERS_FAIL = "prefill: blocks named that nobody has, for 15 s"
    LEASES_END = "prefill: answers held back for longer than a lease"

    @property
    def is_of_decode(self) -> bool:
        """Whether its victim is an engine that decodes."""
        return self.name.startswith("DECODE")

    @property
    def is_of_process(self) -> bool:
        """Whether it hits an engine's processes, and not its answers."""
        return self.name.endswith(("KILLED", "FROZEN"))


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedFault:
    """One fault: the kind, the number of its victim among the engines of its role, and when it is due.

    Attributes:
        kind: what happens.
        victim: index among the engines of the role.
        after: requests that have ended before it.
    """

    kind: SplitFault
    victim: int
    after: int


def plan_faults(seed: int, requests: int, rounds: int, engines: int) -> tuple[PlannedFault, ...]:
    """The faults of a run, evenly over its requests.

    Args:
        seed: of the run.
        requests: that have to end.
        rounds: how often each kind comes.
        engines: of each role.
    """
    chance = random.Random(f"{seed}/faults")
    kinds: list[SplitFault] = []
    for _ in range(rounds):
        order = list(SplitFault)
        chance.shuffle(order)
        kinds += order
    return tuple(
        PlannedFault(kind=kind, victim=chance.randrange(engines), after=requests * (index + 1) // (len(kinds) + 2))
        for index, kind in enumerate(kinds)
    )


def name_idle_faults(injected: Mapping[SplitFault, int], *, spoilt: int, held: int) -> list[str]:
    """In words the faults of answers that came while no answer passed, so that they tried nothing.

    Args:
        injected: how often each kind came.
        spoilt: answers that were spoilt.
        held: answers that were held back.
    """
    met = {SplitFault.TRANSFERS_FAIL: spoilt, SplitFault.LEASES_END: held}
    return [
        f"no answer met the fault {kind.value!r}" for kind, answers in met.items() if injected.get(kind) and not answers
    ]
