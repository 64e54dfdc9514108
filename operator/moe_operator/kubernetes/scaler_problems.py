"""Problems of the autoscaler of the gateways, which stand in the conditions of its HorizontalPodAutoscaler alone. Pure.

Without a metrics server, or without metrics of the pods, it changes nothing and says so there.
"""

from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Any

from moe_operator.api.reasons import Reason
from moe_operator.kubernetes.diagnosis import parse_time
from moe_operator.kubernetes.finding import Finding, build_finding
from moe_operator.kubernetes.workload_problems import component_of_workload

Document = dict[str, Any]
# The first metrics of a new pod come within a minute or two.
INACTIVE_FOR = timedelta(minutes=3)
_KINDS = ("AbleToScale", "ScalingActive")
# A number of zero was set by a person, and says that nothing is to be scaled.
_WANTED = "ScalingDisabled"
_ADVICE = "the number of gateways does not follow the load; does the cluster have a metrics server?"


def find_inactive_scalers(scalers: Iterable[Document], now: datetime) -> tuple[list[Finding], bool]:
    """The autoscalers that have not worked for `INACTIVE_FOR`, and whether one may become a finding by time alone."""
    found, is_waiting = [], False
    for live in scalers:
        row = _inactive(live)
        since = parse_time((row or {}).get("lastTransitionTime"))
        if row is None:
            continue
        if since is not None and now - since < INACTIVE_FOR:
            is_waiting = True
            continue
        where = f"HorizontalPodAutoscaler {live['metadata']['name']}"
        detail = ": ".join(filter(None, (row.get("reason"), row.get("message"))))
        component = component_of_workload(live)
        found.append(
            build_finding(Reason.GATEWAYS_NOT_SCALED, _ADVICE, where=where, detail=detail, component=component)
        )
    return found, is_waiting


def _inactive(live: Document) -> Document | None:
    """The first condition that says why it does not scale; None where it does."""
    rows = {row.get("type"): row for row in live.get("status", {}).get("conditions") or ()}
    said = (rows.get(kind) or {} for kind in _KINDS)
    return next((row for row in said if row.get("status") == "False" and row.get("reason") != _WANTED), None)
