"""Part of its time that each engine spends on prompts, as a decaying mean; owned by the one that sends requests.

An answer lasts for many steps, so the prompts that will interrupt it are those that come while it is decoded. Their
best estimate is the recent past: `share` of the seconds of a server go to prompts, and 1 - share to decoding.

Invariants: a share is between 0 and `MOST`; times that go backwards count as the latest one; values that are not
plausible times change nothing. All calls are O(1).
"""

import math
from collections.abc import Iterator, Mapping

# Time constant of the mean, in seconds: some ten answers.
MEMORY_S = 10.0
# Beyond this an engine decodes nearly nothing, and a quotient by the rest would say more than is known.
MOST = 0.95


class PrefillShares:
    """Prefill seconds sent to each server, decaying over `MEMORY_S`."""

    __slots__ = ("_sums",)

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, float]] = {}

    def add(self, server: str, prefill_s: float, now_s: float) -> None:
        """Counts a prompt that was sent to a server, which computes it in `prefill_s` seconds."""
        if 0.0 <= prefill_s < math.inf and math.isfinite(now_s):
            sum_s, at_s = self._sums.get(server, (0.0, now_s))
            self._sums[server] = _decayed(sum_s, at_s, now_s) + prefill_s, max(at_s, now_s)

    def share(self, server: str, now_s: float) -> float:
        """Returns the part of the server's time that goes to prompts; 0 for an unknown server."""
        return self.at(now_s).get(server, 0.0)

    def at(self, now_s: float) -> Mapping[str, float]:
        """Returns the share of each server at this time, computed when it is looked up."""
        return _SharesAt(self._sums, now_s)

    def forget(self, server: str) -> None:
        """Drops a server that is gone or was replaced."""
        self._sums.pop(server, None)


class _SharesAt(Mapping[str, float]):
    """The shares at one time."""

    __slots__ = ("_now_s", "_sums")

    def __init__(self, sums: Mapping[str, tuple[float, float]], now_s: float) -> None:
        self._sums = sums
        self._now_s = now_s

    def __getitem__(self, server: str) -> float:
        return min(MOST, _decayed(*self._sums[server], self._now_s) / MEMORY_S)

    def __iter__(self) -> Iterator[str]:
        return iter(self._sums)

    def __len__(self) -> int:
        return len(self._sums)


def _decayed(sum_s: float, at_s: float, now_s: float) -> float:
    return sum_s * math.exp(min(0.0, at_s - now_s) / MEMORY_S)
