"""What should run for a resource: pure functions from the resource and the place to configuration."""

from moe_operator.plan.cluster import ClusterPlan, Defaults, Observed, plan_cluster
from moe_operator.plan.local import LocalPlan, LocalSite, plan_local, ports_needed

__all__ = [
    "ClusterPlan",
    "Defaults",
    "LocalPlan",
    "LocalSite",
    "Observed",
    "plan_cluster",
    "plan_local",
    "ports_needed",
]
