"""The gRPC server of the endpoint picker: a stream for each request of a proxy, and its health."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from moe_contract.addresses import authority, present_host

from moe_gateway.endpoint_picker import wire
from moe_gateway.endpoint_picker.admission import PickerParts
from moe_gateway.endpoint_picker.certificate import make_certificate
from moe_gateway.endpoint_picker.stream import AbortedStream, SilentRequest, Stream

LIVENESS = "liveness"
READINESS = ("", "readiness", wire.SERVICE)
# A stream lives as long as its request, whose answer may take hours.
LONGEST_DRAIN_S = 24 * 3600.0
# A part of a body in one message; proxies send a buffered body in one.
MESSAGE_MARGIN_BYTES = 1024 * 1024

# A proxy whose host has vanished is noticed after both together.
KEEPALIVE_S, KEEPALIVE_TIMEOUT_S = 25.0, 10.0

log = logging.getLogger("moeserving.gateway")


class EndpointPicker:
    """Serves proxies; `start`, then `drain` or `stop`.

    Args:
        parts: what streams share.
        is_ready: whether requests should be asked about here.
        keepalive_s: a connection without a message for this long is asked whether it lives.
        keepalive_timeout_s: without an answer for this long it is closed, and its requests end.
    """

    def __init__(
        self,
        parts: PickerParts,
        is_ready: Callable[[], bool],
        *,
        keepalive_s: float = KEEPALIVE_S,
        keepalive_timeout_s: float = KEEPALIVE_TIMEOUT_S,
    ) -> None:
        self._keepalive_s, self._keepalive_timeout_s = keepalive_s, keepalive_timeout_s
        self._parts = parts
        self._is_ready = is_ready
        self._server: Any = None

    async def start(self) -> None:
        """Opens the port.

        Raises:
            OSError: the port is taken.
        """
        settings = self._parts.settings
        most_bytes = self._parts.limits.max_body_bytes + MESSAGE_MARGIN_BYTES
        server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", most_bytes),
                ("grpc.max_send_message_length", most_bytes),
                ("grpc.so_reuseport", 0),
                ("grpc.keepalive_time_ms", int(self._keepalive_s * 1000)),
                ("grpc.keepalive_timeout_ms", int(self._keepalive_timeout_s * 1000)),
                # gRPC 1.85 closes after this time, a minute by default, not after the one above.
                ("grpc.http2.ping_timeout_ms", int(self._keepalive_timeout_s * 1000)),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.max_pings_without_data", 0),
            ]
        )
        server.add_generic_rpc_handlers((self._build_handler(),))
        health_pb2_grpc.add_HealthServicer_to_server(_Health(self._is_ready), server)
        address = authority(present_host(settings.listen.host), settings.listen.port)
        try:
            if settings.tls:
                server.add_secure_port(address, grpc.ssl_server_credentials([make_certificate()]))
            else:
                server.add_insecure_port(address)
        except RuntimeError as error:
            raise OSError(f"{address}: {error}") from None
        await server.start()
        self._server = server

    def _build_handler(self) -> grpc.GenericRpcHandler:
        process = grpc.stream_stream_rpc_method_handler(
            self._process,
            request_deserializer=wire.ProcessingRequest.FromString,
            response_serializer=wire.ProcessingResponse.SerializeToString,
        )
        return grpc.method_handlers_generic_handler(wire.SERVICE, {wire.METHOD: process})

    async def _process(self, messages: AsyncIterator[wire.Message], context: Any) -> None:
        try:
            await Stream(self._parts).run(messages, context.write)
        except SilentRequest:
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "nothing moved for the idle timeout")
        except AbortedStream:
            await context.abort(grpc.StatusCode.INTERNAL, "the gateway failed to check the request")
        except (asyncio.CancelledError, grpc.aio.UsageError):
            # The proxy has ended the stream.
            raise
        except Exception:
            log.exception("a request of a proxy failed")
            raise

    def check(self, now_s: float) -> None:
        """Called several times a second: ends what took too long."""
        for stream in list(self._parts.open):
            try:
                stream.check(now_s)
            except Exception:
                log.exception("the check of a proxy's request failed")
                stream.abort()

    async def drain(self) -> None:
        """Takes no new requests and waits for the running ones."""
        if self._server is not None:
            await self._server.stop(LONGEST_DRAIN_S)

    async def stop(self) -> None:
        """Ends at once, running requests included."""
        if self._server is not None:
            await self._server.stop(0)


class _Health(health_pb2_grpc.HealthServicer):
    def __init__(self, is_ready: Callable[[], bool]) -> None:
        self._is_ready = is_ready

    async def Check(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Whether a service may be used; services are those that the protocol names."""
        statuses = health_pb2.HealthCheckResponse
        if request.service == LIVENESS:
            return statuses(status=statuses.SERVING)
        if request.service in READINESS:
            return statuses(status=statuses.SERVING if self._is_ready() else statuses.NOT_SERVING)
        await context.abort(grpc.StatusCode.NOT_FOUND, f"no such service: {request.service[:80]}")
        return None
