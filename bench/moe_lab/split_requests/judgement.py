"""What each client got beside what it was owed. Pure.

Tokens are compared by their ids where the route shows them, else by their text. An answer that an engine's end cut
after its first byte is no fault of the gateway's, but its tokens have to be the first ones that are owed.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum

import orjson

from moe_lab.soak.answers import ReadAnswer, read_piece, read_stream
from moe_lab.split_requests.traffic import SplitRequest

EXAMPLES = 20


class SplitOutcome(StrEnum):
    """How a request ended for its client."""

    RIGHT = "whole, with the owed tokens"
    LEFT = "client left"
    CUT = "stream cut after its first byte"
    WRONG = "wrong tokens"
    LOST = "lost before the first byte"


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitAnswer:
    """What a client got.

    Attributes:
        status: of the answer; 0 without one.
        body: as far as it came.
        is_complete: whether HTTP shows its end.
        has_left: whether the client went away by itself.
        ttft_s: from sending to the first byte of the body, in seconds; None where none came.
    """

    status: int = 0
    body: bytes = b""
    is_complete: bool = False
    has_left: bool = False
    ttft_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """The tokens of an answer.

    Attributes:
        tokens: ids, each with a space behind it, or text.
        ends: how often it says that it is whole.
        error: in it; empty without one.
    """

    tokens: str
    ends: int
    error: str = ""


def read_content(request: SplitRequest, body: bytes) -> Content:
    """Reads as much of an answer as has come.

    Raises:
        ValueError: an answer in one piece is none of its route.
    """
    answer: ReadAnswer = (read_stream if request.stream else read_piece)(request.api, body)
    tokens = answer.text if not request.shows_ids else "".join(f"{token} " for token in _ids(request, body))
    return Content(tokens=tokens, ends=answer.ends, error=answer.error)


def _ids(request: SplitRequest, body: bytes) -> Iterator[int]:
    if not request.stream:
        yield from orjson.loads(body)["choices"][0].get("token_ids") or ()
        return
    for line in body.split(b"\n"):
        if not line.startswith(b"data: {"):
            continue
        try:
            document = orjson.loads(line[6:])
        except orjson.JSONDecodeError:
            continue
        for choice in document.get("choices") or ():
            yield from choice.get("token_ids") or ()


def judge(request: SplitRequest, received: SplitAnswer, owed: str) -> SplitOutcome:
    """The outcome of a request.

    Args:
        request: the request.
        received: what its client got.
        owed: the tokens that a plain engine answers.
    """
    try:
        content = read_content(request, received.body) if received.status == 200 else Content(tokens="", ends=0)
    except (ValueError, KeyError, TypeError):
        content = Content(tokens="", ends=0, error="cannot be read")
    if not owed.startswith(_whole_characters(content.tokens)):
        return SplitOutcome.WRONG
    if received.has_left:
        return SplitOutcome.LEFT
    if received.status == 200 and received.is_complete and content.ends == 1 and not content.error:
        return SplitOutcome.RIGHT if content.tokens == owed else SplitOutcome.WRONG
    has_begun = received.status == 200 and request.stream and bool(received.body)
    return SplitOutcome.CUT if has_begun else SplitOutcome.LOST


def _whole_characters(tokens: str) -> str:
    """Text without the mark of a character at its end that was not whole yet."""
    return tokens.rstrip("\N{REPLACEMENT CHARACTER}")


@dataclass(slots=True)
class Outcomes:
    """Outcomes of all requests that have ended.

    Attributes:
        counts: by outcome.
        routes: counts by route and kind of answer.
        ttft_s: of the whole streams, in seconds.
        examples: of requests that were lost or got wrong tokens, at most `EXAMPLES`.
    """

    counts: Counter[SplitOutcome] = field(default_factory=Counter)
    routes: Counter[str] = field(default_factory=Counter)
    ttft_s: list[float] = field(default_factory=list)
    examples: list[str] = field(default_factory=list)

    def add(self, request: SplitRequest, received: SplitAnswer, owed: str) -> SplitOutcome:
        """Judges and counts one request."""
        outcome = judge(request, received, owed)
        self.counts[outcome] += 1
        self.routes[f"{request.api.value}, {'stream' if request.stream else 'one piece'}"] += 1
        if outcome is SplitOutcome.RIGHT and request.stream and received.ttft_s is not None:
            self.ttft_s.append(received.ttft_s)
        if outcome in (SplitOutcome.WRONG, SplitOutcome.LOST) and len(self.examples) < EXAMPLES:
            kind = "stream" if request.stream else "one piece"
            found = f"status {received.status}, {received.body[-300:]!r}"
            self.examples.append(f"{request.number}, {request.api.value}, {kind}: {outcome.value}: {found}; {owed!r}")
        return outcome

    @property
    def finished(self) -> int:
        """Number of requests that have ended."""
        return self.counts.total()

    @property
    def problems(self) -> list[str]:
        """The guarantees that were broken, in words."""
        return [
            f"{kind.value}: {self.counts[kind]} requests"
            for kind in (SplitOutcome.WRONG, SplitOutcome.LOST)
            if self.counts[kind]
        ]
