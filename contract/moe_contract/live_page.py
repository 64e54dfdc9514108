"""The documents of the live page, `/ui` of the gateway's admin port: events of `GET /ui/events`.

The gateway writes them with `write_event`; the page reads them with the TypeScript types that `moe_contract.typescript`
generates from these classes. Times of day are seconds since the epoch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import orjson

from moe_contract.request_record import RequestRecord, TargetTerms

Severity = Literal["error", "warning", "info"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PageFinding:
    """Something that is not as it should be, or that explains what users see.

    Attributes:
        kind: what it is, such as `engine_unreachable`; equal for the same finding over time.
        severity: `error`: requests fail or wait for it; `warning`: users notice it or soon will; `info`: worth knowing.
        message: in words.
        advice: what to do about it.
    """

    kind: str
    severity: Severity
    message: str
    advice: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PageEvent:
    """A change that was seen while somebody watched.

    Attributes:
        at_s: when.
        message: in words.
        severity: of the change.
    """

    at_s: float
    message: str
    severity: Severity = "info"


@dataclass(frozen=True, slots=True, kw_only=True)
class TimePoint:
    """One second of the gateway.

    Attributes:
        at_s: its end.
        ttft_s: mean seconds to the first token of the streams whose first token came in it; None without one.
        ttft_p95_s: their 95th percentile, interpolated within the buckets of the gateway's histogram.
        step_s: mean seconds between the steps of ranks with requests, which is TPOT; None without a step.
        requests_per_s: requests that arrived for an engine.
        tokens_per_s: prompt and output tokens that the engines computed; None where none counts them.
        held: requests in the hold queue at its end.
        in_flight: requests at engines at its end.
    """

    at_s: float
    ttft_s: float | None = None
    ttft_p95_s: float | None = None
    step_s: float | None = None
    requests_per_s: float = 0.0
    tokens_per_s: float | None = None
    held: int = 0
    in_flight: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRow:
    """One data-parallel rank of one engine.

    Attributes:
        name: of the engine.
        rank: number of the rank.
        group: Service that it was found behind; empty for a fixed list.
        role: `unified`, `prefill` or `decode`; empty where no request is split.
        status: `ready`, `starting`, `failed` (its agent starts it again), `stopped` (drained), `draining`, `stalled`,
            `ejected`, `notReady`, `unreachable` (its source of signals).
        words: how far its start is, or how it ended last, as its agent says; empty in another status.
        in_flight: requests of this gateway there.
        running: requests in the engine's running set.
        waiting: requests in its waiting queue.
        waiting_prefill_tokens: prompt tokens of the waiting requests that have to be computed.
        kv_usage: used part of the KV blocks, 0 to 1; None without a signal.
        preemptions: since its start.
        step_s: mean seconds between its last steps, while requests run; None without.
        tokens_per_s: computed in the last second; None where it does not count them.
        signal_age_s: age of its newest signal; None without one.
        signal_source: `agent`, `scrape` or `in_flight`, the gateway's own accounting.
        ttft_factor: measured over predicted seconds to the first token, of late.
        expert_balance: tokens of the busiest rank of its experts over the mean; 1 without a group.
    """

    name: str
    rank: int = 0
    group: str = ""
    role: str = ""
    status: str = ""
    words: str = ""
    in_flight: int = 0
    running: int = 0
    waiting: int = 0
    waiting_prefill_tokens: int = 0
    kv_usage: float | None = None
    preemptions: int = 0
    step_s: float | None = None
    tokens_per_s: float | None = None
    signal_age_s: float | None = None
    signal_source: str = ""
    ttft_factor: float = 1.0
    expert_balance: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldGroup:
    """Held requests of one class and tenant.

    Attributes:
        priority: the class; lower is more urgent.
        tenant: its name where a key of the gateway names it, else the digest of the name, 8 hex digits, as in the ids
            that engines log; empty: the anonymous tenant.
        requests: held.
        prompt_tokens: of them.
        oldest_s: longest time that one of them has been without an engine.
    """

    priority: int
    tenant: str
    requests: int
    prompt_tokens: int
    oldest_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRow:
    """A request that is held, or one of the newest that were sent to an engine.

    Attributes:
        arrived_at_s: when it came.
        record: as `moeserving explain` shows it, each attempt without its terms.
        chosen: terms of the engine that it was sent to last; None where they were not recorded.
        other: terms of the best engine beside it; None without one.
        engines: engines whose terms were compared.
        held_s: seconds that it has been held until now; None where it is not.
    """

    arrived_at_s: float
    record: RequestRecord
    chosen: TargetTerms | None = None
    other: TargetTerms | None = None
    engines: int = 0
    held_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveSnapshot:
    """The event `snapshot`, once a second.

    Attributes:
        at_s: when it was made.
        pod: name of the gateway's pod; empty outside of a cluster.
        gateways: names of all gateways of the deployment that are ready; empty where they are not known.
        models: names that can be asked for.
        accepting: whether a new request can be sent to an engine.
        draining: whether the gateway stops.
        hold_limit: most requests that are held.
        hold_timeout_s: longest time that one is held.
        wait_s: least predicted wait of a new request; None without an engine.
        ttft_target_s: bound on the time to the first token; None without one.
        step_target_s: bound on the time between tokens; None without one.
        policy: choice of the engine.
        order: order of the queues.
        requests: that ended since the gateway's start.
        failed: of them, those that ended with an error.
        refused: of them, those that were refused (status 400 to 498): the fault of the request, or a limit.
        refused_status: the status of most of those; 0 without one.
        retried: sent to a second engine.
        point: the last second.
        engines: one row for each rank.
        held: the hold queue, the longest wait first.
        newest: first the requests that are held for longest, then the newest ones, the newest first.
        findings: the worst first.
        events: changes while somebody watched, the newest first.
    """

    at_s: float
    pod: str = ""
    gateways: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    accepting: bool = False
    draining: bool = False
    hold_limit: int = 0
    hold_timeout_s: float = 0.0
    wait_s: float | None = None
    ttft_target_s: float | None = None
    step_target_s: float | None = None
    policy: str = ""
    order: str = ""
    requests: int = 0
    failed: int = 0
    refused: int = 0
    refused_status: int = 0
    retried: int = 0
    point: TimePoint
    engines: tuple[EngineRow, ...] = ()
    held: tuple[HeldGroup, ...] = ()
    newest: tuple[RequestRow, ...] = ()
    findings: tuple[PageFinding, ...] = ()
    events: tuple[PageEvent, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertMove:
    """One decision about the placement of experts.

    Attributes:
        number: counted from the engine's start.
        at_s: when.
        outcome: `moved`, `stayed`, `dryRun`, `rolledBack`, `applied` or `failed`.
        reason: in words.
        moves: experts moved, or that would move.
        predicted_gain_s: step time that it should save.
        measured_gain_s: step time that it saved; None before it was measured.
        cost_s: seconds that moving took.
        balance_before: busiest rank over the mean before.
        balance_after: the same after.
    """

    number: int
    at_s: float
    outcome: str
    reason: str = ""
    moves: int = 0
    predicted_gain_s: float | None = None
    measured_gain_s: float | None = None
    cost_s: float | None = None
    balance_before: float | None = None
    balance_after: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsSnapshot:
    """The event `experts`: those of one engine, when they have changed.

    Attributes:
        engine: its name.
        problem: why there is nothing to show; empty where there is.
        mode: `off`, `observe`, `dryRun` or `active`.
        ranks: of the group.
        layers: with experts.
        experts: logical experts of a layer.
        version: of the placement.
        steps: of the window of the load.
        heat_unit: load over the mean for which one step of a byte of `by_expert` and `by_rank` stands.
        by_expert: base64 of a byte for each [layer, expert]: load over the mean of the layer, in units; 255 is more.
        by_rank: the same for each [layer, rank].
        balance: busiest rank over the mean, over all layers; None before a load was recorded.
        layer_balance: the same of each layer.
        decisions: the newest first.
        moved: experts moved since the engine's start.
        won_s: time that moves saved, as measured.
        lost_s: time that moving took.
        problems: present obstacles to balancing the experts.
    """

    engine: str
    problem: str = ""
    mode: str = ""
    ranks: int = 0
    layers: int = 0
    experts: int = 0
    version: int = 0
    steps: float = 0.0
    heat_unit: float = 0.0
    by_expert: str = ""
    by_rank: str = ""
    balance: float | None = None
    layer_balance: tuple[float, ...] = ()
    decisions: tuple[ExpertMove, ...] = ()
    moved: int = 0
    won_s: float = 0.0
    lost_s: float = 0.0
    problems: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """The event `history`, the first of a stream.

    Attributes:
        points: the seconds before, the oldest first; some may be missing.
    """

    points: tuple[TimePoint, ...] = field(default=())


EVENTS: Mapping[str, type] = {"history": History, "snapshot": LiveSnapshot, "experts": ExpertsSnapshot}
_NAMES = {document: name for name, document in EVENTS.items()}


def write_event(document: Any) -> bytes:
    """The server-sent event of one of the documents in `EVENTS`."""
    return b"event: %b\ndata: %b\n\n" % (_NAMES[type(document)].encode(), orjson.dumps(document))
