"""All checks of a cluster, in the order in which a person would look, and the report for people and for programs."""

from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

from moe_contract.api_server import NOT_FOUND, ApiError, Document
from rich.table import Table
from rich.text import Text

from moe_operator.doctor.check import Check, CheckState, note, ok, problem
from moe_operator.doctor.control_plane import (
    check_deployments,
    check_lead,
    check_reachable,
    check_scope,
    check_version,
    is_reachable,
)
from moe_operator.doctor.crd import check_crd
from moe_operator.doctor.engine_options import check_options
from moe_operator.doctor.fetch import ClusterView
from moe_operator.doctor.rights import check_right
from moe_operator.doctor.within import check_dns, check_images, check_prometheus
from moe_operator.doctor.workloads import OPTIONAL, check_devices, check_kind, check_nodes, check_serving
from moe_operator.kubernetes.kinds import SERVING

_COLOURS = {CheckState.OK: "green", CheckState.NOTE: "yellow", CheckState.PROBLEM: "red"}


def check_no_cluster(reason: str, *, asked: bool) -> Check:
    """The cluster that cannot be asked: a problem only where one is configured or was named."""
    if not asked:
        return note("cluster", f"none is configured, so this machine alone is looked at: {reason}")
    return problem("cluster", reason, "correct KUBECONFIG, or name a --context of it; --local needs none")


def check_kubectl(path: str | None) -> Check:
    """Whether kubectl is there: the other commands reach pods through it."""
    if path is None:
        finding = "not found on PATH; `moeserving experts`, `explain` and `ui` reach a cluster's pods through it"
        return note("kubectl", finding, "install it (kubernetes.io/docs/tasks/tools)")
    return ok("kubectl", path)


def check_cluster(view: ClusterView, now: datetime) -> list[Check]:
    """Every check of a cluster; only the first where it cannot be reached."""
    checks = [check_reachable(view.source, view.version)]
    if not is_reachable(view.version):
        return checks
    served = view.kinds[SERVING]
    servings: Sequence[Document] = () if isinstance(view.servings, ApiError) else view.servings
    checks += [check_version(view.version), check_crd(view.crd, served)]
    checks += _check_operators(view, now)
    checks += [check_right(right, view.namespace, allowed) for right, allowed in view.rights.items()]
    checks += [check_kind(kind, view.kinds[kind], servings) for kind in OPTIONAL]
    checks += check_nodes(view.nodes)
    if not isinstance(view.nodes, ApiError):
        checks.append(check_devices(view.nodes, servings))
    checks += [check_images(view.pods), check_dns(view.dns_pods), *check_prometheus(servings)]
    return checks + check_options(servings) + _check_servings(view, now)


def _check_operators(view: ClusterView, now: datetime) -> list[Check]:
    checks = check_deployments(view.deployments)
    checks += [check_lead(row.deployment, row.lease, row.pods, now) for row in view.control_planes]
    leases = [row.lease for row in view.control_planes if not isinstance(row.lease, ApiError)]
    return [*checks, check_scope(view.namespace, leases)] if leases else checks


def _check_servings(view: ClusterView, now: datetime) -> list[Check]:
    name = f"MoEServings in {view.namespace}"
    if isinstance(view.servings, ApiError):
        return [] if view.servings.status == NOT_FOUND else [note(name, f"not known: {view.servings}")]
    if not view.servings:
        return [ok(name, "there are none")]
    return [check for document in view.servings for check in check_serving(document, now)]


def render_table(checks: Iterable[Check]) -> Table:
    """One row a check; below what is not well, what to do."""
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    for column in ("state", "check", "finding"):
        table.add_column(column, overflow="fold", no_wrap=column == "state")
    for check in checks:
        table.add_row(Text(check.state, style=_COLOURS[check.state]), Text(check.name), Text(check.finding))
        if check.advice:
            table.add_row("", "", Text(f"-> {check.advice}", style="bold"))
    return table


def build_report(checks: Sequence[Check]) -> dict[str, Any]:
    """The report for programs, as a document."""
    rows = [
        {"check": row.name, "state": row.state, "finding": row.finding, "advice": row.advice or None} for row in checks
    ]
    return {"problems": count_states(checks)[CheckState.PROBLEM], "checks": rows}


def render_sum(checks: Iterable[Check]) -> str:
    """The last line, such as `2 problems, 1 note`."""
    found = count_states(checks)
    words = [
        f"{found[state]} {state}{'' if found[state] == 1 else 's'}"
        for state in (CheckState.PROBLEM, CheckState.NOTE)
        if found[state]
    ]
    return ", ".join(words) if found[CheckState.PROBLEM] else ", ".join(["no problem", *words])


def count_states(checks: Iterable[Check]) -> Counter[CheckState]:
    """How many checks ended how."""
    return Counter(check.state for check in checks)
