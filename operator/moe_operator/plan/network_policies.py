"""NetworkPolicies: who may reach the pods of engines and gateways. Pure."""

from collections.abc import Iterable
from typing import Any

from moe_contract.engine_process import ADMIN_PORT_NAME, AGENT_PORT_NAME, ENGINE_PORT_NAME, HTTP_PORT_NAME
from moe_contract.picker_config import PICKER_PORT_NAME

from moe_operator.api.resource import MoEServing
from moe_operator.plan.inference_pool import PROXIES
from moe_operator.plan.names import COMPONENT, Names
from moe_operator.plan.pods import Defaults

Object = dict[str, Any]
_NAMESPACE_NAME = "kubernetes.io/metadata.name"
# Prometheus may live in any namespace: pods that carry its usual name.
_PROMETHEUS = {"namespaceSelector": {}, "podSelector": {"matchLabels": {"app.kubernetes.io/name": "prometheus"}}}


def build_network_policies(
    resource: MoEServing, names: Names, defaults: Defaults, *, spans_nodes: bool
) -> list[Object]:
    """One policy for all engines and one for the gateways; none where they are turned off.

    Args:
        resource: the resource.
        names: of its objects.
        defaults: says where the operator is.
        spans_nodes: engines of several nodes exist or are planned.
    """
    if not resource.spec.network_policy.enabled:
        return []
    engines = _build_engine_policy(resource, names, defaults, spans_nodes=spans_nodes)
    return [engines, _build_gateway_policy(resource, names, defaults)]


def _build_engine_policy(resource: MoEServing, names: Names, defaults: Defaults, *, spans_nodes: bool) -> Object:
    """The engine's port for gateways and proxies, the agent's for operator and scrapers too; all ports for engines.

    Engines reach each other where they are groups, or exchange KV blocks: neither channel asks who is there, and
    UCX listens where it finds a free port.
    """
    gateways = {"podSelector": {"matchLabels": names.labels("gateway")}}
    proxies = _proxies(resource)
    readers = [gateways, *_operator_peers(defaults), *_scrapers(resource)]
    rules: list[Object] = [
        {"from": [gateways, *proxies], "ports": _ports(ENGINE_PORT_NAME)},
        {"from": readers, "ports": _ports(AGENT_PORT_NAME)},
    ]
    if (tunnel := resource.spec.network_policy.mesh_port) is not None:
        rules.append({"from": [*readers, *proxies], "ports": _ports(tunnel)})
    if spans_nodes or resource.spec.engine.roles.apart:
        rules.append({"from": [{"podSelector": {"matchLabels": names.labels("engine")}}]})
    return _build_policy(names.engine, names.labels("engine"), [*rules, *_further(resource)])


def _build_gateway_policy(resource: MoEServing, names: Names, defaults: Defaults) -> Object:
    """The clients' port for everyone, the admin port for operator and scrapers, the picker's for proxies of a pool."""
    rules: list[Object] = [{"ports": _ports(HTTP_PORT_NAME)}]
    if admins := [*_operator_peers(defaults), *_scrapers(resource)]:
        rules.append({"from": admins, "ports": _ports(ADMIN_PORT_NAME)})
    if proxies := _proxies(resource):
        rules.append({"from": proxies, "ports": _ports(PICKER_PORT_NAME)})
    if (tunnel := resource.spec.network_policy.mesh_port) is not None:
        rules.append({"ports": _ports(tunnel)})
    return _build_policy(names.gateway, names.labels("gateway"), [*rules, *_further(resource)])


def _build_policy(name: str, selector: dict[str, str], rules: Iterable[Object]) -> Object:
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": name},
        "spec": {"podSelector": {"matchLabels": selector}, "policyTypes": ["Ingress"], "ingress": [*rules]},
    }


def _ports(port: str | int) -> list[Object]:
    return [{"port": port, "protocol": "TCP"}]


def _further(resource: MoEServing) -> list[Object]:
    """A rule for those who may reach every port."""
    peers = [peer.document() for peer in resource.spec.network_policy.allow_from]
    return [{"from": peers}] if peers else []


def _operator_peers(defaults: Defaults) -> list[Object]:
    if not defaults.operator_namespace:
        return []
    return [
        {
            "namespaceSelector": {"matchLabels": {_NAMESPACE_NAME: defaults.operator_namespace}},
            "podSelector": {"matchLabels": {COMPONENT: "operator"}},
        }
    ]


def _proxies(resource: MoEServing) -> list[Object]:
    return [] if resource.spec.gateway.inference_pool is None else PROXIES


def _scrapers(resource: MoEServing) -> list[Object]:
    if (peers := resource.spec.network_policy.metrics_from) is not None:
        return [peer.document() for peer in peers]
    return [_PROMETHEUS] if resource.spec.metrics.service_monitor else []
