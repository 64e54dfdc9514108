"""What the last half minute was like: arrivals, their prompt tokens and times to first token, for the autoscaler.

Raised on the way of a request, so that each event costs a comparison and a few additions and makes no object. One slot
for each second; the ring forgets what is older than the window.
"""

import math

WINDOW_S = 30


class Recent:
    """See the module; all times are on one monotonic clock.

    Args:
        started_s: since when there could have been events: a rate is over the time that was watched.
    """

    __slots__ = ("_answers", "_arrivals", "_newest_s", "_started_s", "_tokens", "_ttft_s")

    def __init__(self, started_s: float) -> None:
        self._started_s = started_s
        self._newest_s = math.floor(started_s)
        self._arrivals = [0] * WINDOW_S
        self._tokens = [0] * WINDOW_S
        self._answers = [0] * WINDOW_S
        self._ttft_s = [0.0] * WINDOW_S

    def arrived(self, prompt_tokens: int, now_s: float) -> None:
        """A request came."""
        second = int(now_s)
        if second > self._newest_s:
            self._turn_to(second)
        slot = second % WINDOW_S
        self._arrivals[slot] += 1
        self._tokens[slot] += prompt_tokens

    def answered(self, ttft_s: float, now_s: float) -> None:
        """A request got its first token."""
        second = int(now_s)
        if second > self._newest_s:
            self._turn_to(second)
        slot = second % WINDOW_S
        self._answers[slot] += 1
        self._ttft_s[slot] += ttft_s

    def arrivals_per_s(self, now_s: float) -> float:
        """Requests a second."""
        return self._sum(self._arrivals, now_s) / self._watched_s(now_s)

    def prompt_tokens_per_s(self, now_s: float) -> float:
        """Prompt tokens of the requests that came, a second."""
        return self._sum(self._tokens, now_s) / self._watched_s(now_s)

    def mean_ttft_s(self, now_s: float) -> float | None:
        """From arrival to first token; None when there was none."""
        total_s, answers = self._sum(self._ttft_s, now_s), self._sum(self._answers, now_s)
        return total_s / answers if answers else None

    def _sum(self, slots: list[int] | list[float], now_s: float) -> float:
        if (second := int(now_s)) > self._newest_s:
            self._turn_to(second)
        return sum(slots)

    def _watched_s(self, now_s: float) -> float:
        # The newest slot is not over, so the window is shorter by what is left of it.
        return min(WINDOW_S - 1 + now_s % 1.0, max(1.0, now_s - self._started_s))

    def _turn_to(self, second: int) -> None:
        for passed in range(max(self._newest_s + 1, second - WINDOW_S + 1), second + 1):
            slot = passed % WINDOW_S
            self._arrivals[slot] = self._tokens[slot] = self._answers[slot] = 0
            self._ttft_s[slot] = 0.0
        self._newest_s = second
