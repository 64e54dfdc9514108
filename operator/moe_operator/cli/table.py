"""A deployment as a table. Pure."""

from collections import Counter
from collections.abc import Sequence

from moe_contract.gateway_state import SplitTotals, TargetReport
from rich.console import Group
from rich.table import Table
from rich.text import Text

from moe_operator.api.status import Condition, ConditionStatus, EnginePhase, EngineStatus, Status
from moe_operator.experts.report import judge_experts
from moe_operator.local.observation import Observation
from moe_operator.local.traffic import Throughput
from moe_operator.starting import describe_phase
from moe_operator.targets.report import CONDITION as TARGETS_MET

_COLOURS = {EnginePhase.READY: "green", EnginePhase.BACKOFF: "red", EnginePhase.UNKNOWN: "red"}


def render_status(seen: Observation, status: Status, *, throughput: Throughput | None = None) -> Group:
    """The whole status; `throughput` is that of the last seconds, given while the status is watched."""
    lines = [
        Text.assemble((seen.record.name, "bold"), f"  {status.endpoint}  model {seen.record.served_name}"),
        _render_ready(status),
        Text(render_policies(status)),
        *(Text(render_targets(row)) for row in status.conditions if row.type == TARGETS_MET),
        *([Text(render_experts(status))] if status.experts.mode is not None else []),
    ]
    return Group(*lines, render_engines(status.engines), render_processes(seen), Text(render_traffic(seen, throughput)))


def render_engines(engines: Sequence[EngineStatus]) -> Table:
    """The engines, one in each row of a table."""
    apart = any(engine.role is not None for engine in engines)
    table = _table(
        "engine", "phase", *(("role",) if apart else ()), "running", "waiting", "KV use", "restarts", "last exit"
    )
    for engine in engines:
        troubles = "".join(f", rank {row.rank}: {row.trouble}" for row in engine.troubled_ranks)
        phase = Text(
            f"{describe_phase(engine)}{troubles}", style="red" if troubles else _COLOURS.get(engine.phase, "yellow")
        )
        numbers = (str(engine.running), str(engine.waiting), f"{engine.kv_usage:.0%}", str(engine.restarts))
        role = (str(engine.role or "-"),) if apart else ()
        table.add_row(engine.name, phase, *role, *numbers, Text(engine.last_exit))
    return table


def render_processes(seen: Observation) -> Table:
    """One row a supervised process."""
    table = _table("process", "life", "pid", "answers at", "restarts", "last exit")
    for row in seen.record.processes:
        pid = str(row.process.pid) if row.process else "-"
        table.add_row(row.name, str(row.life), pid, row.url, str(row.restarts), Text(row.last_exit))
    return table


def render_policies(status: Status) -> str:
    """`request order sjf, engine choice predicted`."""
    policies = status.policies
    return f"request order {policies.request or 'unknown'}, engine choice {policies.engine or 'unknown'}"


def render_experts(status: Status) -> str:
    """`experts: mode dryRun, not balanced: …`."""
    experts = status.experts
    state, _, message = judge_experts(experts, has_group=True, before=None)
    word = {ConditionStatus.TRUE: "balanced", ConditionStatus.FALSE: "not balanced"}.get(state, "balance unknown")
    return f"experts: mode {experts.mode}, {word}: {message}"


def render_targets(condition: Condition) -> str:
    """The condition in one line, such as `targets missed: ttft: …`."""
    word = {ConditionStatus.TRUE: "kept", ConditionStatus.FALSE: "missed"}.get(condition.status, "unknown")
    return f"targets {word}: {condition.message}"


def render_traffic(seen: Observation, throughput: Throughput | None) -> str:
    """Counts of the requests through the gateway as text."""
    if seen.gateway is None:
        return "requests: the gateway gives no answer"
    totals = seen.gateway.totals
    counts = f"{totals.requests} ended, {totals.failed} failed, {totals.retried} retried"
    flying = sum(engine.in_flight for engine in seen.gateway.engines)
    line = f"requests: {_render_pace(throughput)}{flying} in flight, {seen.gateway.held} held, {counts}"
    return (
        line if seen.gateway.splits is None else f"{line}\n{_render_splits(seen.gateway.splits, seen.gateway.engines)}"
    )


def _render_splits(splits: SplitTotals, engines: Sequence[TargetReport]) -> str:
    """`prefill and decode apart: 12 transfers, 1 fall-backs (decode_error 1), 0 role changes, 1 prefill and …`."""
    reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(splits.fall_backs.items()))
    roles = Counter({row.name: row.role for row in engines if row.role}.values())
    counts = " and ".join(f"{count} {role}" for role, count in sorted(roles.items())) or "no engine takes part"
    fall_backs = f"{sum(splits.fall_backs.values())} fall-backs{f' ({reasons})' if reasons else ''}"
    changes = sum(splits.role_changes.values())
    return f"prefill and decode apart: {splits.transfers} transfers, {fall_backs}, {changes} role changes, {counts}"


def _render_pace(throughput: Throughput | None) -> str:
    if throughput is None:
        return ""
    ttft = "" if throughput.ttft_mean_s is None else f"TTFT {throughput.ttft_mean_s:.3f} s (mean), "
    return f"{throughput.requests_per_s:.1f}/s, {ttft}"


def _render_ready(status: Status) -> Text:
    condition = status.conditions[0]
    colour = "green" if condition.status is ConditionStatus.TRUE else "yellow"
    word = "ready" if condition.status is ConditionStatus.TRUE else "not ready"
    return Text.assemble(
        (word, colour), f" since {condition.last_transition_time:%Y-%m-%d %H:%M:%S} UTC: {condition.message}"
    )


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in _NUMBERS else "left", overflow="fold")
    return table


_NUMBERS = {"running", "waiting", "KV use", "restarts", "pid"}
