"""What a token of expert work takes: a line through (tokens, seconds) of kernel calls, the newer the more.

Fed by the repaired CPU kernel at each call of a layer; its slope is `token_s` of the costs. A call takes a fixed time
as well, which no placement changes, so the slope and not the mean is what a token more costs.
"""

_KEPT = 0.999
# Below so much variance of the tokens a slope says nothing, and the mean stands in.
_LEAST_VARIANCE = 1.0


class WorkMeter:
    """See the module; `on` says whether calls are to be timed."""

    def __init__(self) -> None:
        self.on = False
        self._weight = self._tokens = self._seconds = self._squares = self._products = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        """A call for so many (token, expert)."""
        self._weight = self._weight * _KEPT + 1.0
        self._tokens = self._tokens * _KEPT + tokens
        self._seconds = self._seconds * _KEPT + seconds
        self._squares = self._squares * _KEPT + tokens * tokens
        self._products = self._products * _KEPT + tokens * seconds

    @property
    def token_s(self) -> float:
        """Seconds for one (token, expert) more; 0 before the first call."""
        if not self._tokens:
            return 0.0
        variance = self._squares / self._weight - (self._tokens / self._weight) ** 2
        if variance < _LEAST_VARIANCE:
            return self._seconds / self._tokens
        covariance = self._products / self._weight - self._tokens * self._seconds / self._weight**2
        return max(0.0, covariance / variance)
