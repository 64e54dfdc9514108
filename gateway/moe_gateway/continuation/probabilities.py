"""The log-probabilities of the tokens of one stream: those that its client has, and the new ones. Pure.

They may differ between engines in their last bits, so they are compared by the text of their tokens alone.
"""

from typing import Any

from moe_gateway.continuation.transcript import MOST_TOKENS

# Fields of a completion's log-probabilities, each a list with an entry for each token.
_LISTS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


def read_tokens(choice: dict[str, Any]) -> tuple[str, ...] | None:
    """The texts of the tokens with log-probabilities in a choice; None where these have no known form."""
    if (logprobs := choice.get("logprobs")) is None:
        return ()
    match logprobs:
        case {"content": None}:
            return ()
        case {"content": [*rows]} if all(type(row) is dict and type(row.get("token")) is str for row in rows):
            return tuple(row["token"] for row in rows)
        case {"tokens": [*tokens]} if all(type(token) is str for token in tokens):
            return tuple(tokens)
    return None


def drop_first(choice: dict[str, Any], count: int) -> None:
    """Takes the log-probabilities of the first tokens out of a choice."""
    logprobs = choice.get("logprobs")
    if type(logprobs) is not dict:
        return
    for name in ("content", *_LISTS):
        if type(rows := logprobs.get(name)) is list:
            logprobs[name] = rows[count:]


class KnownTokens:
    """The tokens whose log-probabilities a client has, and how many of them another engine has computed again."""

    __slots__ = ("_again", "_tokens")

    def __init__(self) -> None:
        self._tokens: list[str] = []
        self._again = 0

    def add(self, tokens: tuple[str, ...]) -> None:
        """These go to the client."""
        self._tokens += tokens
        self._again = len(self._tokens)

    def forget(self) -> None:
        """Nothing is compared any more."""
        self._tokens.clear()
        self._again = 0

    def begin_again(self) -> None:
        """Another engine begins with the first one."""
        self._again = 0

    @property
    def is_too_long(self) -> bool:
        """Whether there are too many to be remembered; tokens without text are no part of a transcript."""
        return len(self._tokens) > MOST_TOKENS

    @property
    def is_past(self) -> bool:
        """Whether the present engine has computed them all."""
        return self._again == len(self._tokens)

    def count_again(self, tokens: tuple[str, ...]) -> int | None:
        """How many of the next tokens of the present engine the client has; None where they are others."""
        count = min(len(tokens), len(self._tokens) - self._again)
        if list(tokens[:count]) != self._tokens[self._again : self._again + count]:
            return None
        self._again += count
        return count
