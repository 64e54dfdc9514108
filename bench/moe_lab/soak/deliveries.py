"""What each request was owed and what its client got: outcomes, and which of them break a guarantee. Pure.

The guarantees are those of docs/gateway.md. A request is never lost: its client gets its whole answer, or an error that
says so. It is answered once, by its own answer. It is written to two engines at most. While an engine is healthy, a
client sees an error only where its stream had begun, or where its own gateway was killed.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

from moe_scheduling.engine.attempts import MAX_ATTEMPTS

from moe_lab.soak.answers import ReadAnswer, owed_text
from moe_lab.soak.traffic import SoakRequest

EXAMPLES = 20


class SoakOutcome(StrEnum):
    """How a request ended for its client.

    The first four keep the guarantees: it got its whole answer; it went away by itself; its stream had begun and ended
    with an error; its gateway was killed meanwhile. The others break one: an error after as many attempts as there are;
    an error before the answer had begun; nothing at all; an answer that is not the one that was owed.
    """

    WHOLE = "whole answer"
    LEFT = "client left"
    STREAM_BROKEN = "stream had begun, then an error"
    GATEWAY_KILLED = "its gateway was killed"
    ATTEMPTS_FAILED = "both attempts failed"
    ERROR = "error before the answer began"
    LOST = "lost"
    WRONG = "not the answer that was owed"
    TWICE = "answered twice"


KEPT = frozenset({SoakOutcome.WHOLE, SoakOutcome.LEFT, SoakOutcome.STREAM_BROKEN, SoakOutcome.GATEWAY_KILLED})


@dataclass(frozen=True, slots=True, kw_only=True)
class Received:
    """What a client got for one request.

    Attributes:
        status: HTTP status; 0 where no head came.
        answer: what the body says, where the status is 200 and it could be read.
        is_complete: whether HTTP shows the end of the answer.
        is_mock: whether a mock engine answered, so that the text is known.
        has_left: whether the client went away by itself.
        timed_out: whether the client waited in vain.
        is_gateway_killed: whether its gateway was killed while it waited.
        surplus: bytes that came after the answer.
        detail: for a report.
    """

    status: int = 0
    answer: ReadAnswer | None = None
    is_complete: bool = False
    is_mock: bool = True
    has_left: bool = False
    timed_out: bool = False
    is_gateway_killed: bool = False
    surplus: bool = False
    detail: str = ""


def judge(request: SoakRequest, received: Received, attempts: Callable[[], int]) -> SoakOutcome:
    """The outcome of a request.

    Args:
        request: the request of the client.
        received: what the client got.
        attempts: to how many engines it was written, asked where it matters.
    """
    rules = (
        (received.surplus, SoakOutcome.TWICE),
        (_has_foreign_text(request, received), SoakOutcome.WRONG),
        (received.has_left, SoakOutcome.LEFT),
        (_is_whole(request, received), SoakOutcome.WHOLE),
        (received.is_gateway_killed, SoakOutcome.GATEWAY_KILLED),
        (received.timed_out, SoakOutcome.LOST),
    )
    if (found := next((outcome for holds, outcome in rules if holds), None)) is not None:
        return found
    if received.status == 200:
        return _judge_broken(request, received, attempts)
    if received.status == 0 or not received.is_complete:
        return SoakOutcome.LOST
    return SoakOutcome.ATTEMPTS_FAILED if received.status >= 500 and attempts() >= MAX_ATTEMPTS else SoakOutcome.ERROR


def _judge_broken(request: SoakRequest, received: Received, attempts: Callable[[], int]) -> SoakOutcome:
    """The outcome of an answer of status 200 that is not whole."""
    answer = received.answer
    # vLLM says of a stream that an error has cut that it is done, after the error.
    if answer is not None and answer.ends and not answer.error:
        return SoakOutcome.WRONG
    if request.stream and answer is not None and answer.has_begun:
        return SoakOutcome.STREAM_BROKEN
    if answer is not None and answer.error:
        return SoakOutcome.ATTEMPTS_FAILED if attempts() >= MAX_ATTEMPTS else SoakOutcome.ERROR
    return SoakOutcome.LOST


def _has_foreign_text(request: SoakRequest, received: Received) -> bool:
    """Whether the tokens that came are not the first ones of the answer that was owed."""
    answer = received.answer
    if answer is None or not received.is_mock:
        return False
    return not owed_text(request.number, request.tokens).startswith(answer.text)


def _is_whole(request: SoakRequest, received: Received) -> bool:
    answer = received.answer
    if received.status != 200 or answer is None or not received.is_complete or answer.error or answer.has_more:
        return False
    is_text_whole = answer.text == owed_text(request.number, request.tokens) if received.is_mock else True
    return answer.ends == 1 and is_text_whole


@dataclass(slots=True)
class Deliveries:
    """Counts of all requests that have ended, and examples of those that break a guarantee.

    Attributes:
        outcomes: by outcome.
        traffic: by route and kind of answer.
        examples: of broken guarantees, at most `EXAMPLES`.
    """

    outcomes: Counter[SoakOutcome] = field(default_factory=Counter)
    traffic: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def add(self, request: SoakRequest, outcome: SoakOutcome, detail: str) -> None:
        """Counts the end of a request."""
        self.outcomes[outcome] += 1
        self.traffic[f"{request.api.value}, {'stream' if request.stream else 'one piece'}"] += 1
        if outcome not in KEPT and len(self.examples) < EXAMPLES:
            self.examples.append(f"request {request.number}: {outcome.value}: {detail}")

    @property
    def finished(self) -> int:
        """Number of requests that have ended."""
        return self.outcomes.total()

    @property
    def broken(self) -> int:
        """Requests that broke a guarantee."""
        return sum(count for outcome, count in self.outcomes.items() if outcome not in KEPT)


class EngineRecords:
    """How often each request was given to engines, and computed to its end, by the engines' own records."""

    def __init__(self) -> None:
        # Counts by the number of the request; a dictionary would be a hundred times as large.
        self._given = bytearray()
        self._computed = bytearray()

    def read(self, text: bytes) -> None:
        """Adds whole lines of a record."""
        for line in text.splitlines():
            what, _, number = line.partition(b" ")
            _count(self._given if what == b"r" else self._computed, int(number))

    def given(self, number: int) -> int:
        """To how many engines a request was written."""
        return self._given[number] if number < len(self._given) else 0

    @property
    def repeated(self) -> int:
        """Requests that were given to more than one engine."""
        return sum(count > 1 for count in self._given)

    @property
    def computed_twice(self) -> int:
        """Requests that two engines computed to the end, of which one answer was thrown away."""
        return sum(count > 1 for count in self._computed)

    @property
    def overwritten(self) -> list[int]:
        """Requests that were given to more engines than they have attempts."""
        return [number for number, count in enumerate(self._given) if count > MAX_ATTEMPTS]


def _count(counts: bytearray, number: int) -> None:
    if number >= len(counts):
        counts.extend(bytes(number + 1 - len(counts)))
    counts[number] = min(255, counts[number] + 1)
