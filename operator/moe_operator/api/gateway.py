"""Section `spec.gateway`: replicas, limits and holding of requests."""

from enum import StrEnum
from typing import Annotated, ClassVar

from moe_contract.gateway_config import ORIGIN_PATTERN, check_endpoint
from moe_contract.tenancy import DEFAULT_HEADER, HEADER_PATTERN, check_tenant_header
from pydantic import AfterValidator, Field, Strict

from moe_operator.api.access import GatewayAuth, GatewayTls
from moe_operator.api.inference_pool import GatewayInferencePool
from moe_operator.api.pods import GatewayService, Image, PodTemplate
from moe_operator.api.section import Count, Rule, Section
from moe_operator.api.units import DurationBetween, QuantityBetween


class GatewayLimits(Section):
    """What one client may cost."""

    max_body: Annotated[str, QuantityBetween("1Ki", "1Gi", "32Mi")] = Field(
        default="32Mi", description="Largest body of a request (bytes); a larger one is refused with status 413."
    )
    header_timeout: Annotated[str, DurationBetween("100ms")] = Field(
        default="10s", description="Time for the head of a request to arrive."
    )
    body_timeout: Annotated[str, DurationBetween("100ms")] = Field(
        default="30s",
        description="Longest pause within the body of a request; on the whole it may also take 1 s for each KiB.",
    )
    connect_timeout: Annotated[str, DurationBetween("10ms")] = Field(
        default="2s", description="Time for a connection to an engine to open."
    )
    idle_timeout: Annotated[str, DurationBetween("1s")] = Field(
        default="5m",
        description="Longest silence within a request of an engine that makes no steps, or of a client; the length of "
        "an answer has no bound.",
    )
    stream_head_after: Annotated[str, DurationBetween("1ms")] = Field(
        default="1s",
        description="A stream without a token for this long gets its head, status 200, so that clients' time-outs for "
        "heads meet no long prompt; an error after it is an event of the stream.",
    )


class GatewayHold(Section):
    """The queue of requests that wait in the gateway while all engines are saturated or none accepts."""

    requests: Annotated[Count, Field(ge=0, le=1_000_000)] = Field(
        default=1000, description="Most requests held (requests); one more is refused with status 429."
    )
    timeout: Annotated[str, DurationBetween("100ms")] = Field(
        default="1m", description="Longest time that a request is held before it is refused."
    )


class GatewayCors(Section):
    """Pages in browsers that may use the gateway (CORS)."""

    allowed_origins: (
        Annotated[tuple[Annotated[str, Field(pattern=ORIGIN_PATTERN, max_length=300)], ...], Field(max_length=64)]
        | None
    ) = Field(
        default=None,
        description="Origins of the pages, such as `https://chat.example.org`; `*` is any, an empty list none. Absent: "
        "those of `--allowed-origins` in `engine.args`, else any, as vLLM's server has it.",
    )


class GatewayAutoscaling(Section):
    """How many gateways run, by their use of the processor: a HorizontalPodAutoscaler that the operator makes."""

    min_replicas: Annotated[Count, Field(ge=1, le=64)] = Field(default=1, description="Fewest gateways.")
    max_replicas: Annotated[Count, Field(ge=1, le=64)] = Field(default=4, description="Most gateways.")
    target_cpu: Annotated[str, QuantityBetween("10m", "64", "700m")] = Field(
        default="700m",
        description="Mean use of the processor by one gateway (cores) that is kept. A gateway is one process: at 1 "
        "core it is at its end.",
    )

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            field="maxReplicas",
            message="maxReplicas must be at least minReplicas",
            cel="self.maxReplicas >= self.minReplicas",
            holds=lambda section: section.max_replicas >= section.min_replicas,
        ),
    )


class GatewayUi(Section):
    """The live page of the gateway's admin port, `/ui`, which `moeserving ui NAME` opens; it only shows."""

    enabled: Annotated[bool, Strict()] = Field(
        default=True,
        description="Serve the page to holders of its key, which is derived from the deployment's control token. It "
        "costs nothing while nobody has it open.",
    )


class GatewayTracing(Section):
    """OpenTelemetry traces of requests; the W3C context of clients is continued and given to the engines."""

    endpoint: Annotated[str, Field(min_length=1, max_length=256), AfterValidator(check_endpoint)] = Field(
        description="Address of the collector, OTLP over HTTP, such as `http://collector:4318`."
    )
    sample_percent: Annotated[Count, Field(ge=0, le=100)] = Field(
        default=100,
        description="Part of the requests that are traced (percent), where the client's own trace does not decide it.",
    )


class GatewayContinuation(StrEnum):
    """Streams that go on at another engine when theirs fails or drains."""

    NEVER = "never"
    DETERMINISTIC = "deterministic"


class Gateway(Section):
    """The way in for clients."""

    port: Annotated[Count, Field(ge=1, le=65535)] | None = Field(
        default=None,
        description="Port for clients on one machine. Absent: a free one is chosen and shown. A cluster has `service`.",
    )
    replicas: Annotated[Count, Field(ge=1, le=64)] = Field(
        default=1, description="Number of gateways, which share the load. One machine has one."
    )
    autoscaling: GatewayAutoscaling | None = Field(
        default=None,
        description="Number of gateways by load, in place of `replicas`; needs a metrics server. Only in a cluster.",
    )
    image: Image | None = Field(
        default=None, description="Image of the gateway. Absent: the operator's. Only in a cluster."
    )
    service: GatewayService = GatewayService()
    pod_template: PodTemplate = Field(
        default={},
        description="Merged into the gateways' pods (strategic merge; the container is `gateway`). Only in a cluster.",
    )
    tenant_header: Annotated[str, Field(pattern=HEADER_PATTERN), AfterValidator(check_tenant_header)] = Field(
        default=DEFAULT_HEADER,
        description="Header, in lower case, that names the tenant of a request, for `fairnessHorizon`; a proxy "
        "before the gateway should set it. Not one that the gateway writes itself, such as `host` and `x-request-id`. "
        "Empty: all requests are of one tenant.",
    )
    cors: GatewayCors = GatewayCors()
    tracing: GatewayTracing | None = Field(default=None, description="Traces of requests. Absent: none.")
    ui: GatewayUi = GatewayUi()
    continuation: GatewayContinuation = Field(
        default=GatewayContinuation.NEVER,
        description="Streams that go on at another engine when theirs fails or drains. `deterministic`: completions, "
        "chats, messages and responses whose tokens are not drawn at random, by `temperature: 0` or `seed`. `never`: "
        "none does, and one whose engine fails ends with an error event.",
    )
    auth: GatewayAuth | None = None
    tls: GatewayTls | None = None
    inference_pool: GatewayInferencePool | None = Field(
        default=None,
        description="The engines as an `InferencePool` for routes of other gateways; `{}` is enough. Absent: none. "
        "Only in a cluster.",
    )
    limits: GatewayLimits = GatewayLimits()
    hold: GatewayHold = GatewayHold()
