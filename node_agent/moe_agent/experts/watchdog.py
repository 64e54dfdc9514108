"""What can go wrong with an expert group, as far as its controller sees it, in words for people.

Owned by the controller, which tells it what happens.
"""

from collections.abc import Sequence

from moe_agent.experts.outcome import ProblemKind

# Intervals without a decision after which the watchdog speaks.
SILENT_INTERVALS = 3
_MOST_BACKOFF = 5


class Watchdog:
    """See the module.

    Attributes:
        failures: moves in a row that won nothing or failed, at most so many as double the interval.
        skew: which ranks hold another placement than the first; empty where none does.
    """

    def __init__(self) -> None:
        self.failures = 0
        self.skew = ""
        self._slow_move = ""

    def move_failed(self) -> None:
        """A move won nothing, or could not be made: the next decision comes later."""
        self.failures = min(_MOST_BACKOFF, self.failures + 1)

    def move_paid(self) -> None:
        """A move won something, or a person begins anew."""
        self.failures = 0

    def move_begins(self) -> None:
        """What is told of slow moves is of the newest."""
        self._slow_move = ""

    def step_held_up(self, seconds: float, bound_s: float, moves: int, layers: int) -> None:
        """What moving added to a step."""
        if seconds > bound_s:
            what = f"{moves} experts of {layers} layers held up a step"
            self._slow_move = f"{what} by {seconds:.3f} s, bound {bound_s:g} s"

    def compare_placements(self, checksums: Sequence[int], wanted: int, version: int) -> None:
        """The checksum of the placement that each rank holds, and that of the one they are believed to hold."""
        strays = [str(rank) for rank, checksum in enumerate(checksums) if checksum != wanted]
        self.skew = f"ranks {', '.join(strays)} hold another placement than {version}" if strays else ""

    def list_problems(self, silent_steps: int, interval_steps: int) -> list[tuple[ProblemKind, str]]:
        """Those of now; `silent_steps` since the last decision, 0 where none is due."""
        found = []
        if self.failures:
            factor = 2**self.failures
            found.append((ProblemKind.BACKOFF, f"the last moves won nothing; the interval is {factor} times as long"))
        if self._slow_move:
            found.append((ProblemKind.SLOW_MOVE, self._slow_move))
        if self.skew:
            found.append((ProblemKind.VERSION_SKEW, self.skew))
        if silent_steps > SILENT_INTERVALS * interval_steps:
            found.append((ProblemKind.NO_DECISION, f"no decision for {silent_steps} steps"))
        return found
