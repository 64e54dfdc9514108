"""Services, disruption budgets, network policies and monitors. Pure."""

from collections.abc import Mapping
from typing import Any

from moe_contract.engine_process import AGENT_PORT, AGENT_PORT_NAME, ENGINE_PORT, ENGINE_PORT_NAME
from moe_contract.routes import METRICS

from moe_operator.api.pods import GatewayService, IpFamilyPolicy, ServiceType
from moe_operator.api.resource import MoEServing
from moe_operator.plan.names import COMPONENT, INSTANCE, LWS_NAME, Names
from moe_operator.plan.network_policies import build_network_policies
from moe_operator.plan.pods import Defaults

Object = dict[str, Any]


def build_services(resource: MoEServing, names: Names, engines: Mapping[str, str]) -> list[Object]:
    """One headless Service for each revision of the engines, and the gateway's for clients."""
    services = [_build_headless(name, names, revision) for revision, name in engines.items()]
    has_tls = resource.spec.gateway.tls is not None
    return [*services, _build_gateway_service(resource.spec.gateway.service, names, has_tls=has_tls)]


def _build_gateway_service(service: GatewayService, names: Names, *, has_tls: bool) -> Object:
    # Meshes and Ingress controllers read the protocol from the port's name.
    name = "https" if has_tls else "http"
    spec: Object = {
        "type": service.type.value,
        "selector": names.labels("gateway"),
        "ports": [{"name": name, "port": service.port, "targetPort": "http", "protocol": "TCP"}],
    }
    if service.load_balancer_class is not None:
        spec["loadBalancerClass"] = service.load_balancer_class
    if (families := _families(service)) is not None:
        spec["ipFamilyPolicy"] = families.value
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": names.service, "labels": names.labels("gateway")},
        "spec": spec,
    }


def _families(service: GatewayService) -> IpFamilyPolicy | None:
    if service.ip_family_policy is None and service.type is not ServiceType.LOAD_BALANCER:
        return IpFamilyPolicy.PREFER_DUAL_STACK
    return service.ip_family_policy


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
    spans_nodes: bool,
    has_service_monitors: bool,
) -> list[Object]:
    """Returns the budgets, policies and monitors of the pods.

    Engines of all roles share one budget: while one of a role is away, another eviction could stop the other role too,
    and engines that another workload replaces stay in it.

    Args:
        resource: the resource.
        names: of its children.
        engines: name of each workload of engines by revision.
        defaults: what the operator was installed with.
        spans_nodes: whether engines of several nodes exist or are planned.
        has_service_monitors: whether the cluster knows ServiceMonitors.
    """
    # Pods of groups have a budget of their own; a pod with two budgets cannot be evicted at all.
    singles: Object = {"matchExpressions": [{"key": LWS_NAME, "operator": "DoesNotExist"}]} if spans_nodes else {}
    selected = {name: names.labels("engine", revision) for revision, name in engines.items()}
    objects = [_build_budget(name, {"matchLabels": labels, **singles}, resource) for name, labels in selected.items()]
    objects.append(_build_budget(names.gateway, {"matchLabels": names.labels("gateway")}, resource))
    objects += build_network_policies(resource, names, defaults, spans_nodes=spans_nodes)
    if has_service_monitors and resource.spec.metrics.service_monitor:
        objects += [_build_monitor(names.engine, names, "engine", "agent")]
        objects += [_build_pod_monitor(names.gateway, names, "gateway", "admin")]
    return objects


def _build_budget(name: str, selector: Mapping[str, Any], resource: MoEServing) -> Object:
    away = resource.spec.disruption.max_unavailable
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": {"name": name},
        "spec": {
            "maxUnavailable": away if away.endswith("%") else int(away),
            "selector": dict(selector),
            # A pod that serves nothing, such as one that cannot start, must not stop a node from being drained.
            "unhealthyPodEvictionPolicy": "AlwaysAllow",
        },
    }


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
