"""The screen of `moeserving top`, from the gateways' snapshots. Pure."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from moe_contract.live_page import EngineRow, LiveSnapshot, PageFinding
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moe_operator.cli.output import shorten

# Lines of the screen that are no engine: figures, two findings, the heading and the last line.
_OTHER_LINES = 14
_MOST_FINDINGS, _MOST_HELD = 5, 3
_COLOURS = {"error": "red", "warning": "yellow", "info": "cyan"}
_STATUS_COLOURS = {"ready": "green"} | dict.fromkeys(
    ("draining", "starting", "stopped", "notReady", "ejected"), "yellow"
)


@dataclass(frozen=True, slots=True)
class _Column:
    title: str
    cell: Callable[[EngineRow], str]
    left: bool = False


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def render_time(seconds: float | None) -> str:
    """Seconds in words of few letters, such as `21.4 ms` and `1.53 s`; `-` for None."""
    if seconds is None:
        return "-"
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


_ROLE = _Column("role", lambda row: row.role or "-", left=True)
_COLUMNS = (
    _Column("run", lambda row: str(row.running)),
    _Column("wait", lambda row: str(row.waiting)),
    _Column("KV", lambda row: _percent(row.kv_usage)),
    _Column("TPOT", lambda row: render_time(row.step_s)),
    _Column("tok/s", lambda row: _number(row.tokens_per_s)),
    _Column("sent", lambda row: str(row.in_flight)),
)
_WIDE_COLUMNS = (
    _Column("group", lambda row: row.group or "-", left=True),
    _Column("prefill", lambda row: str(row.waiting_prefill_tokens)),
    _Column("preempted", lambda row: str(row.preemptions)),
    _Column("signal", lambda row: row.signal_source, left=True),
    _Column("age", lambda row: render_time(row.signal_age_s)),
    _Column("TTFT factor", lambda row: f"{row.ttft_factor:.2f}"),
    _Column("experts", lambda row: f"{row.expert_balance:.2f}"),
)


def render_top(
    name: str, snapshots: Mapping[str, LiveSnapshot], *, wide: bool = False, height: int | None = None, last: str = ""
) -> Group:
    """The whole screen.

    Args:
        name: of the deployment.
        snapshots: the newest of each gateway, by the pod's name.
        wide: whether all columns are shown.
        height: lines of the terminal; None: all engines are shown.
        last: the last line, such as a gateway that gives no answer.
    """
    return Group(*_parts(name, snapshots, wide, height, last))


def _parts(
    name: str, snapshots: Mapping[str, LiveSnapshot], wide: bool, height: int | None, last: str
) -> Iterator[RenderableType]:
    if snapshots:
        first = next(iter(snapshots.values()))
        time = f"{datetime.fromtimestamp(first.at_s):%H:%M:%S}"
        models = ", ".join(first.models) or "-"
        yield Text.assemble((name, "bold"), f"  model {models}  order {first.order}, choice {first.policy}  {time}")
        for pod, snapshot in snapshots.items():
            yield Text(_describe_speed(snapshot, f"{pod}: " if len(snapshots) > 1 else ""))
            yield Text(_describe_load(snapshot))
        yield from _describe_findings(snapshots.values())
        yield from _describe_held(first)
        rows = merge_engines(list(snapshots.values()))
        if roles := Counter(row.role for row in rows if row.role):
            yield Text("roles: " + ", ".join(f"{count} {role}" for role, count in sorted(roles.items())))
        yield Text()
        shown = choose_rows(rows, None if height is None else max(3, height - _OTHER_LINES))
        yield render_engines(shown, wide=wide)
        if len(shown) < len(rows):
            yield Text(f"and {len(rows) - len(shown)} more; these are not ready or have the most requests", style="dim")
    if last:
        yield Text(last, style="dim")


def _describe_speed(snapshot: LiveSnapshot, pod: str) -> str:
    point = snapshot.point
    ttft = [f"p95 {render_time(point.ttft_p95_s)}"] if point.ttft_p95_s is not None else []
    ttft += [f"bound {render_time(snapshot.ttft_target_s)}"] if snapshot.ttft_target_s is not None else []
    details = f" ({', '.join(ttft)})" if ttft else ""
    tpot = f" (bound {render_time(snapshot.step_target_s)})" if snapshot.step_target_s is not None else ""
    tokens = "" if point.tokens_per_s is None else f"  {point.tokens_per_s:.0f} tok/s"
    return (
        f"{pod}TTFT {render_time(point.ttft_s)}{details}  "
        f"TPOT {render_time(point.step_s)}{tpot}  {point.requests_per_s:.1f} req/s{tokens}"
    )


def _describe_load(snapshot: LiveSnapshot) -> str:
    point = snapshot.point
    return (
        f"{point.in_flight} at engines, {point.held} of at most {snapshot.hold_limit} held, next waits "
        f"{render_time(snapshot.wait_s)}; {snapshot.requests} ended, {snapshot.failed} failed"
        f"{f', {snapshot.refused} refused' if snapshot.refused else ''}"
    )


def _describe_findings(snapshots: Iterable[LiveSnapshot]) -> Iterator[Text]:
    findings: dict[str, PageFinding] = {}
    for snapshot in snapshots:
        for row in snapshot.findings:
            # How long a start takes is another number at each gateway.
            said = row.message.partition(": ")[0] if row.kind.startswith("engine_") else row.message
            findings.setdefault(said, row)
    if not findings:
        yield Text("nothing is wrong", style="green")
    for row in list(findings.values())[:_MOST_FINDINGS]:
        yield Text.assemble((row.severity, _COLOURS[row.severity]), f": {row.message} {row.advice}".rstrip())


def _describe_held(snapshot: LiveSnapshot) -> Iterator[Text]:
    for row in snapshot.held[:_MOST_HELD]:
        tenant = f" of tenant {row.tenant}" if row.tenant else ""
        yield Text(f"held: {row.requests} of class {row.priority}{tenant}, the oldest for {render_time(row.oldest_s)}")


def merge_engines(snapshots: Sequence[LiveSnapshot]) -> list[EngineRow]:
    """One row for each rank, as the first gateway that knows it says; `in_flight` is the sum over gateways."""
    rows: dict[tuple[str, int], EngineRow] = {}
    sent = Counter[tuple[str, int]]()
    for snapshot in snapshots:
        for row in snapshot.engines:
            rows.setdefault((row.name, row.rank), row)
            sent[row.name, row.rank] += row.in_flight
    return [replace(row, in_flight=sent[key]) for key, row in sorted(rows.items())]


def choose_rows(rows: Sequence[EngineRow], most: int | None) -> list[EngineRow]:
    """As many rows as fit: first ranks that are not ready, then those with the most requests; by name if all fit."""
    if most is None or len(rows) <= most:
        return list(rows)
    return sorted(rows, key=lambda row: (row.status == "ready", -row.waiting - row.running))[:most]


def render_engines(rows: Sequence[EngineRow], *, wide: bool) -> Table:
    """The engines, one row a rank."""
    split = (_ROLE,) if any(row.role for row in rows) else ()
    several = {row.name for row in rows if row.rank}
    columns = (*split, *_COLUMNS, *(_WIDE_COLUMNS if wide else ()))
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
    table.add_column("engine", no_wrap=True)
    table.add_column("status", no_wrap=True)
    for column in columns:
        table.add_column(column.title, justify="left" if column.left else "right", no_wrap=True)
    for row in rows:
        name = f"{row.name} rank {row.rank}" if row.name in several else row.name
        status = Text(row.status, style=_STATUS_COLOURS.get(row.status, "red"))
        table.add_row(name if wide else shorten(name), status, *(column.cell(row) for column in columns))
    return table
