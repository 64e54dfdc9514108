"""How many gateways run: the resource's number, or that of a HorizontalPodAutoscaler made for them. Pure."""

from typing import TYPE_CHECKING, Any

from moe_operator.api.resource import MoEServing
from moe_operator.api.units import canonical_quantity
from moe_operator.plan.names import Names
from moe_operator.plan.replicas import AUTOSCALED, Count, count_replicas

if TYPE_CHECKING:
    from moe_operator.plan.cluster import Observed

Object = dict[str, Any]


def plan_gateway_count(resource: MoEServing, names: Names, observed: "Observed") -> Count:
    """The number of gateways; under autoscaling the present one within its bounds until the autoscaler sets it."""
    place, gateway = ("Deployment", names.gateway), resource.spec.gateway
    if (bounds := gateway.autoscaling) is None:
        return count_replicas(place, gateway.replicas, observed.scaled)
    present = bounds.min_replicas if observed.gateways is None else observed.gateways
    planned = min(bounds.max_replicas, max(bounds.min_replicas, present))
    return count_replicas(place, planned, observed.scaled, note=AUTOSCALED)


def build_gateway_scaler(resource: MoEServing, names: Names) -> list[Object]:
    """The autoscaler of the gateways, where the resource wants one.

    Its target is an amount and no part of the pods' request: that request says how much is reserved, not how much
    a gateway can do.
    """
    bounds = resource.spec.gateway.autoscaling
    if bounds is None:
        return []
    target = {"type": "AverageValue", "averageValue": canonical_quantity(bounds.target_cpu)}
    return [
        {
            "apiVersion": "autoscaling/v2",
            "kind": "HorizontalPodAutoscaler",
            "metadata": {"name": names.gateway, "labels": names.labels("gateway")},
            "spec": {
                "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": names.gateway},
                "minReplicas": bounds.min_replicas,
                "maxReplicas": bounds.max_replicas,
                "metrics": [{"type": "Resource", "resource": {"name": "cpu", "target": target}}],
            },
        }
    ]
