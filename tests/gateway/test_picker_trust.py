"""What a client of the proxy cannot do: choose the destination, or take the picker's headers for itself."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from moe_gateway.endpoint_picker import wire
from moe_gateway.endpoint_picker.admission import TRANSFERS_UNKNOWN, PickerParts
from moe_gateway.endpoint_picker.stream import Stream
from moe_gateway.endpoint_picker.wire import HeaderValue, HttpBody, ProcessingRequest

from tests.gateway.envoy import BUFFERED, DUPLEX
from tests.gateway.fronted import Front, until
from tests.gateway.http2_frames import exchange, request_with_trailers
from tests.gateway.messages import prompt
from tests.gateway.picker_messages import ENGINES, QUESTION, TRAILERS, make_parts, parts_of, question_head, run

DESTINATION = "x-gateway-destination-endpoint"
POST = {":method": "POST", ":path": "/v1/completions"}


class Listener:
    """Counts who connects to a port that nobody should be sent to."""

    def __init__(self) -> None:
        self.connections = 0
        self._server: asyncio.AbstractServer | None = None

    async def start(self) -> int:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def _accept(self, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        writer.close()

    def stop(self) -> None:
        assert self._server is not None
        self._server.close()


@pytest.fixture
async def listener() -> AsyncIterator[Listener]:
    listening = Listener()
    yield listening
    listening.stop()


@pytest.mark.parametrize(
    ("rows", "body"),
    [
        ({":method": "GET", ":path": "/v1/models"}, None),
        ({":method": "POST", ":path": "/v1/responses/resp_1/cancel"}, None),
        (POST, None),
        (POST, b""),
        (POST, json.dumps(prompt("hello")).encode()),
    ],
)
@pytest.mark.parametrize(("mode", "trailers"), [(DUPLEX, "SEND"), (BUFFERED, "SEND"), (BUFFERED, "SKIP")])
async def test_a_client_does_not_choose_where_its_request_goes(
    front: Front,
    make_engine: Any,
    listener: Listener,
    mode: str,
    trailers: str,
    rows: dict[str, str],
    body: bytes | None,
) -> None:
    port = await listener.start()
    fronted = await front(await make_engine(), envoy={"body": mode, "answers": "STREAMED", "trailers": trailers})
    headers = rows | {":scheme": "http", ":authority": "x", DESTINATION: f"127.0.0.1:{port}"}
    assert await exchange(fronted.envoy.port, request_with_trailers(headers, body)) != b""
    assert listener.connections == 0
    await fronted.settled()


async def test_a_buffered_body_is_awaited_without_the_headers_that_are_the_pickers() -> None:
    asked = question_head(wire.BUFFERED)
    names = (DESTINATION, "x-data-parallel-rank", "x-moeserving-peer")
    asked.request_headers.headers.headers.extend(HeaderValue(key=name, raw_value=b"7") for name in names)
    replies = await run(make_parts(), [asked, *parts_of(QUESTION, [], of_answer=False)])
    assert set(names) == set(replies[0].request_headers.response.header_mutation.remove_headers)


async def test_trailers_without_a_buffered_body_are_an_error() -> None:
    parts = make_parts()
    replies = await run(parts, [question_head(wire.BUFFERED), TRAILERS])
    assert replies[-1].immediate_response.status.code == 400
    assert parts.context.stats.requests == {("completions", 400): 1}


STEERS = json.dumps({"model": "tiny", "prompt": "hello", "kv_transfer_params": {"do_remote_prefill": True}}).encode()
UNSEEN = [
    (wire.NONE, []),
    (wire.STREAMED, [STEERS[:9], STEERS[9:]]),
    (wire.BUFFERED_PARTIAL, [STEERS[:9]]),
]


def say_transfers(parts: PickerParts) -> None:
    parts.context.dispatcher.set_process(ENGINES[1], 1, exchanges_blocks=True)


def pieces(rows: list[bytes]) -> list[wire.Message]:
    return [ProcessingRequest(request_body=HttpBody(body=row)) for row in rows]


@pytest.mark.parametrize(("mode", "rows"), UNSEEN)
async def test_no_client_steers_a_transfer_by_a_body_that_is_not_seen(mode: int, rows: list[bytes]) -> None:
    parts = make_parts()
    messages = [question_head(mode), *pieces(rows)]
    assert all(reply.WhichOneof("response") != "immediate_response" for reply in await run(parts, messages))
    say_transfers(parts)
    answer = (await run(parts, messages))[-1].immediate_response
    assert answer.status.code == 500
    assert TRANSFERS_UNKNOWN in answer.body.decode()


async def test_nor_while_its_request_waits_for_an_engine_that_exchanges_blocks() -> None:
    parts = make_parts(ready=False)
    dispatcher = parts.context.dispatcher
    replies: list[wire.Message] = []
    goes_on = asyncio.Event()

    async def messages() -> AsyncIterator[wire.Message]:
        yield question_head(wire.NONE)
        await goes_on.wait()

    async def write(reply: wire.Message) -> None:
        replies.append(reply)

    running = asyncio.ensure_future(Stream(parts).run(messages(), write))
    await until(lambda: dispatcher.held == 1, "a held request")
    say_transfers(parts)
    dispatcher.set_ready(ENGINES[1], True, 1.0)
    await until(lambda: bool(replies), "the answer")
    goes_on.set()
    await running
    assert replies[-1].immediate_response.status.code == 500
    assert (dispatcher.in_flight, dispatcher.held, parts.open) == (0, 0, set())


@pytest.mark.parametrize("mode", [wire.BUFFERED, wire.BUFFERED_PARTIAL, wire.FULL_DUPLEX])
async def test_a_body_that_is_seen_passes_engines_that_exchange_blocks(mode: int) -> None:
    parts = make_parts()
    say_transfers(parts)
    replies = await run(parts, [question_head(mode), *parts_of(QUESTION, [], of_answer=False)])
    assert all(reply.WhichOneof("response") != "immediate_response" for reply in replies)
