"""The record of a request as text and tables. Pure."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from moe_contract.request_record import AttemptRecord, RequestRecord
from rich.console import Group
from rich.table import Table
from rich.text import Text

from moe_operator.cli.output import shorten

# By the label of a choice's reason.
REASONS = {
    "least_predicted": "it had the least predicted time to first token",
    "session": "the session's last request went there, and the best was not better by more than the stickiness",
    "least_requests": "it had the fewest requests",
    "turn": "it was its turn",
    "prefill": "it computes prompts for others",
    "decode": "it goes on from a prompt that was computed elsewhere",
}


_CONTINUED = {
    "prefix": ", where the stream went on after the tokens that the client had",
    "replay": ", where the stream was computed anew and went on after what the client had",
}


def render_record(record: RequestRecord, *, wide: bool = True) -> Group:
    """The request, each engine that it was sent to, and the terms of each choice; 80 columns have room for the narrow
    form.
    """
    parts: list[Text | Table] = [Text.assemble((record.request_id, "bold"), f"  {_describe(record)}")]
    for number, attempt in enumerate(record.attempts, 1):
        parts.append(Text(_describe_attempt(number, attempt)))
        if attempt.targets:
            parts.append(_render_terms(attempt, wide=wide))
        else:
            parts.append(Text("   the terms of this choice were not recorded: at most one choice in 10 ms is"))
    if not record.attempts:
        parts.append(Text("it was sent to no engine"))
    parts.append(Text(_describe_end(record)))
    return Group(*parts)


def _describe(record: RequestRecord) -> str:
    model = f", model {record.model}" if record.model else ""
    priority = f", priority {record.priority}" if record.priority else ""
    return f"{record.route}{model}, about {record.prompt_tokens} prompt tokens{priority}"


def _describe_attempt(number: int, attempt: AttemptRecord) -> str:
    reason = REASONS.get(attempt.reason, attempt.reason)
    awaited = "prompt" if attempt.reason == "prefill" else "first token"
    return (
        f"{number}. after {_time(attempt.after_s)} to {_target(attempt.name, attempt.rank)}"
        f"{_CONTINUED.get(attempt.continued, '')}, since {reason}; "
        f"{awaited} predicted {_time(attempt.predicted_s)} later"
    )


def _describe_end(record: RequestRecord) -> str:
    first = "" if record.ttft_s is None else f"first token after {_time(record.ttft_s)}{_describe_cause(record)}"
    if record.duration_s is None:
        return f"{first}still running"
    is_whole = record.ttft_s is None and record.status is not None and record.status < 400
    end = ", in one piece, so when its first token was there is not known" if is_whole else ""
    problem = f": {record.problem}" if record.problem else ""
    return f"{first}ended after {_time(record.duration_s)} with status {record.status}{problem}{end}"


class Cause(NamedTuple):
    """The longest part of the time to a first token: its length in seconds, and what happened in it."""

    seconds: float
    words: str


def find_cause(record: RequestRecord) -> Cause | None:
    """On what most of the time to the first token was spent; None where there was no first token, or no engine."""
    begun = [attempt for attempt in record.attempts if not attempt.continued]
    if record.ttft_s is None or not begun:
        return None
    longest = max(_split_wait(begun, record.ttft_s), key=lambda cause: cause.seconds)
    return longest if longest.seconds > 0 else None


def _split_wait(attempts: Sequence[AttemptRecord], ttft_s: float) -> Iterator[Cause]:
    """The parts of the time to the first token, by the attempts before it: as the live page has them (`words.ts`)."""
    *before, last = attempts
    is_split = last.reason == "decode" and bool(before) and before[-1].reason == "prefill"
    first = before.pop() if is_split else last
    held = "it was at engines that failed it, or waited for another"
    yield Cause(
        min(first.after_s, ttft_s), held if before else "it was held in the gateway until an engine could take it"
    )
    sent_s = min(last.after_s, ttft_s)
    if is_split:
        there, predicted = _target(first.name, first.rank), _time(first.predicted_s)
        words = f"its prompt was computed at {there}, where {predicted} were predicted"
        yield Cause(max(0.0, sent_s - first.after_s), words)
    yield from _split_attempt(last, ttft_s - sent_s, is_split=is_split)


def _split_attempt(attempt: AttemptRecord, measured_s: float, *, is_split: bool) -> Iterator[Cause]:
    chosen = next((row for row in attempt.targets if (row.name, row.rank) == (attempt.name, attempt.rank)), None)
    # Terms are of a whole request.
    terms = None if is_split else chosen
    wait_s = min(terms.wait_s, measured_s) if terms else 0.0
    own_s = min(max(0.0, attempt.predicted_s - (terms.wait_s if terms else 0.0)), measured_s - wait_s)
    if terms:
        is_kv = terms.kv_s > terms.wait_s / 2
        behind = "for KV blocks" if is_kv else f"behind {terms.ahead_tokens} prompt tokens of other requests"
        yield Cause(wait_s, f"it waited {behind}, as predicted")
        yield Cause(own_s, f"its own prompt was computed, {terms.uncached_tokens} tokens that no cache had")
    else:
        predicted = "its KV blocks and the first token" if is_split else "the prompts before it and its own"
        yield Cause(own_s, f"as predicted, {predicted}")
    yield Cause(measured_s - wait_s - own_s, "longer than its engine's step times predict")


def _describe_cause(record: RequestRecord) -> str:
    cause = find_cause(record)
    if cause is None or not record.ttft_s:
        return ", "
    share = round(100 * cause.seconds / record.ttft_s)
    return f"; the longest part, {_time(cause.seconds)} ({share} %): {cause.words}\n"


def _render_terms(attempt: AttemptRecord, *, wide: bool) -> Table:
    kv = ("wait for KV",) if wide else ()
    own = "own uncached" if wide else "uncached"
    columns = ("  engine", "requests", "ahead", own, "signal", *kv, "wait", "first token")
    table = Table(box=None, pad_edge=False, padding=(0, 2 if wide else 1, 0, 0), header_style="dim")
    for column in columns:
        table.add_column(column, justify="left" if column in ("  engine", "signal") else "right", no_wrap=True)
    unit = " tokens" if wide else ""
    for row in attempt.targets:
        name = _target(row.name, row.rank)
        is_chosen = (row.name, row.rank) == (attempt.name, attempt.rank)
        table.add_row(
            f"{'>' if is_chosen else ' '} {name if wide else shorten(name)}",
            str(row.requests),
            f"{row.ahead_tokens}{unit}",
            f"{row.uncached_tokens}{unit}",
            "fresh" if row.fresh else "stale",
            *((_time(row.kv_s),) if wide else ()),
            _time(row.wait_s),
            _time(row.predicted_s),
        )
    if attempt.more_targets:
        table.add_row(f"  and {attempt.more_targets} more")
    return table


def _target(name: str, rank: int) -> str:
    return f"{name} rank {rank}" if rank else name


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"
