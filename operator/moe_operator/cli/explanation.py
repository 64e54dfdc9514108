"""The record of a request as text and tables. Pure."""

from moe_contract.request_record import AttemptRecord, RequestRecord
from rich.console import Group
from rich.table import Table
from rich.text import Text

from moe_operator.cli.output import shorten

# By the label of a choice's reason.
_REASONS = {
    "least_predicted": "it had the least predicted time to first token",
    "session": "the session's last request went there, and the best was not better by more than the stickiness",
    "least_requests": "it had the fewest requests",
    "turn": "it was its turn",
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
    reason = _REASONS.get(attempt.reason, attempt.reason)
    return (
        f"{number}. after {_time(attempt.after_s)} to {_target(attempt.name, attempt.rank)}"
        f"{_CONTINUED.get(attempt.continued, '')}, since {reason}; "
        f"first token predicted {_time(attempt.predicted_s)} later"
    )


def _describe_end(record: RequestRecord) -> str:
    first = "" if record.ttft_s is None else f"first token after {_time(record.ttft_s)}, "
    if record.duration_s is None:
        return f"{first}still running"
    problem = f": {record.problem}" if record.problem else ""
    return f"{first}ended after {_time(record.duration_s)} with status {record.status}{problem}"


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
