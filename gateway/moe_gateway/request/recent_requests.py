"""The newest requests, kept to explain later why each went where it went (`GET /v1/requests/{id}`).

Called for each attempt and at each end, so both cost about a microsecond. The terms of all targets cost some
microseconds a target, so they are recorded at most once in `TERMS_PERIOD_S`: of every request at a light load, of a
sample at a heavy one.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

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


@dataclass(slots=True)
class _Attempt:
    at_s: float
    sending: Send
    terms: Sequence[Explanation]
    more_targets: int


@dataclass(slots=True)
class _Recent:
    """A request; its parts become a document when somebody asks."""

    arrived_s: float
    route: str
    model: str | None
    prompt_tokens: int
    priority: int
    attempts: list[_Attempt] = field(default_factory=list)
    status: int | None = None
    problem: str = ""
    ttft_s: float | None = None
    ended_s: float | None = None


class RecentRequests:
    """At most `REMEMBERED_REQUESTS` requests by their id; the oldest is forgotten first."""

    def __init__(self) -> None:
        self._by_id: OrderedDict[bytes, _Recent] = OrderedDict()
        self._terms_due_s = 0.0

    def attempt(self, exchange: "DispatchedRequest", sending: Send, dispatcher: Dispatcher, now_s: float) -> None:
        """A request is about to be sent to a target; the dispatcher does not count it there yet."""
        terms: Sequence[Explanation] = ()
        more = 0
        if now_s >= self._terms_due_s:
            self._terms_due_s = now_s + TERMS_PERIOD_S
            terms, more = _explain_choice(exchange.job, sending, dispatcher, now_s)
        self._find(exchange).attempts.append(_Attempt(now_s, sending, terms, more))

    def end(self, exchange: "DispatchedRequest", status: int, problem: str, now_s: float) -> None:
        """Notes how and when a request ended."""
        recent = self._find(exchange)
        recent.status, recent.problem, recent.ttft_s, recent.ended_s = status, problem, exchange.ttft_s, now_s

    def _find(self, exchange: "DispatchedRequest") -> _Recent:
        request_id, arrived_s = exchange.request.request_id, exchange.request.arrived_s
        recent = self._by_id.get(request_id)
        # A client may use an id again: the newest request has it.
        if recent is None or recent.arrived_s != arrived_s:
            job = exchange.job
            model = None if job.model is None else job.model[:LONGEST_MODEL_CHARACTERS]
            recent = _Recent(arrived_s, exchange.route.label, model, job.prompt_tokens, job.priority)
            self._by_id[request_id] = recent
            self._by_id.move_to_end(request_id)
            if len(self._by_id) > REMEMBERED_REQUESTS:
                self._by_id.popitem(last=False)
        return recent

    def record(self, request_id: str) -> RequestRecord | None:
        """The record of a request; None where it is not known, or known no more."""
        recent = self._by_id.get(request_id.encode())
        if recent is None:
            return None
        return RequestRecord(
            request_id=request_id,
            route=recent.route,
            model=recent.model,
            prompt_tokens=recent.prompt_tokens,
            priority=recent.priority,
            attempts=tuple(_attempt_record(attempt, recent.arrived_s) for attempt in recent.attempts),
            status=recent.status,
            problem=recent.problem,
            ttft_s=recent.ttft_s,
            duration_s=None if recent.ended_s is None else recent.ended_s - recent.arrived_s,
        )


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
    )


def _terms(row: Explanation) -> TargetTerms:
    return TargetTerms(
        name=row.target.server,
        rank=row.target.rank,
        requests=row.requests,
        ahead_tokens=row.ahead_tokens,
        uncached_tokens=row.uncached_tokens,
        fresh=row.fresh,
        kv_s=row.kv_s,
        wait_s=row.wait_s,
        predicted_s=row.predicted_s,
    )
