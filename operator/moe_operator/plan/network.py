"""Services, access and removal: network policies, disruption budgets, service monitors. Pure."""

from collections.abc import Mapping
from typing import Any

from moe_contract.engine_process import AGENT_PORT, AGENT_PORT_NAME, ENGINE_PORT, ENGINE_PORT_NAME
from moe_contract.routes import METRICS

from moe_operator.api.resource import MoEServing
from moe_operator.plan.names import COMPONENT, INSTANCE, Names
from moe_operator.plan.pods import Defaults

Object = dict[str, Any]
_NAMESPACE_NAME = "kubernetes.io/metadata.name"


def build_services(resource: MoEServing, names: Names, engines: Mapping[str, str]) -> list[Object]:
    """One headless Service for each revision of the engines, and the gateway's for clients."""
    services = [_build_headless(name, names, revision) for revision, name in engines.items()]
    service = resource.spec.gateway.service
    return [
        *services,
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": names.service, "labels": names.labels("gateway")},
            "spec": {
                "type": service.type.value,
                "selector": names.labels("gateway"),
                "ports": [{"name": "http", "port": service.port, "targetPort": "http", "protocol": "TCP"}],
            },
        },
    ]


def _build_headless(name: str, names: Names, revision: str) -> Object:
    """Selects what serves, of one node or of several: a group's workers do not carry the label of its revision."""
    labels = names.labels("engine", revision)
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "labels": labels},
        "spec": {
            "clusterIP": "None",
            "selector": labels,
            "ports": [
                {"name": port, "port": number, "targetPort": port, "protocol": "TCP"}
                for port, number in ((ENGINE_PORT_NAME, ENGINE_PORT), (AGENT_PORT_NAME, AGENT_PORT))
            ],
        },
    }


def build_policies(
    resource: MoEServing,
    names: Names,
    engines: Mapping[str, str],
    defaults: Defaults,
    *,
    spans_nodes: bool,
    has_service_monitors: bool,
) -> list[Object]:
    """What stands around the pods; with `spans_nodes` engines of several nodes exist or are planned."""
    objects = [_build_budget(name, names.labels("engine", revision), resource) for revision, name in engines.items()]
    objects.append(_build_budget(names.gateway, names.labels("gateway"), resource))
    objects.append(_build_engine_policy(resource, names, defaults, spans_nodes=spans_nodes))
    objects.append(_build_gateway_policy(resource, names, defaults))
    if has_service_monitors and resource.spec.metrics.service_monitor:
        objects += [_build_monitor(names.engine, names, "engine", "agent")]
        objects += [_build_pod_monitor(names.gateway, names, "gateway", "admin")]
    return objects


def _build_budget(name: str, selector: Mapping[str, str], resource: MoEServing) -> Object:
    away = resource.spec.disruption.max_unavailable
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": {"name": name},
        "spec": {
            "maxUnavailable": away if away.endswith("%") else int(away),
            "selector": {"matchLabels": dict(selector)},
            # A pod that serves nothing, such as one that cannot start, must not stop a node from being drained.
            "unhealthyPodEvictionPolicy": "AlwaysAllow",
        },
    }


def _build_engine_policy(resource: MoEServing, names: Names, defaults: Defaults, *, spans_nodes: bool) -> Object:
    """The engine's port for gateways, the agent's also for operator and scrapers; all ports among a group's nodes."""
    gateways = {"podSelector": {"matchLabels": names.labels("gateway")}}
    rules = [
        {"from": [gateways], "ports": _ports("engine")},
        {"from": [gateways, *_operator_peers(defaults), *_scrapers(resource)], "ports": _ports("agent")},
    ]
    if spans_nodes:
        rules.append({"from": [{"podSelector": {"matchLabels": names.labels("engine")}}]})
    return _build_policy(names.engine, names.labels("engine"), rules)


def _build_gateway_policy(resource: MoEServing, names: Names, defaults: Defaults) -> Object:
    """The clients' port for everyone, the admin port for the operator and scrapers."""
    admins = [*_operator_peers(defaults), *_scrapers(resource)]
    rules: list[Object] = [{"ports": _ports("http")}]
    if admins:
        rules.append({"from": admins, "ports": _ports("admin")})
    return _build_policy(names.gateway, names.labels("gateway"), rules)


def _build_policy(name: str, selector: Mapping[str, str], rules: list[Object]) -> Object:
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": name},
        "spec": {"podSelector": {"matchLabels": dict(selector)}, "policyTypes": ["Ingress"], "ingress": rules},
    }


def _ports(name: str) -> list[Object]:
    return [{"port": name, "protocol": "TCP"}]


def _operator_peers(defaults: Defaults) -> list[Object]:
    if not defaults.operator_namespace:
        return []
    return [
        {
            "namespaceSelector": {"matchLabels": {_NAMESPACE_NAME: defaults.operator_namespace}},
            "podSelector": {"matchLabels": {COMPONENT: "operator"}},
        }
    ]


def _scrapers(resource: MoEServing) -> list[Object]:
    """Prometheus may live in any namespace: pods that carry its usual name."""
    if not resource.spec.metrics.service_monitor:
        return []
    return [{"namespaceSelector": {}, "podSelector": {"matchLabels": {"app.kubernetes.io/name": "prometheus"}}}]


def _build_monitor(name: str, names: Names, component: str, port: str) -> Object:
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "ServiceMonitor",
        "metadata": {"name": name},
        "spec": {
            "selector": {"matchLabels": {INSTANCE: names.name, COMPONENT: component}},
            "endpoints": [{"port": port, "path": METRICS, "interval": "15s"}],
        },
    }


def _build_pod_monitor(name: str, names: Names, component: str, port: str) -> Object:
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PodMonitor",
        "metadata": {"name": name},
        "spec": {
            "selector": {"matchLabels": {INSTANCE: names.name, COMPONENT: component}},
            "podMetricsEndpoints": [{"port": port, "path": METRICS, "interval": "15s"}],
        },
    }
