"""OpenTelemetry traces of requests, by the official SDK; off unless the configuration has `tracing`.

A request that is meant for an engine is one span of kind server. The client's context (W3C `traceparent`) is its
parent, and the engine gets the span's own context instead, so that spans of vLLM (`--otlp-traces-endpoint`) are
its children. Spans leave in batches by OTLP over HTTP from a thread of the SDK; a collector that is away loses spans
and holds up no request.

Attributes are those of OpenTelemetry's semantic conventions and of vLLM's own spans where these have one, else they
begin with `moeserving.`.
"""

import re
import time
from typing import TYPE_CHECKING

from moe_contract.gateway_config import Tracing
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

if TYPE_CHECKING:
    from moe_gateway.http.routes import Route
    from moe_gateway.request.context import ClientRequest
    from moe_gateway.request.dispatched import DispatchedRequest

NAME = "moeserving-gateway"
# An export that fails is tried again only within this time, so that the end of the gateway waits no longer.
EXPORT_TIMEOUT_S = 2.0
_FIRST_ERROR_STATUS = 500
_FIRST_REFUSAL_STATUS = 400

_CONTEXT_LINES = re.compile(rb"^(traceparent|tracestate):([^\r\n]*)\r\n", re.IGNORECASE | re.MULTILINE)


class RequestTracer:
    """Makes a span of each request.

    Args:
        settings: where spans go, and of which part of the requests.
    """

    def __init__(self, settings: Tracing) -> None:
        exporter = OTLPSpanExporter(f"{settings.endpoint.rstrip('/')}/v1/traces", timeout=EXPORT_TIMEOUT_S)
        self._provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(settings.sample_ratio)),
            resource=Resource.create({SERVICE_NAME: NAME}),
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer(NAME)
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, request: "ClientRequest", route: "Route", now_s: float) -> None:
        """Begins the span of a request, and puts its context into the header lines that the engine will get."""
        # At once, so that no other work lies between the two clocks.
        arrived_ns = time.time_ns() - int((now_s - request.arrived_s) * 1e9)
        method = request.method.decode()
        span = self._tracer.start_span(
            f"{method} {route.path.decode()}",
            context=self._read_context(request.headers),
            kind=SpanKind.SERVER,
            attributes={"http.request.method": method, "http.route": route.path.decode()},
            start_time=arrived_ns,
        )
        context = span.get_span_context()
        own = f"traceparent: 00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}\r\n"
        if context.trace_state:
            own += f"tracestate: {context.trace_state.to_header()}\r\n"
        request.headers = own.encode() + _CONTEXT_LINES.sub(b"", request.headers)
        request.span = span

    def _read_context(self, headers: bytes) -> Context:
        carrier = {
            name.lower().decode(): value.strip(b" \t").decode("latin-1")
            for name, value in _CONTEXT_LINES.findall(headers)
        }
        return self._propagator.extract(carrier, context=Context())

    def end(self, exchange: "DispatchedRequest", status: int, problem: str) -> None:
        """Ends the span of a request, with the attributes that are known by then."""
        span: Span | None = exchange.request.span
        if span is None or not span.is_recording():
            return
        target = exchange.target
        span.set_attribute("http.response.status_code", status)
        span.set_attribute("moeserving.request_id", exchange.request.request_id.decode())
        span.set_attribute("moeserving.prompt_tokens.estimated", exchange.job.prompt_tokens)
        if exchange.job.model is not None:
            span.set_attribute("gen_ai.request.model", exchange.job.model)
        if target is not None:
            span.set_attribute("moeserving.engine", target.server)
            span.set_attribute("moeserving.rank", target.rank)
        if exchange.ttft_s is not None:
            span.set_attribute("gen_ai.latency.time_to_first_token", exchange.ttft_s)
        if problem:
            span.set_attribute("moeserving.problem", problem)
        if status >= _FIRST_ERROR_STATUS or (problem and status < _FIRST_REFUSAL_STATUS):
            span.set_status(Status(StatusCode.ERROR, problem))
        span.end()

    def close(self) -> None:
        """Sends the last spans, for at most some seconds; not to be called on the event loop's thread."""
        self._provider.shutdown()
