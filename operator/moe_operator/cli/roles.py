"""`moeserving roles`: which engines compute prompts and which answers, and how often requests were split."""

import asyncio
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import aiohttp
from moe_contract.clients import GatewayClient, PeerError
from moe_contract.gateway_state import GatewayState, SplitTotals, TargetReport
from rich.console import Group
from rich.table import Table
from rich.text import Text

from moe_operator.cli.gateways import ReachedGateways, reach_gateways
from moe_operator.cli.output import Output, OutputFormat, is_document, print_document, print_table
from moe_operator.cli.place import Context, Name, Namespace, StateDir, errors_shown
from moe_operator.local.failure import Failure


def roles(
    name: Name = None,
    state_dir: StateDir = None,
    namespace: Namespace = None,
    context: Context = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Show which engines compute prompts and which answers, transfers, fall-backs and changes."""
    with errors_shown(), reach_gateways(name, state_dir, namespace, context) as gateways:
        states = asyncio.run(fetch_states(gateways))
        if is_document(output):
            print_document(build_document(gateways.name, states), output)
        else:
            print_table(render_roles(gateways.name, states, wide=output is OutputFormat.WIDE))


async def fetch_states(gateways: ReachedGateways) -> list[GatewayState]:
    """The state of each gateway.

    Raises:
        Failure: one gives none.
    """
    async with aiohttp.ClientSession() as session:
        return list(await asyncio.gather(*(_fetch(session, url) for url in gateways.urls.values())))


async def _fetch(session: aiohttp.ClientSession, url: str) -> GatewayState:
    try:
        return await GatewayClient(session, url).state()
    except PeerError as error:
        raise Failure(f"the gateway at {url} {error}") from None


def sum_splits(states: Iterable[GatewayState]) -> SplitTotals | None:
    """The counters of all gateways together; None where no request is split. Pure."""
    found = [state.splits for state in states if state.splits is not None]
    if not found:
        return None
    fall_backs, changes = Counter[str](), Counter[str]()
    for row in found:
        fall_backs.update(row.fall_backs)
        changes.update(row.role_changes)
    return SplitTotals(
        transfers=sum(row.transfers for row in found), fall_backs=dict(fall_backs), role_changes=dict(changes)
    )


def build_document(name: str, states: Sequence[GatewayState]) -> dict[str, Any]:
    """The roles for programs. Pure."""
    splits = sum_splits(states)
    return {
        "name": name,
        "split": splits is not None,
        "engines": [
            {"name": row.name, "role": row.role or None, "accepting": row.accepting} for row in _engines(states)
        ],
        "transfers": None if splits is None else splits.transfers,
        "fallBacks": {} if splits is None else splits.fall_backs,
        "roleChanges": {} if splits is None else splits.role_changes,
    }


def render_roles(name: str, states: Sequence[GatewayState], *, wide: bool) -> Group:
    """The engines by role, and the sums since the gateways' starts. Pure."""
    splits, rows = sum_splits(states), _engines(states)
    if splits is None:
        words = "no request is split: every engine computes prompts and answers (spec.engine.roles)"
        return Group(Text.assemble((name, "bold"), f"  {words}"))
    counts = Counter(row.role for row in rows if row.role)
    roles_said = ", ".join(f"{count} {role}" for role, count in sorted(counts.items())) or "no engine takes part"
    if len(set(counts)) > 1 and len(states) > 1:
        roles_said += f" (as the first of {len(states)} gateways says)"
    return Group(
        Text.assemble((name, "bold"), f"  {roles_said}"),
        Text(f"{splits.transfers} transfers of KV blocks, {_describe('fall-backs', splits.fall_backs)}"),
        Text(_describe("changes of a role", splits.role_changes)),
        Text(),
        _render_engines(rows, wide=wide),
    )


def _describe(title: str, counts: dict[str, int]) -> str:
    reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(counts.items()))
    return f"{sum(counts.values())} {title}{f' ({reasons})' if reasons else ''}"


def _engines(states: Sequence[GatewayState]) -> list[TargetReport]:
    """The first rank of each engine, as the first gateway that knows it says."""
    rows = {row.name: row for state in reversed(states) for row in reversed(state.engines)}
    return [rows[name] for name in sorted(rows)]


def _render_engines(rows: Sequence[TargetReport], *, wide: bool) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for title in ("engine", "role", "takes requests"):
        table.add_column(title)
    for title in ("running", "waiting", *(("KV", "signal age") if wide else ())):
        table.add_column(title, justify="right")
    for row in rows:
        running, waiting = ("-", "-") if row.signal is None else (str(row.signal.running), str(row.signal.waiting))
        kv = "-" if row.signal is None else f"{row.signal.kv_usage:.0%}"
        age = "-" if row.signal_age_s is None else f"{row.signal_age_s:.1f} s"
        more = (kv, age) if wide else ()
        table.add_row(row.name, row.role or "-", "yes" if row.accepting else "no", running, waiting, *more)
    return table
