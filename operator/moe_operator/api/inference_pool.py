"""Section `spec.gateway.inferencePool`: the engines as a backend of gateways of others (Gateway API)."""

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from moe_operator.api.section import Count, Flag, Section


class FailureMode(StrEnum):
    """What a proxy does while no endpoint picker answers: refuse requests, or send them to any engine."""

    FAIL_CLOSE = "FailClose"
    FAIL_OPEN = "FailOpen"


class GatewayInferencePool(Section):
    """An `InferencePool` of the engines, so that routes of other gateways (Istio, Envoy Gateway, ...) lead to them.

    The gateways of this resource pick the engine of each request for them, by the same rules as for their own clients.
    Needs the Gateway API Inference Extension. Only in a cluster.
    """

    failure_mode: FailureMode = Field(
        default=FailureMode.FAIL_CLOSE,
        description="While no gateway of this resource answers, proxies refuse requests (`FailClose`), or send them to "
        "any engine (`FailOpen`), which answers 401 where `auth` is set.",
    )
    tls: Flag = Field(
        default=True,
        description="Serve proxies over TLS with a certificate that each gateway makes at its start, as most "
        "implementations expect; they do not verify it. False: plain text, for Istio without a DestinationRule and for "
        "meshes.",
    )
    fallbacks: Annotated[Count, Field(ge=0, le=8)] = Field(
        default=0,
        description="Further engines that are named behind the picked one, for proxies that go down the list when they "
        "retry. Some proxies take one engine alone.",
    )
