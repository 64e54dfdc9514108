"""Prompts of exact token lengths, made of real text in the model's own tokens.

Random ids would misread the experts' balance: a router spreads noise in another way than text. So the prompts are
slices of a pool of text that the server itself has tokenized.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moe_tools.traces import TraceRequest

OPENING_TOKENS = 16
"""Tokens drawn one by one at the start of each piece: no two begin alike, so nothing is shared by chance."""


@dataclass(frozen=True, slots=True)
class PromptMaker:
    """Makes prompts from `pool` (token ids, at least one).

    Runs with another `salt` share no prompt with this one, so that no run finds another's prefixes in a cache.
    """

    pool: Sequence[int]
    salt: int

    def build(self, index: int, request: TraceRequest) -> list[int]:
        """The prompt of request number `index`: exactly `prompt_tokens` ids; equal blocks give equal ids."""
        if not request.blocks:
            return self._piece((0, index), request.prompt_tokens)
        ids: list[int] = []
        for block in request.blocks:
            ids.extend(self._piece((1, block), request.block_tokens))
        missing = request.prompt_tokens - len(ids)
        if missing > 0:
            ids.extend(self._piece((0, index), missing))
        return ids[: request.prompt_tokens]

    def _piece(self, key: tuple[int, int], length: int) -> list[int]:
        random = np.random.default_rng((self.salt, key[0], key[1] & 0xFFFFFFFFFFFFFFFF))
        opening = [self.pool[place] for place in random.integers(0, len(self.pool), OPENING_TOKENS)]
        start = int(random.integers(0, len(self.pool)))
        body = list(self.pool[start : start + length])
        while len(opening) + len(body) < length:
            body.extend(self.pool[: length - len(body)])
        return (opening + body)[:length]
