"""Demand of the last half minute, for the autoscaler: arrivals, their prompt tokens and times to first token.

Called for each request, so each event costs a comparison and a few additions and makes no object. There is one slot for
each second, used again once its second is older than the window.
"""

import math

WINDOW_S = 30


class RecentDemand:
    """Sums over the last `WINDOW_S` seconds; all times are on one monotonic clock.

    Args:
        started_s: when counting began: before the window is full, a rate is over the time since then.
    """

    __slots__ = ("_answers", "_arrivals", "_newest_s", "_started_s", "_tokens", "_ttft_s")

    def __init__(self, started_s: float) -> None:
        self._started_s = started_s
        self._newest_s = math.floor(started_s)
        self._arrivals = [0] * WINDOW_S
        self._tokens = [0] * WINDOW_S
        self._answers = [0] * WINDOW_S
        self._ttft_s = [0.0] * WINDOW_S

    def arrive(self, prompt_tokens: int, now_s: float) -> None:
        """Counts a request and its prompt tokens in the second of its arrival."""
        second = int(now_s)
        if second > self._newest_s:
            self._advance_to(second)
        slot = second % WINDOW_S
        self._arrivals[slot] += 1
        self._tokens[slot] += prompt_tokens

    def answer(self, ttft_s: float, now_s: float) -> None:
        """A request got its first token."""
        second = int(now_s)
        if second > self._newest_s:
            self._advance_to(second)
        slot = second % WINDOW_S
        self._answers[slot] += 1
        self._ttft_s[slot] += ttft_s

    def arrivals_per_s(self, now_s: float) -> float:
        """Returns requests per second over the window."""
        return self._sum(self._arrivals, now_s) / self._watched_s(now_s)

    def prompt_tokens_per_s(self, now_s: float) -> float:
        """Prompt tokens of the arrivals, per second."""
        return self._sum(self._tokens, now_s) / self._watched_s(now_s)

    def mean_ttft_s(self, now_s: float) -> float | None:
        """Mean seconds from arrival to first token; None when there was no answer in the window."""
        total_s, answers = self._sum(self._ttft_s, now_s), self._sum(self._answers, now_s)
        return total_s / answers if answers else None

    def _sum(self, slots: list[int] | list[float], now_s: float) -> float:
        if (second := int(now_s)) > self._newest_s:
            self._advance_to(second)
        return sum(slots)

    def _watched_s(self, now_s: float) -> float:
        # The newest slot is not over, so the window is shorter by the rest of its second.
        return min(WINDOW_S - 1 + now_s % 1.0, max(1.0, now_s - self._started_s))

    def _advance_to(self, second: int) -> None:
        for passed in range(max(self._newest_s + 1, second - WINDOW_S + 1), second + 1):
            slot = passed % WINDOW_S
            self._arrivals[slot] = self._tokens[slot] = self._answers[slot] = 0
            self._ttft_s[slot] = 0.0
        self._newest_s = second
