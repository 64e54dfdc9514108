"""A token bucket: an amount a minute, saved up for one minute at most. Pure; its owner has the clock.

More may be taken than the bucket holds, since the tokens of an answer are known at its end: the level falls below zero,
and nothing more is given until it has risen again.
"""

from dataclasses import dataclass


@dataclass(slots=True)
class TokenBucket:
    """The state of one bucket.

    Attributes:
        per_minute: what flows in, and the most that it holds.
        level: amount at `at_s`; below zero while more was taken than has flowed in.
        at_s: monotonic seconds.
    """

    per_minute: float
    level: float
    at_s: float

    def wait_s(self, amount: float, now_s: float) -> float:
        """Seconds until this amount may be taken, 0 for now. More than the bucket holds may be once it is full."""
        missing = min(amount, self.per_minute) - self._level(now_s)
        # Rounding must not leave a wait behind that is too short to be seen.
        return missing * 60.0 / self.per_minute if missing > 1e-9 * self.per_minute else 0.0

    def take(self, amount: float, now_s: float) -> None:
        """Takes an amount, or puts a negative one back, up to what it holds."""
        self.level = min(self.per_minute, self._level(now_s) - amount)
        self.at_s = max(self.at_s, now_s)

    def resize(self, per_minute: float, now_s: float, reserved: float = 0.0) -> None:
        """Another rate from now on; the part that is full stays the same.

        Args:
            per_minute: the new rate, and the most that the bucket holds.
            now_s: monotonic seconds.
            reserved: amount taken earlier that is put back later; it stays as it is.
        """
        unspent = min(self.per_minute, self._level(now_s) + reserved)
        self.level = unspent * per_minute / self.per_minute - reserved
        self.per_minute, self.at_s = per_minute, max(self.at_s, now_s)

    def is_full(self, now_s: float) -> bool:
        """Whether nothing was taken for long enough."""
        return self._level(now_s) >= self.per_minute

    def _level(self, now_s: float) -> float:
        return min(self.per_minute, self.level + max(0.0, now_s - self.at_s) * self.per_minute / 60.0)
