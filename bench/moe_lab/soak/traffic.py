"""The requests of a soak: each follows from the seed and its number alone. Pure."""

import random
from dataclasses import dataclass
from enum import Enum
from typing import Any

import orjson

from moe_lab.soak.answers import MOCK_MODEL, MODEL, SoakRoute, mark_prompt

# Bytes of the text beside the mark, and how many in a thousand requests have it.
SMALL, MEDIUM, LARGE, HUGE = 200, 8_000, 100_000, 1_400_000
_SIZES = ((MEDIUM, 150), (LARGE, 15), (HUGE, 1))
MOST_TOKENS = 12
_WORDS = "the gateway stands between clients and engines and chooses one of them for each request "
SESSIONS = 500


class Leaving(Enum):
    """When a client goes away: not before its answer is whole, amid its body, before any answer, amid its answer."""

    STAYS = "stays"
    IN_BODY = "in its body"
    BEFORE_ANSWER = "before its answer"
    IN_ANSWER = "in its answer"


_LEAVINGS = (
    (Leaving.IN_BODY, 10),
    (Leaving.BEFORE_ANSWER, 20),
    (Leaving.IN_ANSWER, 20),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SoakRequest:
    """One request.

    Attributes:
        number: names it in its prompt.
        api: its route.
        stream: whether it asks for a stream.
        tokens: of its answer.
        text_bytes: length of its prompt beside the mark.
        leaving: when its client goes away.
        leave_after: how many bytes of its body are sent, or of its answer read, before the client goes away.
        session: names its session; empty for none.
    """

    number: int
    api: SoakRoute
    stream: bool
    tokens: int
    text_bytes: int
    leaving: Leaving = Leaving.STAYS
    leave_after: int = 0
    session: str = ""

    @property
    def model(self) -> str:
        """Long prompts are for the engines that have room for them."""
        return MODEL if self.text_bytes == SMALL else MOCK_MODEL

    @property
    def prompt(self) -> str:
        """Its prompt: the mark first, since the gateway compares beginnings, then text."""
        text = _WORDS * (self.text_bytes // len(_WORDS) + 1)
        return f"{mark_prompt(self.number, self.tokens)} {text[: self.text_bytes]}"

    @property
    def body(self) -> dict[str, Any]:
        """The document of its body."""
        document: dict[str, Any] = {"model": self.model, "stream": self.stream, "temperature": 0}
        match self.api:
            case SoakRoute.COMPLETIONS:
                return document | {"prompt": self.prompt, "max_tokens": self.tokens, "ignore_eos": True}
            case SoakRoute.CHAT:
                messages = [{"role": "user", "content": self.prompt}]
                return document | {"messages": messages, "max_tokens": self.tokens, "ignore_eos": True}
            case SoakRoute.MESSAGES:
                messages = [{"role": "user", "content": self.prompt}]
                return document | {"messages": messages, "max_tokens": self.tokens}
            case SoakRoute.RESPONSES:
                return document | {"input": self.prompt, "max_output_tokens": self.tokens}

    def encode(self) -> bytes:
        """Its head and its body as one message."""
        body = orjson.dumps(self.body)
        session = f"x-session-id: {self.session}\r\n" if self.session else ""
        head = (
            f"POST {self.api.value} HTTP/1.1\r\nhost: soak\r\ncontent-type: application/json\r\n"
            f"x-request-id: soak-{self.number}\r\n{session}content-length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body


def plan_request(seed: int, number: int) -> SoakRequest:
    """The request of this number in the soak of this seed."""
    chance = random.Random(f"{seed}/{number}")
    stream = chance.random() < 0.6
    leaving = _pick(chance, _LEAVINGS, Leaving.STAYS)
    text_bytes = _pick(chance, _SIZES, SMALL)
    return SoakRequest(
        number=number,
        api=chance.choice(tuple(SoakRoute)),
        stream=stream,
        tokens=chance.randint(1, MOST_TOKENS),
        text_bytes=text_bytes,
        leaving=leaving,
        leave_after=chance.randint(0, text_bytes) if leaving is Leaving.IN_BODY else chance.randint(1, 1500),
        session=f"session-{chance.randrange(SESSIONS)}" if chance.random() < 0.3 else "",
    )


def _pick(chance: random.Random, rows: tuple[tuple[Any, int], ...], default: Any) -> Any:
    drawn = chance.randrange(1000)
    for value, weight in rows:
        drawn -= weight
        if drawn < 0:
            return value
    return default
