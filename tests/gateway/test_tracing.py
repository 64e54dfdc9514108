"""Traces of requests: spans at a collector, the client's context before them and the engine's behind them."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from aiohttp import web
from moe_contract.documents import parse_model
from moe_contract.gateway_config import Tracing
from moe_contract.input_errors import InvalidInput
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from tests.gateway.clients import Served
from tests.gateway.messages import SSE_END, SSE_HEAD, event, json_answer, post, prompt
from tests.gateway.peers import MockEngine, always
from tests.gateway.waiting import free_port

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collector:
    """A collector of OTLP over HTTP."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.port = free_port()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def take(self, request: web.Request) -> web.Response:
        message = ExportTraceServiceRequest.FromString(await request.read())
        self.spans += [span for rows in message.resource_spans for scope in rows.scope_spans for span in scope.spans]
        return web.Response(body=b"", content_type="application/x-protobuf")


@pytest.fixture
async def collector() -> AsyncIterator[Collector]:
    collector = Collector()
    application = web.Application()
    application.router.add_post("/v1/traces", collector.take)
    runner = web.AppRunner(application)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", collector.port).start()
    yield collector
    await runner.cleanup()


def attributes(span: Span) -> dict[str, object]:
    return {row.key: getattr(row.value, row.value.WhichOneof("value")) for row in span.attributes}


async def ask(served: Served, *, traceparent: str = "", stream: bool = False, extra: bytes = b"") -> int:
    header = b"traceparent: %b\r\n" % traceparent.encode() if traceparent else b""
    client = await served.connect()
    client.send(post(prompt(stream=stream), extra=header + extra))
    return (await client.answer()).status


async def traced(served: Served, collector: Collector) -> list[Span]:
    """The spans, once the gateway has ended, which sends the last of them."""
    await served.gateway.close()
    return collector.spans


def context_at(engine: MockEngine) -> list[str]:
    return engine.requests[-1].headers[b"traceparent"].decode().split("-")


async def test_a_span_joins_the_trace_of_the_client_and_the_engine_gets_its_context(serve, make_engine, collector):
    engine = await make_engine(always(SSE_HEAD + event("a") + SSE_END))
    served = await serve(engine, tracing={"endpoint": collector.endpoint})
    state = b"tracestate: vendor=1\r\n"
    assert await ask(served, traceparent=f"00-{TRACE}-{PARENT}-01", stream=True, extra=state) == 200
    (span,) = await traced(served, collector)
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, PARENT)
    assert (span.name, span.kind) == ("POST /v1/completions", Span.SPAN_KIND_SERVER)
    assert context_at(engine) == ["00", TRACE, span.span_id.hex(), "01"]
    assert engine.requests[-1].head.lower().count(b"traceparent") == 1
    assert engine.requests[-1].headers[b"tracestate"] == b"vendor=1"
    found = attributes(span)
    assert found["http.response.status_code"] == 200
    assert found["gen_ai.request.model"] == "tiny"
    assert found["moeserving.engine"] == "engine-0"
    assert (
        0 < found["gen_ai.latency.time_to_first_token"] <= (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9
    )


async def test_a_request_without_a_trace_begins_one(serve, make_engine, collector):
    engine = await make_engine()
    served = await serve(engine, tracing={"endpoint": collector.endpoint})
    assert await ask(served) == 200
    assert await ask(served, traceparent="nonsense") == 200
    first, second = await traced(served, collector)
    assert (first.parent_span_id, second.parent_span_id) == (b"", b"")
    assert first.trace_id != second.trace_id
    assert context_at(engine)[1] == second.trace_id.hex()


async def test_the_client_decides_whether_its_trace_is_recorded(serve, make_engine, collector):
    engine = await make_engine()
    served = await serve(engine, tracing={"endpoint": collector.endpoint, "sample_ratio": 0})
    assert await ask(served, traceparent=f"00-{TRACE}-{PARENT}-00") == 200
    assert context_at(engine)[1::2] == [TRACE, "00"]
    assert await ask(served) == 200
    # The lowest bit alone says that a trace is recorded.
    assert int(context_at(engine)[3], 16) & 1 == 0
    assert await ask(served, traceparent=f"00-{TRACE}-{PARENT}-01") == 200
    (span,) = await traced(served, collector)
    assert context_at(engine) == ["00", TRACE, span.span_id.hex(), "01"]


async def test_an_error_of_the_server_is_one_of_the_span_and_the_clients_is_not(serve, make_engine, collector):
    engine = await make_engine(always(json_answer({"error": "no"}, status="500 Error")))
    served = await serve(engine, tracing={"endpoint": collector.endpoint})
    assert await ask(served) == 500
    engine.script = always(json_answer({"error": "no"}, status="400 Bad Request"))
    assert await ask(served) == 400
    codes = {
        attributes(span)["http.response.status_code"]: span.status.code for span in await traced(served, collector)
    }
    assert codes == {500: Status.STATUS_CODE_ERROR, 400: Status.STATUS_CODE_UNSET}


async def test_without_tracing_the_context_passes_through_as_it_came(serve, make_engine):
    engine = await make_engine()
    served = await serve(engine)
    assert await ask(served, traceparent=f"00-{TRACE}-{PARENT}-01") == 200
    assert context_at(engine) == ["00", TRACE, PARENT, "01"]


@pytest.mark.filterwarnings("default")
async def test_a_collector_that_is_away_holds_up_neither_requests_nor_the_end(serve, make_engine):
    served = await serve(await make_engine(), tracing={"endpoint": f"http://127.0.0.1:{free_port()}"})
    assert [await ask(served) for _ in range(3)] == [200] * 3
    await asyncio.wait_for(served.gateway.close(), 20)


@pytest.mark.parametrize(
    "endpoint", ["collector:4318", "ftp://collector", "http://", "http://a b", "http://[1", "http://a/?q"]
)
def test_an_endpoint_of_another_form_is_refused(endpoint):
    with pytest.raises(InvalidInput, match="endpoint: "):
        parse_model(Tracing, {"endpoint": endpoint})
