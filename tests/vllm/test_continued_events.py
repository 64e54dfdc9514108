"""The events that vLLM itself writes for messages and responses, cut anywhere and computed anew; without an engine."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from moe_contract.gateway_config import ContinuedStreams
from moe_gateway.continuation.find import find_continuation
from moe_gateway.http.routes import Route
from moe_gateway.request.context import ClientRequest
from moe_gateway.request.parsing import parse_body
from moe_gateway.request.stream_events import split_chunks

from tests.gateway.messages import SSE_HEAD, chunk
from tests.gateway.speaking_engine import MESSAGES, RESPONSES, Part, Speaking, read_event
from tests.gateway.test_continued_events import PARTS, PATHS, body_of, events, unsigned, whole

pytestmark = pytest.mark.filterwarnings("ignore")


def deltas(parts: tuple[Part, ...], number: int, size: int) -> Iterator[Any]:
    """What vLLM's parsers make of the tokens of an answer."""
    from vllm.entrypoints.generate.base.protocol import DeltaFunctionCall, DeltaMessage, DeltaToolCall

    calls = 0
    for part in parts:
        for begin in range(0, len(part.text), size):
            text = part.text[begin : begin + size]
            if part.kind == "tool":
                function = DeltaFunctionCall(arguments=text)
                call = DeltaToolCall(index=calls, function=function)
                if begin == 0:
                    function.name, call.id, call.type = part.name, f"call-{number}-{calls}", "function"
                yield DeltaMessage(tool_calls=[call])
            else:
                yield DeltaMessage(**{"content" if part.kind == "text" else "reasoning": text})
        calls += part.kind == "tool"


def write_messages(number: int, size: int) -> list[bytes]:
    from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
    from vllm.entrypoints.openai.chat_completion import protocol

    # Those of vLLM 0.33; 0.32 reads the events of a chat.
    reads_objects = "chat_completion_stream_generator" in vars(AnthropicServingMessages)
    head = {"id": f"chatcmpl-{number}", "object": "chat.completion.chunk", "created": 7, "model": "tiny"}
    usage = {"prompt_tokens": 5, "total_tokens": 14, "completion_tokens": 9}
    rows = [{"delta": {"role": "assistant", "content": ""}}]
    rows += [{"delta": delta.model_dump(exclude_unset=True)} for delta in deltas(PARTS, number, size)]
    rows += [{"delta": {"content": ""}, "finish_reason": "tool_calls"}]

    async def chat() -> AsyncIterator[Any]:
        for choices in (*([{"index": 0} | row] for row in rows), []):
            document = head | {"choices": choices, "usage": usage}
            yield (
                protocol.ChatCompletionStreamResponse(**document) if reads_objects else f"data: {json.dumps(document)}"
            )
        if not reads_objects:
            yield "data: [DONE]"

    async def convert() -> list[bytes]:
        serving = AnthropicServingMessages.__new__(AnthropicServingMessages)
        return [row.encode() async for row in serving.message_stream_converter(chat())]

    return asyncio.run(convert())


def write_responses(number: int, size: int, **fields: Any) -> list[bytes]:
    from vllm.entrypoints.openai.responses import protocol
    from vllm.entrypoints.openai.responses.streaming_events import SimpleStreamingEventProcessor

    request = protocol.ResponsesRequest(model="tiny", input="hello", temperature=0, **fields)
    sampling = request.to_sampling_params(60)

    def response(status: str, output: list[Any], usage: Any = None) -> Any:
        return protocol.ResponsesResponse.from_request(
            request, sampling, "tiny", created_time=100 + number, output=output, status=status, usage=usage
        )

    processor = SimpleStreamingEventProcessor()
    first = response("in_progress", [])
    rows = [
        protocol.ResponseCreatedEvent(type="response.created", sequence_number=-1, response=first),
        protocol.ResponseInProgressEvent(type="response.in_progress", sequence_number=-1, response=first),
    ]
    for delta in deltas(PARTS, number, size):
        state, call = processor.resolve_target_state(delta)
        if processor.needs_transition(state, call):
            rows += [*processor.close_current(), *processor.open(state, call)]
        rows += processor.emit_delta(delta, None)
    rows += processor.close_current()
    usage = {"input_tokens": 5, "output_tokens": 9, "total_tokens": 14, "output_tokens_details": {}}
    usage["input_tokens_details"] = {"cached_tokens": 0, "cache_write_tokens": 0}
    last = response("completed", processor.output_items, protocol.ResponseUsage(**usage))
    rows.append(protocol.ResponseCompletedEvent(type="response.completed", sequence_number=-1, response=last))
    for at, row in enumerate(rows):
        row.sequence_number = at
    return [f"event: {row.type}\ndata: {row.model_dump_json(by_alias=True)}\n\n".encode() for row in rows]


def write(route: Route, number: int, size: int, **fields: Any) -> list[bytes]:
    return write_messages(number, size) if route is Route.MESSAGES else write_responses(number, size, **fields)


def kinds(rows: list[Any]) -> list[tuple[str, ...]]:
    """What each event is, and which fields it has; runs of deltas as one."""
    found: list[tuple[str, ...]] = []
    for row in rows:
        block = (row.get("item") or row.get("content_block") or {}).get("type", "")
        delta = row.get("delta", {})
        kind = (row["type"], block, delta["type"] if type(delta) is dict and "type" in delta else "", *sorted(row))
        if not found or found[-1] != kind:
            found.append(kind)
    return found


@pytest.mark.parametrize("route", PATHS)
def test_the_mock_engine_writes_events_as_vllm_does(route):
    path = MESSAGES if route is Route.MESSAGES else RESPONSES
    mock = [read_event(row) for row in Speaking(parts=PARTS).events(path, {})]
    assert kinds(mock) == kinds([read_event(row) for row in write(route, 1, 3)])


@pytest.mark.parametrize("route", PATHS)
def test_vllms_events_are_one_stream_wherever_they_are_cut(route):
    data = json.dumps(body_of(route)).encode()
    request = ClientRequest(b"POST", PATHS[route].encode(), b"", data, b"id", None, True, False, 0.0)
    first = write(route, 1, 3)
    want = unsigned(whole(route, [read_event(row) for row in first]))
    second = {}
    begun = next(at for at, row in enumerate(first) if b"delta" in row) + 1
    for cut in range(begun, len(first)):
        stream = find_continuation(request, route, parse_body(route, data), ContinuedStreams())
        assert stream is not None
        stream.start()
        out = stream.read(SSE_HEAD + b"".join(map(chunk, first[:cut])), has_begun=False)
        if (ending := stream.build_ending()) is None:
            stream.prepare(None)
            fields = {name: value for name, value in json.loads(stream.start()[1]).items() if name == "request_id"}
            # The same response whatever the cut is.
            second = second or {"rows": write(route, 2, 5, **fields)}
            ending = stream.read(SSE_HEAD + b"".join(map(chunk, second["rows"])) + b"0\r\n\r\n", has_begun=True)
        assert stream.failure is None
        passed, rest = split_chunks((out + ending).removeprefix(SSE_HEAD))
        assert rest == b"0\r\n\r\n"
        assert unsigned(whole(route, events(passed))) == want, cut
