"""One request as the gateway remembers it, `GET /v1/requests/{id}` of its admin port: why it went where it went.

The gateway writes it with `write_request_record`; `moeserving explain` reads it with `read_request_record`, which skips
unknown fields and uses the defaults of absent ones.
"""

from dataclasses import dataclass

import orjson
from pydantic import TypeAdapter


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetTerms:
    """The prediction for one target at the moment of a choice, term by term.

    Attributes:
        name: of the engine.
        rank: number of its data-parallel rank.
        requests: requests at the target.
        ahead_tokens: prefill tokens ahead of the request.
        uncached_tokens: tokens of its prompt that the target would compute.
        fresh: whether the target's signal was young enough to be used.
        kv_s: seconds until KV blocks would be free, part of `wait_s`.
        wait_s: predicted seconds until its prefill would begin.
        predicted_s: predicted seconds until its first token.
    """

    name: str
    rank: int = 0
    requests: int = 0
    ahead_tokens: int = 0
    uncached_tokens: int = 0
    fresh: bool = False
    kv_s: float = 0.0
    wait_s: float = 0.0
    predicted_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptRecord:
    """One engine that the request was sent to.

    Attributes:
        name: of the engine.
        rank: number of its data-parallel rank.
        reason: why it was chosen, as the label of `moeserving_gateway_decisions_total`.
        after_s: seconds from the request's arrival to this attempt.
        predicted_s: predicted seconds from this attempt to the first token.
        targets: the terms of the targets that could be chosen; empty where they were not recorded.
        more_targets: how many more could be chosen, whose terms were not recorded.
        continued: how a stream that had begun went on there, `prefix` or `replay`; empty where it had not.
    """

    name: str
    rank: int = 0
    continued: str = ""
    reason: str = ""
    after_s: float = 0.0
    predicted_s: float = 0.0
    targets: tuple[TargetTerms, ...] = ()
    more_targets: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRecord:
    """The whole answer.

    Attributes:
        request_id: the value of `x-request-id`.
        route: of the request, as in metrics.
        model: name that it asks for; None: any.
        prompt_tokens: tokens of its prompt, estimated.
        priority: its level; lower is more urgent.
        attempts: in their order; more than one where an engine failed it; none where it was never sent.
        status: of the answer; None while it runs.
        problem: the error that ended it; empty without one.
        ttft_s: seconds from its arrival to the first token of its stream; None before, and for an answer in one piece.
        duration_s: seconds from its arrival to its end; None while it runs.
    """

    request_id: str
    route: str = ""
    model: str | None = None
    prompt_tokens: int = 0
    priority: int = 0
    attempts: tuple[AttemptRecord, ...] = ()
    status: int | None = None
    problem: str = ""
    ttft_s: float | None = None
    duration_s: float | None = None


_READER = TypeAdapter(RequestRecord)


def write_request_record(record: RequestRecord) -> bytes:
    """Returns the record as JSON, the body of `GET /v1/requests/{id}`."""
    return orjson.dumps(record)


def read_request_record(text: bytes) -> RequestRecord:
    """The record in a JSON text.

    Raises:
        ValueError: it is no JSON, or a field has another type.
    """
    return _READER.validate_json(text)
