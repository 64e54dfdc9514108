"""Open-loop replay: each request is sent when the trace says so, whether or not earlier ones have answered.

Times count from the moment a request was due, so that a generator which falls behind cannot flatter the server; how far
it fell behind is reported. Called by `moeserving replay` and `moe_tools.compare_command`.
"""

import asyncio
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from moe_tools.prompts import PromptMaker
from moe_tools.streaming import Answer, ServerAddress, exchange
from moe_tools.traces import TraceRequest

_USAGE = re.compile(rb'"completion_tokens"\s*:\s*(\d+)')
_ERROR_EVENT = re.compile(rb'^(data:\s*\{\s*"error"|event:\s*error)', re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class AnsweredRequest:
    """A request that got all its tokens. Times in seconds from the moment it was due."""

    index: int
    due_s: float
    lateness_s: float
    prompt_tokens: int
    output_tokens: int
    ttft_s: float
    last_token_s: float
    end_s: float

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first; None for an answer of one token."""
        if self.output_tokens < 2:
            return None
        return (self.last_token_s - self.ttft_s) / (self.output_tokens - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class FailedRequest:
    """A request that did not; `kind` groups the like ones, such as `HTTP 429`."""

    index: int
    due_s: float
    lateness_s: float
    prompt_tokens: int
    kind: str
    detail: str


RequestResult = AnsweredRequest | FailedRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayResult:
    """All outcomes of one replay, in the order of the trace, and the seconds until the last answer."""

    outcomes: tuple[RequestResult, ...]
    wall_s: float

    @property
    def answered(self) -> list[AnsweredRequest]:
        """The requests that got a whole answer."""
        return [outcome for outcome in self.outcomes if isinstance(outcome, AnsweredRequest)]

    @property
    def failed(self) -> list[FailedRequest]:
        """The requests that did not."""
        return [outcome for outcome in self.outcomes if isinstance(outcome, FailedRequest)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Where and how to send: the same for each request of a run."""

    endpoint: ServerAddress
    model: str
    prompts: PromptMaker
    timeout_s: float = 600.0

    def salted(self, salt: int) -> "Load":
        """The same load with other prompts."""
        return replace(self, prompts=replace(self.prompts, salt=salt))


OnOutcome = Callable[[RequestResult], None]


async def replay(requests: Sequence[TraceRequest], load: Load, on_outcome: OnOutcome = lambda _: None) -> ReplayResult:
    """Sends `requests` (ordered by arrival) at their times, waits for all answers, and calls `on_outcome` for each."""
    loop = asyncio.get_running_loop()
    bodies = _next_body(requests, load)
    start_s = loop.time()
    tasks: list[asyncio.Task[RequestResult]] = []
    for index, request in enumerate(requests):
        body = next(bodies)
        due_s = start_s + request.arrival_s
        if (wait_s := due_s - loop.time()) > 0:
            await asyncio.sleep(wait_s)
        tasks.append(asyncio.create_task(_send_and_report(index, request, body, due_s, load, on_outcome)))
    outcomes = await asyncio.gather(*tasks)
    return ReplayResult(outcomes=tuple(outcomes), wall_s=loop.time() - start_s)


async def replay_closed(
    requests: Sequence[TraceRequest], load: Load, concurrency: int, duration_s: float
) -> tuple[ReplayResult, float]:
    """Keeps `concurrency` requests in flight for `duration_s`: the run, and the requests a second that were completed.

    The rate is counted between the first and the last completion within the time, so that neither the beginning, when
    nothing can have completed yet, nor the end, when fewer are in flight, lowers it.
    """
    loop = asyncio.get_running_loop()
    numbered = iter(enumerate(requests))
    start_s = loop.time()
    ends: list[float] = []
    outcomes: list[RequestResult] = []

    async def worker() -> None:
        for index, request in numbered:
            if loop.time() - start_s >= duration_s:
                return
            outcome = await _send(index, request, build_body(index, request, load), loop.time(), load)
            outcomes.append(outcome)
            ends.append(loop.time())

    await asyncio.gather(*(worker() for _ in range(concurrency)))
    within = [end for end in ends if end - start_s <= duration_s]
    span_s = within[-1] - within[0] if len(within) > 1 else 0.0
    rate = (len(within) - 1) / span_s if span_s > 0 else len(ends) / (loop.time() - start_s)
    return ReplayResult(outcomes=tuple(outcomes), wall_s=loop.time() - start_s), rate


def build_body(index: int, request: TraceRequest, load: Load) -> bytes:
    """A streamed completion of exactly the request's lengths."""
    body = {
        "model": load.model,
        "prompt": load.prompts.build(index, request),
        "max_tokens": request.output_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return json.dumps(body, separators=(",", ":")).encode()


def read_outcome(
    answer: Answer, index: int, request: TraceRequest, due_s: float, sent_s: float, end_s: float
) -> RequestResult:
    """Judges an answer: complete, without an error event, and of the length that was asked for."""

    def failed(kind: str, detail: str = "") -> FailedRequest:
        return _failure(index, request, due_s, sent_s, kind, detail)

    if answer.status != 200:
        return failed(
            f"HTTP {answer.status}" if answer.status else "no HTTP",
            b"".join(answer.body)[:200].decode("utf-8", "replace"),
        )
    if _ERROR_EVENT.search(answer.tail):
        return failed("error event", answer.tail[-200:].decode("utf-8", "replace"))
    if not answer.complete or b"[DONE]" not in answer.tail:
        return failed("cut stream")
    usage = _USAGE.findall(answer.tail)
    if answer.first_s is None or answer.last_s is None or not usage:
        return failed("no tokens")
    if int(usage[-1]) != request.output_tokens:
        return failed("wrong length", f"{int(usage[-1])} tokens instead of {request.output_tokens}")
    return AnsweredRequest(
        index=index,
        due_s=request.arrival_s,
        lateness_s=sent_s - due_s,
        prompt_tokens=request.prompt_tokens,
        output_tokens=request.output_tokens,
        ttft_s=answer.first_s - due_s,
        last_token_s=answer.last_s - due_s,
        end_s=end_s - due_s,
    )


def _next_body(requests: Sequence[TraceRequest], load: Load):  # type: ignore[no-untyped-def]
    for index, request in enumerate(requests):
        yield build_body(index, request, load)


async def _send_and_report(
    index: int, request: TraceRequest, body: bytes, due_s: float, load: Load, on_outcome: OnOutcome
) -> RequestResult:
    outcome = await _send(index, request, body, due_s, load)
    on_outcome(outcome)
    return outcome


async def _send(index: int, request: TraceRequest, body: bytes, due_s: float, load: Load) -> RequestResult:
    clock = asyncio.get_running_loop().time
    sent_s = clock()
    try:
        answer = await exchange(load.endpoint, "POST", "/v1/completions", body, stream=True, timeout_s=load.timeout_s)
    except TimeoutError:
        return _failure(index, request, due_s, sent_s, "timeout", f"no complete answer in {load.timeout_s:.0f} s")
    except OSError as error:
        return _failure(index, request, due_s, sent_s, "no connection", str(error))
    return read_outcome(answer, index, request, due_s, sent_s, clock())


def _failure(index: int, request: TraceRequest, due_s: float, sent_s: float, kind: str, detail: str) -> FailedRequest:
    return FailedRequest(
        index=index,
        due_s=request.arrival_s,
        lateness_s=sent_s - due_s,
        prompt_tokens=request.prompt_tokens,
        kind=kind,
        detail=detail,
    )
