"""Estimates the tokens of a text without a tokenizer, by bytes per token learned from the usage that engines report.

The gateway owns one estimate for each model: `observe` takes the prompt tokens of a finished response (its `usage`),
`tokens` sizes the next job.

Images, audio, video and embeddings cost tokens that have nothing to do with their bytes. `MediaTokens` learns the
tokens of one of each kind, so that the ratio is learned from texts alone.

Invariants: the ratio stays between 1 byte a token, the least of a byte-level tokenizer, and 16; one observation moves
it by at most a third of the way, so that no single report spoils it.
"""

import math
from collections.abc import Mapping

_START_BYTES = 4.0
_LEAST_BYTES = 1.0
_MOST_BYTES = 16.0
# The weight of an observation grows with its tokens, because a chat template adds a fixed few to each prompt, which
# would drag the ratio of a short one down. About ten prompts of a usual length make up the memory.
_MEMORY_TOKENS = 8192
_MOST_TOKENS_AT_ONCE = 4096


class TokenRatio:
    """Keeps an exponentially weighted mean of bytes per token."""

    __slots__ = ("_bytes_per_token",)

    def __init__(self) -> None:
        self._bytes_per_token = _START_BYTES

    @property
    def bytes_per_token(self) -> float:
        """The present estimate, 1 to 16."""
        return self._bytes_per_token

    def tokens(self, n_bytes: int) -> int:
        """Returns the estimated tokens of a text of `n_bytes` bytes, rounded up; 0 for no bytes."""
        return math.ceil(n_bytes / self._bytes_per_token) if n_bytes > 0 else 0

    def observe(self, n_bytes: int, n_tokens: int) -> None:
        """Learns that `n_bytes` bytes had `n_tokens` tokens. Values that are not positive or finite are ignored."""
        if not (0 < n_bytes < math.inf and 0 < n_tokens < math.inf):
            return
        seen = min(_MOST_BYTES, max(_LEAST_BYTES, n_bytes / n_tokens))
        weight = min(n_tokens, _MOST_TOKENS_AT_ONCE)
        self._bytes_per_token += (seen - self._bytes_per_token) * weight / (weight + _MEMORY_TOKENS)


# Tokens of one until some were observed: an image of about a megapixel, half a minute of audio, some seconds of video,
# some sentences as embeddings.
_START_MEDIA_TOKENS: Mapping[str, float] = {"image": 1000.0, "audio": 400.0, "video": 4000.0, "embeds": 100.0}
_MOST_MEDIA_TOKENS = 1_000_000.0
# One observation changes an estimate by at most this factor, half of the way on a logarithmic scale.
_MOST_MEDIA_CHANGE = 4.0


class MediaTokens:
    """Estimates the prompt tokens of images, audio, video and prompts as embeddings by their number."""

    __slots__ = ("_tokens",)

    def __init__(self) -> None:
        self._tokens = dict(_START_MEDIA_TOKENS)

    def tokens(self, counts: Mapping[str, int]) -> int:
        """Returns the estimated tokens of this many of each kind: `image`, `audio`, `video` or `embeds`."""
        return math.ceil(sum(self._tokens[kind] * count for kind, count in counts.items()))

    def observe(self, counts: Mapping[str, int], n_tokens: int) -> None:
        """Learns that these cost `n_tokens` tokens together; of several kinds all change alike."""
        estimated = self.tokens(counts)
        if estimated <= 0:
            return
        ratio = min(_MOST_MEDIA_CHANGE, max(1.0 / _MOST_MEDIA_CHANGE, n_tokens / estimated))
        for kind in counts:
            self._tokens[kind] = min(_MOST_MEDIA_TOKENS, max(1.0, self._tokens[kind] * math.sqrt(ratio)))
