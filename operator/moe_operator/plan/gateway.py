"""Parts of the gateway's configuration that one machine and a cluster share. Pure."""

from moe_contract.gateway_config import Limits, Tracing

from moe_operator.api.resource import MoEServing
from moe_operator.api.units import duration_s, quantity_value


def build_limits(resource: MoEServing) -> Limits:
    """What one client may cost."""
    limits, hold = resource.spec.gateway.limits, resource.spec.gateway.hold
    return Limits(
        max_body_bytes=int(quantity_value(limits.max_body)),
        header_timeout_s=duration_s(limits.header_timeout),
        body_timeout_s=duration_s(limits.body_timeout),
        connect_timeout_s=duration_s(limits.connect_timeout),
        idle_timeout_s=duration_s(limits.idle_timeout),
        hold_requests=hold.requests,
        hold_timeout_s=duration_s(hold.timeout),
    )


def build_tracing(resource: MoEServing) -> Tracing | None:
    """Where the gateway sends traces of requests."""
    tracing = resource.spec.gateway.tracing
    return None if tracing is None else Tracing(endpoint=tracing.endpoint, sample_ratio=tracing.sample_percent / 100)
