"""Reads from the API server everything that the checks look at; a refused call is kept as an answer."""

import asyncio
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from moe_contract.api_server import NOT_FOUND, ApiError, ApiServer, Document, Kind

from moe_operator.doctor.control_plane import SELECTOR, is_reachable
from moe_operator.doctor.crd import CRD, NAME
from moe_operator.doctor.rights import REVIEW, RIGHTS, Right, review_of
from moe_operator.doctor.within import DNS_NAMESPACE, DNS_SELECTOR
from moe_operator.doctor.workloads import OPTIONAL
from moe_operator.kubernetes.kinds import DEPLOYMENT, LEASE, POD, SERVING
from moe_operator.plan.names import MANAGED_BY, MANAGER

NODE = Kind("", "v1", "Node", "nodes", namespaced=False)
Answer = TypeVar("Answer")
Documents = Sequence[Document] | ApiError


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlPlane:
    """An operator's Deployment, the Lease of its name, and the pods of operators in its namespace."""

    deployment: Document
    lease: Document | ApiError
    pods: Documents


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterView:
    """Answers of an API server, each the error where the call failed.

    Attributes:
        source: where the credentials are from.
        namespace: that the checks are about.
        version: of the API server; the rest is empty where it cannot be reached.
        crd: the definition of MoEServing.
        kinds: whether each kind is served.
        rights: whether the user has each right.
        deployments: of operators, in all namespaces.
        control_planes: the same with their Leases and pods.
        nodes: of the cluster.
        servings: the MoEServings of the namespace.
        pods: of these, and those of operators.
        dns_pods: of the cluster's DNS.
    """

    source: str
    namespace: str
    version: Document | ApiError
    crd: Document | ApiError = field(default_factory=dict)
    kinds: Mapping[Kind, bool | ApiError] = field(default_factory=dict)
    rights: Mapping[Right, bool | ApiError] = field(default_factory=dict)
    deployments: Documents = ()
    control_planes: Sequence[ControlPlane] = ()
    nodes: Documents = ()
    servings: Documents = ()
    pods: Documents = ()
    dns_pods: Documents = ()


async def fetch_cluster(server: ApiServer, namespace: str | None) -> ClusterView:
    """Reads a cluster.

    Args:
        server: the connection.
        namespace: that the checks are about; None is that of the credentials.
    """
    place = namespace or server.namespace
    version = await _attempt(server.read("/version"))
    if not is_reachable(version):
        return ClusterView(source=server.source, namespace=place, version=version)
    kinds = (SERVING, *OPTIONAL)
    crd, nodes, servings, deployments, pods, dns_pods = await asyncio.gather(
        _attempt(server.get(CRD, "", NAME)),
        _attempt(_list(server, NODE, None)),
        _attempt(_list(server, SERVING, place)),
        _attempt(_list(server, DEPLOYMENT, None, SELECTOR)),
        _attempt(_list(server, POD, place, f"{MANAGED_BY}={MANAGER}")),
        _attempt(_list(server, POD, DNS_NAMESPACE, DNS_SELECTOR)),
    )
    served = await asyncio.gather(*(_attempt(_is_served(server, kind)) for kind in kinds))
    allowed = await asyncio.gather(*(_attempt(_has_right(server, right, place)) for right in RIGHTS))
    found = () if isinstance(deployments, ApiError) else deployments
    planes = [await _fetch_control_plane(server, row) for row in found]
    own = [pod for plane in planes if not isinstance(plane.pods, ApiError) for pod in plane.pods]
    return ClusterView(
        source=server.source,
        namespace=place,
        version=version,
        crd=crd,
        kinds=dict(zip(kinds, served, strict=True)),
        rights=dict(zip(RIGHTS, allowed, strict=True)),
        deployments=deployments,
        control_planes=planes,
        nodes=nodes,
        servings=servings,
        pods=pods if isinstance(pods, ApiError) else [*pods, *own],
        dns_pods=dns_pods,
    )


async def _attempt(call: Awaitable[Answer]) -> Answer | ApiError:
    try:
        return await call
    except ApiError as error:
        return error


async def _list(server: ApiServer, kind: Kind, namespace: str | None, selector: str = "") -> Sequence[Document]:
    return (await server.list(kind, namespace, selector)).items


async def _is_served(server: ApiServer, kind: Kind) -> bool:
    try:
        group = await server.read(f"/apis/{kind.group}/{kind.version}")
    except ApiError as error:
        if error.status == NOT_FOUND:
            return False
        raise
    return any(row.get("name") == kind.plural for row in group.get("resources", []))


async def _has_right(server: ApiServer, right: Right, namespace: str) -> bool:
    review = await server.create(REVIEW, review_of(right, namespace))
    return bool(review.get("status", {}).get("allowed"))


async def _fetch_control_plane(server: ApiServer, deployment: Document) -> ControlPlane:
    namespace, name = deployment["metadata"]["namespace"], deployment["metadata"]["name"]
    return ControlPlane(
        deployment=deployment,
        lease=await _attempt(server.get(LEASE, namespace, name)),
        pods=await _attempt(_list(server, POD, namespace, SELECTOR)),
    )
