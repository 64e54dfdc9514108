"""Rate, sizes and times of the recent requests, as one who sends them measures them: the input of `plan_roles`.

All times are arguments on one clock that begins near 0 or long before the first request.
"""

import math
from dataclasses import dataclass

# Time constant of the measured rates and means, in seconds.
_MEMORY_S = 30.0
# Weight of one answer in the mean length of answers.
_ANSWER_WEIGHT = 0.02


@dataclass(slots=True)
class MeasuredLoad:
    """Rate and mean sizes of the recent requests, and their mean time to the last token since the last change.

    Attributes:
        answer_tokens: mean tokens of an answer.
    """

    answer_tokens: float = 128.0
    _count: float = 0.0
    _tokens: float = 0.0
    _at_s: float = 0.0
    _ended: int = 0
    _ended_s: float = 0.0

    def arrived(self, tokens: int, now_s: float) -> None:
        """A request came, with this number of uncached prompt tokens."""
        kept = math.exp((self._at_s - now_s) / _MEMORY_S)
        self._count, self._tokens, self._at_s = kept * self._count + 1.0, kept * self._tokens + tokens, now_s

    def ended(self, answer_tokens: float, lasted_s: float) -> None:
        """A request ended, `lasted_s` seconds after its arrival."""
        self.answer_tokens += _ANSWER_WEIGHT * (answer_tokens - self.answer_tokens)
        self._ended += 1
        self._ended_s += lasted_s

    def forget_measured(self) -> None:
        """Begins the mean anew after a change."""
        self._ended, self._ended_s = 0, 0.0

    def requests_per_s(self, now_s: float) -> float:
        """Returns arrivals a second; in the first seconds of a run the memory is as long as the run."""
        memory_s = _MEMORY_S * (1.0 - math.exp(-max(now_s, 1.0) / _MEMORY_S))
        return self._count * math.exp((self._at_s - now_s) / _MEMORY_S) / memory_s

    @property
    def prompt_tokens(self) -> float:
        """Mean tokens of the recent prompts."""
        return self._tokens / self._count if self._count else 0.0

    @property
    def measured_s(self) -> float | None:
        """Mean time to the last token since the last change; None without an answer."""
        return self._ended_s / self._ended if self._ended else None
