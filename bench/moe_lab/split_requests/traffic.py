"""The requests of a run: each follows from the seed and its number alone. Pure."""

import random
from dataclasses import dataclass
from typing import Any

from moe_lab.soak.answers import MODEL, SoakRoute
from moe_lab.soak.traffic import Leaving

MOST_TOKENS = 24
# In words; about 350 to 1,700 tokens of the tiny model, all of them more than an engine that decodes computes itself.
_SHORTEST, _LONGEST = 180, 900
# Of a prompt that begins as others do.
_SHARED_WORDS, _OPENINGS = 120, 8
_SHARED_PART = 0.3
# How many in a thousand clients leave, and when.
_LEAVINGS = ((Leaving.BEFORE_ANSWER, 30), (Leaving.IN_ANSWER, 30))
_LONGEST_STAY_S = 1.5
_TEXT = (
    "the a of in to is and for with path file name list value string object function class method module return "
    "argument default error type number time state request engine gateway block prompt token answer queue thread "
    "process memory buffer index key map set tuple integer float byte line text word character encoding format read "
    "write open close begin end first last next new old small large empty full true false none other same each all"
)
_WORDS = _TEXT.split()


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitRequest:
    """One request.

    Attributes:
        number: names it.
        api: its route.
        stream: whether it asks for a stream.
        tokens: most tokens of its answer.
        prompt: its text.
        leaving: when its client goes away.
        stay_s: how long the client stays that goes away before the answer.
    """

    number: int
    api: SoakRoute
    stream: bool
    tokens: int
    prompt: str
    leaving: Leaving = Leaving.STAYS
    stay_s: float = 0.0

    @property
    def shows_ids(self) -> bool:
        """Whether its answer shows the ids of the tokens, not their text alone."""
        return self.api in (SoakRoute.COMPLETIONS, SoakRoute.CHAT)

    @property
    def body(self) -> dict[str, Any]:
        """The document of its body."""
        document: dict[str, Any] = {"model": MODEL, "stream": self.stream, "temperature": 0}
        if self.shows_ids:
            document |= {"max_tokens": self.tokens, "ignore_eos": True, "return_token_ids": True}
        messages = [{"role": "user", "content": self.prompt}]
        match self.api:
            case SoakRoute.COMPLETIONS:
                return document | {"prompt": self.prompt}
            case SoakRoute.CHAT:
                return document | {"messages": messages}
            case SoakRoute.MESSAGES:
                return document | {"messages": messages, "max_tokens": self.tokens}
            case SoakRoute.RESPONSES:
                return document | {"input": self.prompt, "max_output_tokens": self.tokens}


def plan_request(seed: int, number: int) -> SplitRequest:
    """The request of this number in the run of this seed."""
    chance = random.Random(f"{seed}/{number}")
    opening = chance.randrange(_OPENINGS) if chance.random() < _SHARED_PART else None
    words = chance.choices(_WORDS, k=chance.randint(_SHORTEST, _LONGEST))
    shared = [] if opening is None else random.Random(f"{seed}/opening/{opening}").choices(_WORDS, k=_SHARED_WORDS)
    drawn = chance.randrange(1000)
    leaving = Leaving.STAYS
    for kind, weight in _LEAVINGS:
        if 0 <= drawn < weight:
            leaving = kind
        drawn -= weight
    return SplitRequest(
        number=number,
        api=chance.choice(tuple(SoakRoute)),
        stream=chance.random() < 0.6,
        tokens=chance.randint(4, MOST_TOKENS),
        prompt=" ".join([*shared, f"number {number}:", *words]),
        leaving=leaving,
        stay_s=chance.uniform(0.0, _LONGEST_STAY_S),
    )
