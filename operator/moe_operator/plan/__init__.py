"""What should run for a resource: pure functions from the resource and the place to configuration."""

from moe_operator.plan.local import LocalPlan, LocalSite, plan_local, ports_needed

__all__ = ["LocalPlan", "LocalSite", "plan_local", "ports_needed"]
