"""The newest requests, kept to explain later why each went where it went (`GET /v1/requests/{id}`).

Called for each attempt and at each end, so both cost about a microsecond: the records are plain lists and tuples,
which get their names when somebody asks. The terms of all targets cost some microseconds a target, so they are recorded
at most once in `TERMS_PERIOD_S`: of every request at a light load, of a sample at a heavy one.
"""

import itertools
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from moe_contract.request_record import AttemptRecord, RequestRecord, TargetTerms
from moe_scheduling.engine.choice import Explanation, Job, Send, explain

from moe_gateway.engines.dispatcher import Dispatcher

if TYPE_CHECKING:
    from moe_gateway.request.dispatched import DispatchedRequest

REMEMBERED_REQUESTS = 1000
TERMS_PERIOD_S = 0.01
MOST_TARGETS = 32
# A client may name a model of any length.
LONGEST_MODEL_CHARACTERS = 256


class _Attempt(NamedTuple):
    at_s: float
    sending: Send
    terms: Sequence[Explanation]
    more_targets: int
    continued: str


class _Recent(NamedTuple):
    """A request. Kept as a list in this order, whose last five are replaced at its end; `running` is then None."""

    arrived_s: float
    route: str
    model: str | None
    prompt_tokens: int
    priority: int
    attempts: list[tuple[float, Send, Sequence[Explanation], int, str]]
    status: int | None
    problem: str
    ttft_s: float | None
    ended_s: float | None
    running: "DispatchedRequest | None"


class BriefRequest(NamedTuple):
    """A remembered request for a list of many: of the terms of its last choice two rows alone are built.

    Attributes:
        arrived_s: on the gateway's clock.
        record: without terms; times have `DIGITS` digits.
        chosen: terms of the target that it was sent to last; None where they were not recorded.
        other: terms of the best target beside it; None without one.
        targets: targets whose terms were compared.
    """

    arrived_s: float
    record: RequestRecord
    chosen: TargetTerms | None = None
    other: TargetTerms | None = None
    targets: int = 0


DIGITS = 5
_ARRIVED, _ATTEMPTS, _STATUS = map(_Recent._fields.index, ("arrived_s", "attempts", "status"))


class RecentRequests:
    """At most `REMEMBERED_REQUESTS` requests by their id; the oldest is forgotten first."""

    def __init__(self) -> None:
        self._by_id: OrderedDict[bytes, list[Any]] = OrderedDict()
        self._terms_due_s = 0.0

    def attempt(self, exchange: "DispatchedRequest", sending: Send, dispatcher: Dispatcher, now_s: float) -> None:
        """A request is about to be sent to a target; the dispatcher does not count it there yet."""
        terms: Sequence[Explanation] = ()
        more = 0
        if now_s >= self._terms_due_s:
            self._terms_due_s = now_s + TERMS_PERIOD_S
            terms, more = _explain_choice(exchange.job, sending, dispatcher, now_s)
        self._find(exchange)[_ATTEMPTS].append((now_s, sending, terms, more, exchange.continued))

    def end(self, exchange: "DispatchedRequest", status: int, problem: str, now_s: float) -> None:
        """Notes how and when a request ended."""
        self._find(exchange)[_STATUS:] = status, problem, exchange.ttft_s, now_s, None

    def _find(self, exchange: "DispatchedRequest") -> list[Any]:
        request, by_id = exchange.request, self._by_id
        request_id, arrived_s = request.request_id, request.arrived_s
        recent = by_id.get(request_id)
        if recent is not None:
            if recent[_ARRIVED] == arrived_s:
                return recent
            # A client may use an id again: the newest request has it.
            by_id.move_to_end(request_id)
        by_id[request_id] = recent = _begin(exchange)
        if len(by_id) > REMEMBERED_REQUESTS:
            by_id.popitem(last=False)
        return recent

    def record(self, request_id: str) -> RequestRecord | None:
        """The record of a request; None where it is not known, or known no more."""
        row = self._by_id.get(request_id.encode())
        return None if row is None else _build_record(request_id, _Recent._make(row))

    def describe(self, exchange: "DispatchedRequest") -> BriefRequest:
        """A request that has not ended, also one that was sent to no engine yet."""
        request = exchange.request
        row = self._by_id.get(request.request_id)
        if row is None or row[_ARRIVED] != request.arrived_s:
            row = _begin(exchange)
        return _build_brief(request.request_id, _Recent._make(row))

    def newest(self, count: int) -> list[BriefRequest]:
        """At most this number of requests, the newest first."""
        rows = itertools.islice(reversed(self._by_id.items()), count)
        return [_build_brief(request_id, _Recent._make(row)) for request_id, row in rows]

    def first_tokens(self) -> list[tuple[float, float]]:
        """Of the remembered streams that have ended the arrival on the gateway's clock and the TTFT in seconds."""
        named = map(_Recent._make, self._by_id.values())
        return [(recent.arrived_s, recent.ttft_s) for recent in named if recent.ttft_s is not None]


def _begin(exchange: "DispatchedRequest") -> list[Any]:
    """The row of a request without an attempt."""
    job = exchange.job
    model = job.model and job.model[:LONGEST_MODEL_CHARACTERS]
    label, tokens, priority = exchange.route.label, job.prompt_tokens, job.priority
    return [exchange.request.arrived_s, label, model, tokens, priority, [], None, "", None, None, exchange]


def _build_record(request_id: str, recent: _Recent) -> RequestRecord:
    return RequestRecord(
        request_id=request_id,
        route=recent.route,
        model=recent.model and _as_text(recent.model),
        prompt_tokens=recent.prompt_tokens,
        priority=recent.priority,
        attempts=tuple(_attempt_record(_Attempt._make(row), recent.arrived_s) for row in recent.attempts),
        status=recent.status,
        problem=recent.problem,
        ttft_s=recent.ttft_s if recent.running is None else recent.running.ttft_s,
        duration_s=None if recent.ended_s is None else recent.ended_s - recent.arrived_s,
    )


def _build_brief(request_id: bytes, recent: _Recent) -> BriefRequest:
    arrived_s, ttft_s = recent.arrived_s, recent.ttft_s if recent.running is None else recent.running.ttft_s
    attempts = [_Attempt._make(row) for row in recent.attempts]
    record = RequestRecord(
        request_id=request_id.decode(errors="replace"),
        route=recent.route,
        model=recent.model and _as_text(recent.model),
        prompt_tokens=recent.prompt_tokens,
        priority=recent.priority,
        attempts=tuple([_brief_attempt(row, arrived_s) for row in attempts]),
        status=recent.status,
        problem=recent.problem,
        ttft_s=None if ttft_s is None else round(ttft_s, DIGITS),
        duration_s=None if recent.ended_s is None else round(recent.ended_s - arrived_s, DIGITS),
    )
    if not attempts or not attempts[-1].terms:
        return BriefRequest(arrived_s, record)
    last = attempts[-1]
    chosen = [row for row in last.terms if row.target == last.sending.target]
    others = [row for row in last.terms if row.target != last.sending.target]
    return BriefRequest(
        arrived_s,
        record,
        _terms(chosen[0], DIGITS) if chosen else None,
        _terms(min(others, key=lambda row: row.predicted_s), DIGITS) if others else None,
        len(last.terms) + last.more_targets,
    )


def _brief_attempt(attempt: _Attempt, arrived_s: float) -> AttemptRecord:
    sending = attempt.sending
    return AttemptRecord(
        name=sending.target.server,
        rank=sending.target.rank,
        reason=sending.reason.value,
        after_s=round(attempt.at_s - arrived_s, DIGITS),
        predicted_s=round(sending.predicted_s, DIGITS),
        continued=attempt.continued,
    )


def _as_text(name: str) -> str:
    """The name of a client with a question mark for each lone surrogate, which no JSON writer takes."""
    return name.encode(errors="replace").decode()


def _explain_choice(job: Job, sending: Send, dispatcher: Dispatcher, now_s: float) -> tuple[Sequence[Explanation], int]:
    """The terms of the chosen target and of others that accept requests, and how many more of these there are."""
    serving = None if job.model is None else dispatcher.partial_models.get(job.model)
    states = [
        state
        for target, state in dispatcher.target_states.items()
        if state.accepting and target != sending.target and (serving is None or target.server in serving)
    ]
    chosen = dispatcher.target_states[sending.target]
    shown = [chosen, *states[: MOST_TARGETS - 1]]
    return explain(job, shown, dispatcher.settings, now_s=now_s), max(0, len(states) + 1 - MOST_TARGETS)


def _attempt_record(attempt: _Attempt, arrived_s: float) -> AttemptRecord:
    sending = attempt.sending
    terms = sorted(attempt.terms, key=lambda row: (row.target != sending.target, row.predicted_s))
    return AttemptRecord(
        name=sending.target.server,
        rank=sending.target.rank,
        reason=sending.reason.value,
        after_s=attempt.at_s - arrived_s,
        predicted_s=sending.predicted_s,
        targets=tuple(map(_terms, terms)),
        more_targets=attempt.more_targets,
        continued=attempt.continued,
    )


def _terms(row: Explanation, digits: int | None = None) -> TargetTerms:
    kv_s, wait_s, predicted_s = row.kv_s, row.wait_s, row.predicted_s
    if digits is not None:
        kv_s, wait_s, predicted_s = round(kv_s, digits), round(wait_s, digits), round(predicted_s, digits)
    return TargetTerms(
        name=row.target.server,
        rank=row.target.rank,
        requests=row.requests,
        ahead_tokens=row.ahead_tokens,
        uncached_tokens=row.uncached_tokens,
        fresh=row.fresh,
        kv_s=kv_s,
        wait_s=wait_s,
        predicted_s=predicted_s,
    )
