"""The autoscaler: reads what gateways, agents or Prometheus say, and lets `moe_scheduling.fleet.size` decide."""

from moe_operator.autoscale.autoscaler import Autoscaler, Outcome
from moe_operator.autoscale.signal import Fleet, build_signal

__all__ = ["Autoscaler", "Fleet", "Outcome", "build_signal"]
