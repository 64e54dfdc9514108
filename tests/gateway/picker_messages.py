"""Messages of a proxy to the endpoint picker, and a stream that takes them without a proxy."""

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Iterable
from typing import Any

from moe_contract.documents import parse_model
from moe_contract.gateway_config import GatewayConfig
from moe_contract.picker_config import EndpointPickerConfig
from moe_gateway.endpoint_picker.admission import PickerParts
from moe_gateway.endpoint_picker.stream import Stream
from moe_gateway.endpoint_picker.wire import (
    HeaderMap,
    HeaderValue,
    HttpBody,
    HttpHeaders,
    HttpTrailers,
    Message,
    ProcessingRequest,
    ProtocolConfiguration,
)
from moe_gateway.engines.dispatcher import Dispatcher
from moe_gateway.engines.response_search import ResponseSearch
from moe_gateway.request.body_reader import BodyReader
from moe_gateway.request.context import ExchangeContext
from moe_gateway.request.recent_requests import RecentRequests
from moe_gateway.request_stats import RequestStats

ENGINES = ("10.0.0.1:8000", "[fd00::1]:8000")
QUESTION = json.dumps({"model": "tiny", "prompt": "hello", "stream": True}).encode()
STREAM = b'data: {"choices":[{"index":0,"text":"a"}]}\n\ndata: {"choices":[{"index":0,"text":"b"}]}\n\ndata: [DONE]\n\n'
ONE_PIECE = b'{"choices":[{"index":0,"text":"a"}],"usage":{"prompt_tokens":2}}'


def make_parts(*, ready: bool = True, ranks: tuple[int, int] = (1, 1), **limits: Any) -> PickerParts:
    document = {
        "listen": None,
        "admin": {"port": 1},
        "engines": [
            {"name": name, "url": f"http://{name}", "ranks": count} for name, count in zip(ENGINES, ranks, strict=True)
        ],
        "limits": limits,
        "endpoint_picker": {"listen": {"port": 2}},
    }
    config = parse_model(GatewayConfig, document)
    dispatcher = Dispatcher(config)
    for name in ENGINES:
        dispatcher.set_ready(name, ready, 0.0)
    context = ExchangeContext(
        dispatcher=dispatcher,
        stats=RequestStats(),
        pool_of=lambda _name: None,
        bodies=BodyReader(),
        responses=ResponseSearch(lambda _server: None),
        clock=lambda: 1.0,
        spawn=lambda _task: asyncio.ensure_future(asyncio.sleep(0)),
        on_end=lambda _request, _status, _reason: None,
        recent=RecentRequests(),
    )
    settings = EndpointPickerConfig.model_validate({"listen": {"port": 2}})
    return PickerParts(
        context=context,
        settings=settings,
        limits=config.limits,
        new_request_id=lambda: b"made",
        peer_tokens=None,
    )


def head(**values: str) -> Message:
    rows = {name.replace("_", "-"): value for name, value in values.items()}
    return HeaderMap(headers=[HeaderValue(key=key, raw_value=value.encode()) for key, value in rows.items()])


def question_head(mode: int | None, *, end: bool = False, answer_mode: int | None = None) -> Message:
    rows = {":method": "POST", ":path": "/v1/completions", ":authority": "g", "content-type": "application/json"}
    headers = HeaderMap(headers=[HeaderValue(key=key, raw_value=value.encode()) for key, value in rows.items()])
    modes = ProtocolConfiguration(
        request_body_mode=mode, response_body_mode=mode if answer_mode is None else answer_mode
    )
    return ProcessingRequest(
        request_headers=HttpHeaders(headers=headers, end_of_stream=end),
        protocol_config=None if mode is None else modes,
    )


def parts_of(data: bytes, cuts: Iterable[int], *, of_answer: bool, end: bool = True) -> list[Message]:
    places = [0, *sorted({cut % (len(data) + 1) for cut in cuts}), len(data)]
    pieces = [data[begin:until] for begin, until in itertools.pairwise(places)]
    bodies = [HttpBody(body=piece, end_of_stream=end and at == len(pieces) - 1) for at, piece in enumerate(pieces)]
    return [
        ProcessingRequest(response_body=body) if of_answer else ProcessingRequest(request_body=body) for body in bodies
    ]


def answer_head(status: int = 200, kind: str = "text/event-stream", *, end: bool = False, **more: str) -> Message:
    rows = {":status": str(status), "content-type": kind, **{name.replace("_", "-"): more[name] for name in more}}
    headers = HeaderMap(headers=[HeaderValue(key=key, raw_value=value.encode()) for key, value in rows.items()])
    return ProcessingRequest(response_headers=HttpHeaders(headers=headers, end_of_stream=end))


TRAILERS = ProcessingRequest(request_trailers=HttpTrailers())
ANSWER_TRAILERS = ProcessingRequest(response_trailers=HttpTrailers())


async def run(parts: PickerParts, messages: Iterable[Message]) -> list[Message]:
    replies: list[Message] = []

    async def source() -> AsyncIterator[Message]:
        for message in messages:
            yield message

    async def write(reply: Message) -> None:
        replies.append(reply)

    async with asyncio.timeout(60):
        await Stream(parts).run(source(), write)
    assert parts.context.dispatcher.in_flight == 0
    assert parts.context.dispatcher.held == 0
    assert not parts.open
    assert len(parts.context.open_users) == 0
    return replies


def sent_back(replies: Iterable[Message], kind: str) -> bytes:
    bodies = [getattr(reply, kind).response.body_mutation for reply in replies if reply.WhichOneof("response") == kind]
    return b"".join(body.streamed_response.body for body in bodies)
