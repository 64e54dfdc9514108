"""Parts of the gateway's configuration that one machine and a cluster share. Pure."""

import itertools
import json
import re
from collections.abc import Sequence

from moe_contract.gateway_config import ORIGIN_PATTERN, Cors, Limits

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
        stream_head_after_s=duration_s(limits.stream_head_after),
        hold_requests=hold.requests,
        hold_timeout_s=duration_s(hold.timeout),
    )


def build_cors(resource: MoEServing) -> Cors:
    """The pages in browsers that may use the gateway: what the resource says, else its engine's arguments, else any."""
    origins = resource.spec.gateway.cors.allowed_origins
    if origins is None:
        origins = _engine_origins(resource.spec.engine.args)
    return Cors() if origins is None else Cors(allowed_origins=origins)


def _engine_origins(args: Sequence[str]) -> tuple[str, ...] | None:
    """The origins in vLLM's `--allowed-origins`, a list in JSON; None where they are not given or not readable."""
    flag = "--allowed-origins"
    values = [arg.partition("=")[2] for arg in args if arg.startswith(f"{flag}=")]
    values += [value for name, value in itertools.pairwise(args) if name == flag]
    try:
        origins = json.loads(values[-1]) if values else None
    except ValueError:
        return None
    if not isinstance(origins, list):
        return None
    is_usable = all(isinstance(origin, str) and re.fullmatch(ORIGIN_PATTERN, origin) for origin in origins)
    return tuple(origins) if is_usable else None
