"""How many tokens a text has, without a tokenizer: bytes per token, learned from what the engines report.

The gateway owns one for each model: `observe` takes the prompt tokens of a finished response (its `usage`), `tokens`
sizes the next job.

Invariants: the ratio stays between one byte a token, the least that a byte-level tokenizer can do, and 16; one
observation moves it by at most a third of the way, so no single absurd report spoils it.
"""

import math

_START_BYTES = 4.0
_LEAST_BYTES = 1.0
_MOST_BYTES = 16.0
# The weight of an observation grows with its tokens, because a chat template adds a fixed few to each prompt, which
# would drag the ratio of a short one down. About ten prompts of a usual length make up the memory.
_MEMORY_TOKENS = 8192
_MOST_TOKENS_AT_ONCE = 4096


class TokenRatio:
    """Exponentially weighted mean of bytes per token."""

    __slots__ = ("_bytes_per_token",)

    def __init__(self) -> None:
        self._bytes_per_token = _START_BYTES

    @property
    def bytes_per_token(self) -> float:
        """The estimate."""
        return self._bytes_per_token

    def tokens(self, n_bytes: int) -> int:
        """Tokens of a text of `n_bytes` bytes, rounded up; 0 for none."""
        return math.ceil(n_bytes / self._bytes_per_token) if n_bytes > 0 else 0

    def observe(self, n_bytes: int, n_tokens: int) -> None:
        """A text of `n_bytes` bytes had `n_tokens` tokens. What cannot be is ignored."""
        if not (0 < n_bytes < math.inf and 0 < n_tokens < math.inf):
            return
        seen = min(_MOST_BYTES, max(_LEAST_BYTES, n_bytes / n_tokens))
        weight = min(n_tokens, _MOST_TOKENS_AT_ONCE)
        self._bytes_per_token += (seen - self._bytes_per_token) * weight / (weight + _MEMORY_TOKENS)
