"""The present problems in words, from one snapshot of the live page. Pure."""

import itertools
import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from moe_contract.live_page import EngineRow, LiveSnapshot, PageFinding, Severity, TimePoint

NEAR_LIMIT = 0.8
FULL_KV = 0.95
UNEVEN_EXPERTS = 1.3
# Engine's correction of the predictions from which it is named: twice as slow as its model says.
SLOW_FACTOR = 2.0
# Times without a bound: the median of the last seconds beside what nine of ten seconds before kept. A page that was
# just opened knows too little to compare.
RECENT_S, LEAST_RECENT, LEAST_BEFORE, USUAL_PART, UNUSUAL_FACTOR = 10.0, 3, 30, 0.9, 1.5
# Least difference in seconds that is worth a word, of first tokens and between tokens.
LEAST_EXCESS_S = {"ttft": 0.1, "step": 0.01}
_SHOWN_NAMES = 3
_ORDER: tuple[Severity, ...] = ("error", "warning", "info")


def find_problems(snapshot: LiveSnapshot, points: Sequence[TimePoint] = ()) -> tuple[PageFinding, ...]:
    """All findings about a snapshot, the worst first.

    Args:
        snapshot: of the gateway.
        points: the seconds before it, the oldest first, by which its times are judged where they have no bound.
    """
    found = [
        *_find_in_fleet(snapshot),
        *_find_in_ranks(snapshot.engines),
        *_find_in_queue(snapshot),
        *_find_in_speed(snapshot),
        *_find_unusual(snapshot, points),
        *_find_errors(snapshot),
        *_find_refusals(snapshot),
    ]
    return tuple(sorted(found, key=lambda finding: _ORDER.index(finding.severity)))


@dataclass(frozen=True, slots=True)
class _Status:
    severity: Severity
    one: str
    several: str
    advice: str


# By the status of an engine; `ready` is none.
_STATUSES = {
    "unreachable": _Status(
        "error", "cannot be reached", "cannot be reached", "Does the process run? `moeserving status`, `logs`."
    ),
    "stalled": _Status(
        "error",
        "has requests and makes no steps",
        "have requests and make no steps",
        "An agent restarts it after ten minutes.",
    ),
    "ejected": _Status(
        "warning",
        "failed and gets no new requests for now",
        "failed and get no new requests for now",
        "See the log for the cause.",
    ),
    "failed": _Status(
        "error",
        "has failed and is started again",
        "have failed and are started again",
        "See the log: `moeserving logs`, `kubectl logs`.",
    ),
    "notReady": _Status("warning", "is not ready", "are not ready", "Starting, drained, or failed: `moeserving logs`."),
    "stopped": _Status(
        "info",
        "was drained and has ended",
        "were drained and have ended",
        "`moeserving drain ENGINE --undo` starts it again.",
    ),
    "starting": _Status("info", "starts", "start", ""),
    "draining": _Status(
        "info",
        "drains: it ends its streams and takes nothing new",
        "drain: they end their streams and take nothing new",
        "",
    ),
}


def _find_in_fleet(snapshot: LiveSnapshot) -> Iterator[PageFinding]:
    rows = snapshot.engines
    if snapshot.draining:
        yield PageFinding(kind="draining", severity="warning", message="This gateway stops and takes no new requests.")
    elif not rows:
        advice = "Look at the conditions: `kubectl describe moes NAME`, or `moeserving status`."
        yield PageFinding(kind="no_engine", severity="error", message="There is no engine.", advice=advice)
    elif not snapshot.accepting:
        message = "No engine takes requests: new ones are held here or refused."
        starts = {row.status for row in rows} <= {"starting", "notReady", "unreachable"}
        advice = "Normal while the first engines start." if starts else ""
        yield PageFinding(kind="none_accepts", severity="error", message=message, advice=advice)
    for status, row in _STATUSES.items():
        found = [each for each in rows if each.status == status]
        if names := _name(found):
            does = row.one if len({each.name for each in found}) == 1 else row.several
            distinct = dict.fromkeys(each.words for each in found if each.words)
            words = "; ".join(itertools.islice(distinct, _SHOWN_NAMES))
            message = f"{names} {does}{f': {words}' if words else ''}."
            yield PageFinding(kind=f"engine_{status}", severity=row.severity, message=message, advice=row.advice)


def _find_in_ranks(rows: Sequence[EngineRow]) -> Iterator[PageFinding]:
    ready = [row for row in rows if row.status == "ready"]
    if names := _name(row for row in ready if row.signal_source == "in_flight"):
        message = f"No fresh signals of {names}: only this gateway's own requests count in the choice there."
        yield PageFinding(kind="stale_signals", severity="warning", message=message, advice="Is the node overloaded?")
    if names := _name(row for row in ready if (row.kv_usage or 0.0) >= FULL_KV):
        message = f"KV blocks of {names} are nearly all in use: requests wait for blocks or are preempted."
        advice = "More engines, more KV memory, or shorter contexts."
        yield PageFinding(kind="kv_full", severity="warning", message=message, advice=advice)
    if names := _name(row for row in ready if row.ttft_factor >= SLOW_FACTOR):
        message = f"First tokens of {names} take at least {SLOW_FACTOR:g} times as long as its step times predict."
        yield PageFinding(kind="slow_engine", severity="info", message=message, advice="Is its processor shared?")
    uneven = [row for row in ready if row.expert_balance >= UNEVEN_EXPERTS]
    if names := _name(uneven):
        worst = max(row.expert_balance for row in uneven)
        message = f"Experts of {names} are uneven: the busiest rank has {worst:.2f} times the mean."
        advice = "Where, and why they stay: `moeserving experts show`. Mode `active` alone moves them."
        yield PageFinding(kind="uneven_experts", severity="info", message=message, advice=advice)


def _find_in_queue(snapshot: LiveSnapshot) -> Iterator[PageFinding]:
    held = snapshot.point.held
    if not held:
        return
    oldest_s = max((row.oldest_s for row in snapshot.held), default=0.0)
    if held >= NEAR_LIMIT * snapshot.hold_limit:
        message = f"The hold queue has {held} of at most {snapshot.hold_limit} requests; beyond that they are refused."
        advice = "More engines; `gateway.hold.requests` is the limit."
        yield PageFinding(kind="hold_queue_full", severity="error", message=message, advice=advice)
    elif oldest_s >= NEAR_LIMIT * snapshot.hold_timeout_s:
        message = f"A request is held for {oldest_s:.0f} s; after {snapshot.hold_timeout_s:.0f} s it is refused."
        yield PageFinding(kind="held_long", severity="error", message=message, advice="More engines are needed.")
    elif snapshot.accepting:
        message = f"{held} requests are held: every engine that could take them is saturated."
        yield PageFinding(kind="saturated", severity="warning", message=message, advice="More engines help.")


def _find_in_speed(snapshot: LiveSnapshot) -> Iterator[PageFinding]:
    point = snapshot.point
    rows = (
        ("ttft", "Time to first token", point.ttft_s, snapshot.ttft_target_s),
        ("step", "Time between tokens", point.step_s, snapshot.step_target_s),
    )
    for kind, title, value_s, target_s in rows:
        if value_s is not None and target_s is not None and value_s > target_s:
            message = f"{title} is over its bound: {value_s * 1e3:.0f} ms, bound {target_s * 1e3:.0f} ms."
            advice = "The fleet is too small for this load, or the bound too strict."
            yield PageFinding(kind=f"{kind}_over_bound", severity="warning", message=message, advice=advice)


def _find_unusual(snapshot: LiveSnapshot, points: Sequence[TimePoint]) -> Iterator[PageFinding]:
    """Times without a bound that are far above what they were in the minutes before, as this page knows them."""
    if snapshot.ttft_target_s is None:
        known = [(point.at_s, point.ttft_s) for point in points if point.ttft_s is not None]
        yield from _judge_usual("ttft", "First tokens take", known, snapshot.at_s)
    if snapshot.step_target_s is None:
        known = [(point.at_s, point.step_s) for point in points if point.step_s is not None]
        yield from _judge_usual("step", "Tokens come", known, snapshot.at_s)


def _judge_usual(kind: str, title: str, known: Sequence[tuple[float, float]], now_s: float) -> Iterator[PageFinding]:
    recent = list(itertools.takewhile(lambda row: now_s - row[0] < RECENT_S, reversed(known)))
    before = len(known) - len(recent)
    if len(recent) < LEAST_RECENT or before < LEAST_BEFORE:
        return
    present_s = statistics.median(value for _, value in recent)
    if present_s <= LEAST_EXCESS_S[kind]:
        return
    usual_s = sorted(value for _, value in known[:before])[math.ceil(USUAL_PART * before) - 1]
    if present_s > max(UNUSUAL_FACTOR * usual_s, usual_s + LEAST_EXCESS_S[kind]):
        minutes = max(1, round((now_s - known[0][0]) / 60))
        message = (
            f"{title} longer than usual here: {present_s * 1e3:.0f} ms of late, and in nine of ten seconds of the last "
            f"{minutes} min at most {usual_s * 1e3:.0f} ms."
        )
        advice = "No bound is set, so this is compared with the past alone; `scheduling.engine.targets` sets one."
        yield PageFinding(kind=f"{kind}_unusual", severity="info", message=message, advice=advice)


def _find_errors(snapshot: LiveSnapshot) -> Iterator[PageFinding]:
    ended = [row.record for row in snapshot.newest if row.record.status is not None]
    failed = [record for record in ended if (record.status or 0) >= 500]
    if failed:
        cause = failed[0].problem or f"status {failed[0].status}"
        message = f"{len(failed)} of the newest {len(ended)} requests failed, the last with {cause}."
        yield PageFinding(
            kind="failed_requests", severity="warning", message=message, advice="Why: `moeserving explain REQUEST_ID`."
        )


# Where to look, by the status of most refusals.
_REFUSALS = {
    401: "Is the key right? `gateway.auth` has the known ones.",
    403: "Is the key right? `gateway.auth` has the known ones.",
    404: "Are the path and the name of the model right? Served here: {}.",
    429: "A quota of the tenant, or the hold queue, is full: `Retry-After` says when to come again.",
}


def _find_refusals(snapshot: LiveSnapshot) -> Iterator[PageFinding]:
    """Where more than half of all requests were refused: few among many are faults of single clients."""
    requests, refused = snapshot.requests, snapshot.refused
    if 2 * refused > requests:
        noun = "request" if requests == 1 else "requests"
        were = "was" if refused == 1 else "were"
        said = f"{refused} of {requests} {noun} since the gateway's start {were} refused"
        message = f"{said}, most with {snapshot.refused_status}."
        advice = _REFUSALS.get(snapshot.refused_status, "The text of the answer says why.")
        advice = advice.format(", ".join(snapshot.models[:_SHOWN_NAMES]))
        yield PageFinding(kind="refused_requests", severity="warning", message=message, advice=advice)


def _name(rows: Iterable[EngineRow]) -> str:
    names = list(dict.fromkeys(row.name for row in rows))
    more = f" and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else ""
    return ", ".join(names[:_SHOWN_NAMES]) + more
