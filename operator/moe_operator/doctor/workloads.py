"""Kinds that a cluster may lack, its nodes, and the MoEServings of a namespace."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from moe_contract.api_server import ApiError, Document, Kind

from moe_operator.api.engine import Runtime
from moe_operator.api.status import ConditionStatus
from moe_operator.doctor.check import Check, note, ok, problem
from moe_operator.kubernetes.conditions import READY, is_bad, read_conditions
from moe_operator.kubernetes.kinds import INFERENCE_POOL, LEADER_WORKER_SET, POD_MONITOR, SERVICE_MONITOR

OPTIONAL = (LEADER_WORKER_SET, INFERENCE_POOL, SERVICE_MONITOR, POD_MONITOR)
# Time in which an operator has looked at a new resource.
SEEN_WITHIN = timedelta(minutes=2)
_USES = {
    LEADER_WORKER_SET.name: (
        "engines on several nodes (`engine.parallelism.nodes` above 1)",
        "install LeaderWorkerSet (lws.sigs.k8s.io)",
    ),
    INFERENCE_POOL.name: (
        "`gateway.inferencePool`",
        "install the Gateway API Inference Extension (gateway-api-inference-extension.sigs.k8s.io)",
    ),
    SERVICE_MONITOR.name: (
        "metrics of engines (`metrics.serviceMonitor`)",
        "for metrics install the Prometheus operator, or scrape the agents yourself; all else works",
    ),
    POD_MONITOR.name: (
        "metrics of gateways (`metrics.serviceMonitor`)",
        "for metrics install the Prometheus operator, or scrape the gateways yourself; all else works",
    ),
}
# Made by default, where the cluster has them.
_DISPENSABLE = (SERVICE_MONITOR, POD_MONITOR)
_DEVICE = re.compile(r"^[^/]+/(.*gpu.*|tpu|mig-.+|neuron.*|gaudi|i915|xe)$")
_DEFAULT_DEVICE = "nvidia.com/gpu"


def check_kind(kind: Kind, present: bool | ApiError, servings: Sequence[Document]) -> Check:
    """Whether the cluster has an optional kind; a problem only where a resource does not work without it."""
    use, advice = _USES[kind.name]
    if isinstance(present, ApiError):
        return note(kind.name, f"not known: {present}; needed for {use}")
    users = [row["metadata"]["name"] for row in servings if needs_kind(kind, row.get("spec", {}))]
    if present:
        return ok(kind.name, f"there; for {use}")
    if users and kind in _DISPENSABLE:
        return note(kind.name, f"absent; it is for {use}", advice)
    if users:
        return problem(kind.name, f"absent, and {', '.join(users)} needs it; it is for {use}", advice)
    return ok(kind.name, f"absent, and nothing here needs it; it is for {use}")


def needs_kind(kind: Kind, spec: Mapping[str, Any]) -> bool:
    """Whether a resource needs an optional kind."""
    if kind == LEADER_WORKER_SET:
        return int(_section(spec, "engine", "parallelism").get("nodes") or 1) > 1
    if kind == INFERENCE_POOL:
        return _section(spec, "gateway").get("inferencePool") is not None
    return _section(spec, "metrics").get("serviceMonitor") is True


def check_nodes(nodes: Sequence[Document] | ApiError) -> list[Check]:
    """Whether the cluster has nodes that are ready."""
    if isinstance(nodes, ApiError):
        return [note("nodes", f"not known: {nodes}", "ask somebody who may list nodes: `kubectl get nodes`")]
    if not nodes:
        return [problem("nodes", "the cluster has none", "add nodes; no pod can run")]
    lost = sorted(row["metadata"]["name"] for row in nodes if not _is_ready(row))
    if lost:
        finding = f"{len(lost)} of {len(nodes)} are not ready: {_few(lost)}"
        return [problem("nodes", finding, f"`kubectl describe node {lost[0]}` says why")]
    cordoned = sorted(row["metadata"]["name"] for row in nodes if row.get("spec", {}).get("unschedulable"))
    closed = f"; closed for new pods (cordoned): {_few(cordoned)}" if cordoned else ""
    return [(note if cordoned else ok)("nodes", f"{len(nodes)} are ready{closed}")]


def check_devices(nodes: Sequence[Document], servings: Sequence[Document]) -> Check:
    """GPUs that nodes offer, by the name of the resource, and whether the resources here find theirs."""
    offered = count_devices(nodes)
    wanted: dict[str, list[str]] = {}
    for row in servings:
        if (device := device_of(row.get("spec", {}))) is not None:
            wanted.setdefault(device, []).append(row["metadata"]["name"])
    listed = ", ".join(f"{count} {name}" for name, count in sorted(offered.items())) or "no node offers any"
    if missing := {device: users for device, users in wanted.items() if not offered.get(device)}:
        finding = "; ".join(f"{', '.join(users)} needs {device}" for device, users in sorted(missing.items()))
        advice = (
            "install the device plugin of the GPUs' maker, or correct `engine.resources.gpuResource`; "
            "`engine.runtime: vllm-cpu` needs no GPU"
        )
        return problem("GPUs", f"{listed}, and {finding}", advice)
    if not offered:
        return note("GPUs", listed, "only `engine.runtime: vllm-cpu` runs here; GPUs need their maker's device plugin")
    return ok("GPUs", f"allocatable: {listed}")


def count_devices(nodes: Sequence[Document]) -> Counter[str]:
    """Allocatable GPUs of the nodes that are ready, by the name of their resource."""
    found: Counter[str] = Counter()
    for row in filter(_is_ready, nodes):
        for name, amount in (row.get("status", {}).get("allocatable") or {}).items():
            if _DEVICE.match(name) and str(amount).isdigit() and int(amount):
                found[name] += int(amount)
    return found


def device_of(spec: Mapping[str, Any]) -> str | None:
    """The resource that the engines ask nodes for; None on CPUs, and where none should run."""
    engine = _section(spec, "engine")
    if engine.get("runtime") == Runtime.VLLM_CPU or engine.get("replicas") == 0:
        return None
    return str(_section(engine, "resources").get("gpuResource") or _DEFAULT_DEVICE)


def check_serving(document: Document, now: datetime) -> list[Check]:
    """The conditions of a resource that need a person to act, one check each."""
    name = f"MoEServing {document['metadata']['name']}"
    conditions = read_conditions(document)
    if not conditions:
        return [_check_unseen(name, document, now)]
    page = "docs/troubleshooting.md"
    bad = [
        problem(name, f"{row.type}: {row.reason}: {row.message}", f"the message, and `{row.reason}` in {page}")
        for row in conditions.values()
        if is_bad(row)
    ]
    if bad:
        return bad
    ready = conditions.get(READY)
    if ready is None or ready.status is not ConditionStatus.TRUE:
        why = f"{ready.reason}: {ready.message}" if ready else "no condition `Ready`"
        return [note(name, f"not ready: {why}", f"wait; `kubectl describe moes {document['metadata']['name']}`")]
    return [ok(name, f"{ready.reason}: {ready.message}")]


def _check_unseen(name: str, document: Document, now: datetime) -> Check:
    created = datetime.fromisoformat(document["metadata"]["creationTimestamp"])
    if now - created < SEEN_WITHIN:
        return note(name, "new; no operator has looked at it yet")
    finding = f"no operator has looked at it since {created:%Y-%m-%d %H:%M} UTC"
    return problem(name, finding, "see the lines of the operator above: it must run, lead and serve this namespace")


def _is_ready(node: Document) -> bool:
    rows = node.get("status", {}).get("conditions") or []
    return any(row.get("type") == "Ready" and row.get("status") == "True" for row in rows)


def _section(spec: Mapping[str, Any], *path: str) -> Mapping[str, Any]:
    """A section of a resource as it was written; empty where it is absent."""
    for word in path:
        spec = spec.get(word) or {}
    return spec


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
