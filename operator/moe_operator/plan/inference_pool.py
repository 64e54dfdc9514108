"""The engines as an `InferencePool`, whose endpoint picker is in the gateways of the resource. Pure."""

from typing import Any

from moe_contract.addresses import ANY
from moe_contract.engine_process import ENGINE_PORT
from moe_contract.picker_config import PICKER_PORT, PICKER_PORT_NAME, EndpointPickerConfig
from moe_contract.sections import Listen

from moe_operator.api.resource import MoEServing
from moe_operator.plan.names import LWS_WORKER_INDEX, Names

Object = dict[str, Any]
# Pods of proxies in any namespace: by the label that the Gateway API asks of them (GEP-1762), and by Envoy Gateway's.
_PROXY_LABELS = ("gateway.networking.k8s.io/gateway-name", "gateway.envoyproxy.io/owning-gateway-name")
PROXIES = [
    {
        "namespaceSelector": {},
        "podSelector": {"matchExpressions": [{"key": label, "operator": "Exists"}]},
    }
    for label in _PROXY_LABELS
]


def build_inference_pool(resource: MoEServing, names: Names, *, all_span_nodes: bool) -> list[Object]:
    """The pool and the Service of its endpoint picker, where the resource wants them.

    Args:
        resource: the resource.
        names: of its objects.
        all_span_nodes: each engine spans several nodes, of which one serves.
    """
    pool = resource.spec.gateway.inference_pool
    if pool is None:
        return []
    serving = {LWS_WORKER_INDEX: "0"} if all_span_nodes else {}
    return [
        _build_service(names),
        {
            "apiVersion": "inference.networking.k8s.io/v1",
            "kind": "InferencePool",
            "metadata": {"name": names.service},
            "spec": {
                "selector": {"matchLabels": names.labels("engine") | serving},
                "targetPorts": [{"number": ENGINE_PORT}],
                "endpointPickerRef": {
                    "group": "",
                    "kind": "Service",
                    "name": names.picker,
                    "port": {"number": PICKER_PORT},
                    "failureMode": pool.failure_mode.value,
                },
            },
        },
    ]


def _build_service(names: Names) -> Object:
    """A Service of its own: the one for clients may be open to the world."""
    port = {"name": "grpc", "port": PICKER_PORT, "targetPort": PICKER_PORT_NAME, "protocol": "TCP"}
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": names.picker},
        "spec": {
            "type": "ClusterIP",
            "selector": names.labels("gateway"),
            "ports": [port | {"appProtocol": "http2"}],
            "ipFamilyPolicy": "PreferDualStack",
        },
    }


def build_picker(resource: MoEServing) -> EndpointPickerConfig | None:
    """The endpoint picker of a gateway; None where the resource wants no pool."""
    pool = resource.spec.gateway.inference_pool
    if pool is None:
        return None
    return EndpointPickerConfig(listen=Listen(host=ANY, port=PICKER_PORT), tls=pool.tls, fallbacks=pool.fallbacks)


def picker_ports(resource: MoEServing) -> list[Object]:
    """The port of a gateway's container for proxies."""
    if resource.spec.gateway.inference_pool is None:
        return []
    return [{"name": PICKER_PORT_NAME, "containerPort": PICKER_PORT, "protocol": "TCP"}]
