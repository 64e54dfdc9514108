"""Whether the API server answers and is new enough, and whether an operator works there."""

import re
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from moe_contract.api_server import NOT_FOUND, ApiError, Document

from moe_operator.doctor.check import Check, note, ok, problem
from moe_operator.kubernetes.rivals import SERVES, overlaps

# As `kubeVersion` of the chart.
LEAST_KUBERNETES = (1, 30)
# What the chart gives the operator's Deployment and its pods.
SELECTOR = "app.kubernetes.io/name=moeserving,app.kubernetes.io/component=operator"
UNAUTHORIZED = 401
# Clocks of this machine and of the operator's node may differ by so much.
CLOCK_SKEW = timedelta(seconds=60)
_CHECK = "operator"
_INSTALL = (
    "install the chart: `helm install moeserving charts/moeserving --namespace moeserving-system --create-namespace` "
    "(docs/install.md)"
)


def is_reachable(version: Document | ApiError) -> bool:
    """Whether further questions to this API server can be answered."""
    return not isinstance(version, ApiError) or version.status not in (0, UNAUTHORIZED)


def check_reachable(source: str, version: Document | ApiError) -> Check:
    """Whether the API server answers."""
    name = "API server"
    if not isinstance(version, ApiError):
        return ok(name, f"answers; {source}")
    if version.status == UNAUTHORIZED:
        finding = f"refuses the credentials of {source}: {version}"
        return problem(name, finding, "log in again, or name another --context")
    if not version.status:
        advice = (
            "check that the cluster runs, the network and its VPN or proxy; or name another --context or KUBECONFIG"
        )
        return problem(name, f"does not answer; {source}: {version}", advice)
    return note(name, f"answers, but not to /version; {source}: {version}")


def check_version(version: Document | ApiError) -> Check:
    """Whether the chart supports this Kubernetes."""
    name, least = "Kubernetes", ".".join(map(str, LEAST_KUBERNETES))
    if isinstance(version, ApiError):
        return note(name, f"version not known: {version}")
    found = re.match(r"v?(\d+)\.(\d+)", str(version.get("gitVersion", "")))
    if found is None:
        return note(name, f"version not known: {version.get('gitVersion')}")
    if (int(found[1]), int(found[2])) < LEAST_KUBERNETES:
        return problem(name, f"{version['gitVersion']}; at least {least} is needed", f"upgrade the cluster to {least}")
    return ok(name, f"{version['gitVersion']}; at least {least} is needed")


def check_deployments(deployments: Sequence[Document] | ApiError) -> list[Check]:
    """Whether each operator has ready pods."""
    if isinstance(deployments, ApiError):
        return [note(_CHECK, f"not known: {deployments}", "ask somebody who may list Deployments of all namespaces")]
    if not deployments:
        return [problem(_CHECK, "the cluster has no Deployment of the operator", _INSTALL)]
    return [_check_deployment(row) for row in deployments]


def _check_deployment(deployment: Document) -> Check:
    name, namespace = deployment["metadata"]["name"], deployment["metadata"]["namespace"]
    wanted = deployment.get("spec", {}).get("replicas", 1)
    ready = deployment.get("status", {}).get("readyReplicas", 0)
    finding = f"{namespace}/{name}: {ready} of {wanted} pods are ready"
    if not wanted:
        return problem(_CHECK, finding, f"`kubectl -n {namespace} scale deployment {name} --replicas=1`")
    if ready:
        return ok(_CHECK, finding) if ready >= wanted else note(_CHECK, finding)
    advice = f"`kubectl -n {namespace} describe pods -l {SELECTOR}` and `kubectl -n {namespace} logs deployment/{name}`"
    return problem(_CHECK, finding, advice)


def check_lead(
    deployment: Document, lease: Document | ApiError, pods: Sequence[Document] | ApiError, now: datetime
) -> Check:
    """Whether one of the operator's pods leads: it holds the Lease and renews it.

    Args:
        deployment: of the operator; the chart gives its Lease the same name.
        lease: of that name.
        pods: of the operator.
        now: with a time zone.
    """
    name = "operator's lead"
    place = f"{deployment['metadata']['namespace']}/{deployment['metadata']['name']}"
    namespace, _, deployed = place.partition("/")
    advice = f"`kubectl -n {namespace} logs deployment/{deployed}` says why it does not lead"
    if isinstance(lease, ApiError):
        finding = f"the Lease {place} cannot be read: {lease}"
        return problem(name, finding, advice) if lease.status == NOT_FOUND else note(name, finding)
    holder = str(lease.get("spec", {}).get("holderIdentity") or "")
    if not holder:
        return problem(name, f"nobody holds the Lease {place}", advice)
    if not isinstance(pods, ApiError) and holder not in {row["metadata"]["name"] for row in pods}:
        return problem(name, f"{holder}, which holds the Lease {place}, is no pod of the operator", advice)
    if (age := age_of(lease, now)) is not None and age > _term(lease) + CLOCK_SKEW:
        return problem(name, f"{holder} has not renewed the Lease {place} for {age.total_seconds():.0f} s", advice)
    return ok(name, f"{holder} leads")


def check_scope(namespace: str, leases: Sequence[Document]) -> Check:
    """Whether an operator serves the namespace, by the Leases that could be read."""
    scopes = [str((row["metadata"].get("annotations") or {}).get(SERVES, "*")) for row in leases]
    if any(overlaps(scope, namespace) for scope in scopes):
        return ok("operator's namespaces", f"{namespace} is served")
    served = ", ".join(scopes)
    advice = f"add {namespace} to `watchNamespaces` of the chart, or use a namespace that is served"
    return problem("operator's namespaces", f"no operator serves {namespace}; served: {served}", advice)


def age_of(lease: Mapping[str, Any], now: datetime) -> timedelta | None:
    """The time since the Lease was renewed; None where it says nothing that can be read."""
    try:
        renewed = datetime.fromisoformat(str(lease["spec"]["renewTime"]))
        return now - renewed
    except (KeyError, TypeError, ValueError):
        return None


def _term(lease: Mapping[str, Any]) -> timedelta:
    return timedelta(seconds=float(lease["spec"].get("leaseDurationSeconds") or 0))
