"""What moves no more ends: a proxy whose host has vanished, and a request that neither engine nor client moves."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from moe_contract.picker_config import EndpointPickerConfig
from moe_gateway.endpoint_picker import wire
from moe_gateway.endpoint_picker.server import EndpointPicker
from moe_gateway.endpoint_picker.stream import SilentRequest, Stream

from tests.gateway.fronted import PATIENCE_S, Front, until
from tests.gateway.messages import SSE_HEAD, Received, event, prompt
from tests.gateway.peers import never
from tests.gateway.picker_messages import QUESTION, answer_head, make_parts, parts_of, question_head
from tests.gateway.waiting import free_port


class Relay:
    """Passes bytes on until it is silenced; then its connections stay open, as those of a host that has vanished."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._silenced = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: list[asyncio.StreamWriter] = []

    async def start(self) -> int:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    def silence(self) -> None:
        self._silenced.set()

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for writer in self._writers:
            writer.close()
        self._server.close()
        await asyncio.sleep(0)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self._port)
        self._writers += [writer, back]
        for source, sink in ((reader, back), (there, writer)):
            self._tasks.add(asyncio.ensure_future(self._pump(source, sink)))

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        while data := await source.read(65536):
            if self._silenced.is_set():
                await asyncio.Event().wait()
            sink.write(data)


async def test_the_requests_of_a_proxy_whose_host_vanishes_end() -> None:
    parts = make_parts()
    port = free_port()
    parts.settings = EndpointPickerConfig.model_validate({"listen": {"port": port}})
    picker = EndpointPicker(parts, lambda: True, keepalive_s=1.0, keepalive_timeout_s=1.0)
    await picker.start()
    relay = Relay(port)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{await relay.start()}") as channel:
        call = channel.stream_stream(
            f"/{wire.SERVICE}/{wire.METHOD}",
            request_serializer=wire.ProcessingRequest.SerializeToString,
            response_deserializer=wire.ProcessingResponse.FromString,
        )()
        for message in (question_head(wire.FULL_DUPLEX), *parts_of(QUESTION, [], of_answer=False)):
            await call.write(message)
        await call.read()
        assert parts.context.dispatcher.in_flight == 1
        relay.silence()
        await until(lambda: parts.context.dispatcher.in_flight == 0, "the end of the request")
        call.cancel()
    await picker.stop()
    await relay.stop()


@pytest.mark.parametrize("begins", [False, True])
async def test_a_request_that_neither_engine_nor_client_moves_ends_by_the_idle_timeout(begins: bool) -> None:
    parts = make_parts()

    async def source() -> AsyncIterator[wire.Message]:
        yield question_head(wire.FULL_DUPLEX)
        for message in parts_of(QUESTION, [], of_answer=False):
            yield message
        if begins:
            yield answer_head()
            yield parts_of(b'data: {"choices":[{"index":0,"text":"a"}]}\n\n', [], of_answer=True, end=False)[0]
        await asyncio.Event().wait()

    replies: list[wire.Message] = []

    async def write(reply: wire.Message) -> None:
        replies.append(reply)

    stream = Stream(parts)
    running = asyncio.ensure_future(stream.run(source(), write))
    await until(lambda: len(replies) == (4 if begins else 2), "the replies")
    idle_s = parts.limits.idle_timeout_s
    stream.check(1.0 + idle_s - 0.1)
    assert parts.context.dispatcher.in_flight == 1
    stream.check(1.0 + idle_s)
    assert parts.context.dispatcher.in_flight == 0
    async with asyncio.timeout(PATIENCE_S):
        with pytest.raises(SilentRequest):
            await running
    assert parts.context.stats.requests == {("completions", 504): 1}
    assert not parts.open


@pytest.mark.parametrize("begins", [False, True])
async def test_a_proxy_ends_a_silent_request(front: Front, make_engine: Any, begins: bool) -> None:
    async def first_token(_request: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(SSE_HEAD + event("one"))
        await asyncio.Event().wait()

    engine = await make_engine(first_token if begins else never)
    fronted = await front(engine, limits={"idle_timeout_s": 1.0})
    with contextlib.suppress(Exception):
        answer = await fronted.ask(json.dumps(prompt(stream=True)).encode())
        assert answer[0] >= 500
    await fronted.settled()
    assert fronted.gateway.stats.requests == {("completions", 504): 1}


async def test_a_request_whose_check_fails_ends_for_its_proxy_too() -> None:
    parts = make_parts()
    port = free_port()
    parts.settings = EndpointPickerConfig.model_validate({"listen": {"port": port}})
    picker = EndpointPicker(parts, lambda: True)
    await picker.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.stream_stream(
            f"/{wire.SERVICE}/{wire.METHOD}",
            request_serializer=wire.ProcessingRequest.SerializeToString,
            response_deserializer=wire.ProcessingResponse.FromString,
        )()
        for message in (question_head(wire.FULL_DUPLEX), *parts_of(QUESTION, [], of_answer=False)):
            await call.write(message)
        await call.read()
        (stream,) = parts.open

        def fail(now_s: float) -> None:
            raise KeyError("one that nobody expects")

        stream.check = fail  # type: ignore[method-assign]
        picker.check(1.0)
        async with asyncio.timeout(PATIENCE_S):
            # The other reply to the request, then the end.
            await call.read()
            with pytest.raises(grpc.aio.AioRpcError) as ended:
                await call.read()
        assert ended.value.code() is grpc.StatusCode.INTERNAL
        assert parts.context.dispatcher.in_flight == 0
    await picker.stop()
