"""Which event of a stream is its first token, and which is an error of whom."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_gateway.request.stream_events import (
    AnswerPart,
    ends_stream,
    find_error,
    part_of_status,
    read_beginning,
    read_event,
    split_chunks,
)

PENDING, TOKEN, WHOLE = AnswerPart.PENDING, AnswerPart.TOKEN, AnswerPart.WHOLE
REFUSAL, ENGINE_ERROR = AnswerPart.REFUSAL, AnswerPart.ENGINE_ERROR


def delta(**fields):
    return {"choices": [{"index": 0, "delta": fields, "finish_reason": None}]}


def error(code, kind="x"):
    return {"error": {"message": "no", "type": kind, "param": None, "code": code}}


def within(code):
    """An error within a stream of `/v1/messages`, as vLLM 0.32 sends it."""
    message = (
        "2 validation errors for ChatCompletionStreamResponse\nmodel\n  Field required [type=missing, "
        f"input_value={{'error': {{'message': 'Gr...am': None, 'code': {code}}}}}, input_type=dict]"
    )
    return {"type": "error", "error": {"type": "internal_error", "message": message}}


def message(kind, **fields):
    return {"type": kind, **fields}


DOCUMENTS = {
    "role": (delta(role="assistant", content=""), PENDING),
    "role without content": (delta(role="assistant"), PENDING),
    "role and null": (delta(role="assistant", content=None, tool_calls=None), PENDING),
    "no delta": (delta(), PENDING),
    "usage": ({"choices": [], "usage": {"prompt_tokens": 3}}, PENDING),
    "content": (delta(content="x"), TOKEN),
    "role and content": (delta(role="assistant", content="x"), TOKEN),
    "half a character": (delta(content=""), TOKEN),
    "reasoning": (delta(reasoning="x"), TOKEN),
    "reasoning, older name": (delta(role="assistant", reasoning_content="x"), TOKEN),
    "tool call": (delta(role="assistant", tool_calls=[{"index": 0}]), TOKEN),
    "end at once": ({"choices": [{"delta": {"role": "assistant"}, "finish_reason": "stop"}]}, TOKEN),
    "the second choice": ({"choices": [{"delta": {"role": "a"}}, {"delta": {"content": "x"}}]}, TOKEN),
    "completion": ({"choices": [{"index": 0, "text": ""}]}, TOKEN),
    "of no known shape": ({"text": "x"}, TOKEN),
    "bad request": (error(400), REFUSAL),
    "not found": (error("404"), REFUSAL),
    "not implemented": (error(501), REFUSAL),
    "no code, a client's type": (error(None, "invalid_request_error"), REFUSAL),
    "no code, vLLM's type": (error(None, "BadRequestError"), REFUSAL),
    "server error": (error(500), ENGINE_ERROR),
    "no code": (error(None, "InternalServerError"), ENGINE_ERROR),
    "no object": ({"error": "boom"}, ENGINE_ERROR),
    "older error, client": ({"object": "error", "message": "no", "code": 400}, REFUSAL),
    "older error": ({"object": "error", "message": "no", "code": 500}, ENGINE_ERROR),
    "responses: error": ({"type": "error", "code": "server_error", "message": "no"}, ENGINE_ERROR),
    "messages: start": (message("message_start", message={"role": "assistant", "content": []}), PENDING),
    "messages: ping": (message("ping"), PENDING),
    "messages: block": (message("content_block_start", content_block={"type": "text", "text": ""}), PENDING),
    "messages: text": (message("content_block_delta", delta={"type": "text_delta", "text": "x"}), TOKEN),
    "messages: thinking": (message("content_block_delta", delta={"type": "thinking_delta", "thinking": "x"}), TOKEN),
    "messages: call": (message("content_block_delta", delta={"type": "input_json_delta", "partial_json": "{"}), TOKEN),
    "messages: no token": (message("message_delta", delta={"stop_reason": "max_tokens"}), WHOLE),
    "messages: end": (message("message_stop"), WHOLE),
    "messages: error": (message("error", error={"type": "api_error", "message": "no"}), ENGINE_ERROR),
    "messages: bad": (message("error", error={"type": "invalid_request_error", "message": "no"}), REFUSAL),
    "messages: an error within, client": (within(400), REFUSAL),
    "messages: an error within": (within(500), ENGINE_ERROR),
    "responses: created": ({"type": "response.created", "response": {"error": None}}, PENDING),
    "responses: item": ({"type": "response.output_item.added", "item": {}}, PENDING),
    "responses: text": ({"type": "response.output_text.delta", "delta": "x"}, TOKEN),
    "responses: arguments": ({"type": "response.function_call_arguments.delta", "delta": "{"}, TOKEN),
    "responses: reasoning": ({"type": "response.reasoning_text.delta", "delta": "x"}, TOKEN),
    "responses: completed": ({"type": "response.completed", "response": {"error": None}}, WHOLE),
    "responses: failed": ({"type": "response.failed", "response": {"error": {"code": "server_error"}}}, ENGINE_ERROR),
    "responses: bad": ({"type": "response.failed", "response": {"error": {"code": "invalid_prompt"}}}, REFUSAL),
}


@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": ")], ids=["tight", "spaced"])
@pytest.mark.parametrize(("document", "part"), DOCUMENTS.values(), ids=DOCUMENTS)
@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n"], ids=["LF", "CRLF"])
def test_what_an_event_shows(document, part, separators, end):
    event = b"data: " + json.dumps(document, separators=separators).encode() + end
    assert read_event(event) is part
    assert read_beginning(event).part is part
    name = document.get("type", "")
    if name.startswith(("response.", "message", "content", "ping")):
        named = b"event: " + name.encode() + end[: len(end) // 2] + event
        assert read_beginning(named).part is part
    status = find_error(event)
    assert (part_of_status(status) if status else None) is (part if part in (REFUSAL, ENGINE_ERROR) else None)


def test_what_comes_before_the_first_token_is_kept_in_order_and_comments_apart():
    role, token = (b"data: " + json.dumps(DOCUMENTS[name][0]).encode() + b"\n\n" for name in ("role", "content"))
    beginning = read_beginning(b": ping\n\n" + role + b": ping\n\n: two\n: lines\n\nda")
    assert beginning == (PENDING, b": ping\n\n: ping\n\n: two\n: lines\n\n", role + b"da")
    assert read_beginning(role + token) == (TOKEN, b"", role + token)
    assert read_beginning(b"data: [DONE]\n\n").part is WHOLE
    assert read_beginning(b"").part is PENDING


def test_an_error_within_a_text_is_no_error():
    text = 'data: {"error": {"code": 500}}'
    event = b"data: " + json.dumps(delta(content=text)).encode() + b"\n\n"
    assert (read_beginning(event).part, find_error(event)) == (TOKEN, 0)


@given(st.lists(st.binary(min_size=1, max_size=40), max_size=6), st.integers(0, 30))
def test_chunks_are_taken_apart_and_the_unfinished_one_stays(pieces, cut):
    raw = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
    assert split_chunks(raw + b"0\r\n\r\n") == (b"".join(pieces), b"0\r\n\r\n")
    data, rest = split_chunks(raw[: max(0, len(raw) - cut)])
    assert b"".join(pieces).startswith(data)
    assert raw[: max(0, len(raw) - cut)].endswith(rest)


@given(st.binary(max_size=200))
def test_whatever_an_engine_sends_is_read(data):
    beginning = read_beginning(data)
    assert len(beginning.comments) + len(beginning.events) == len(data)
    split_chunks(data), find_error(data)


@pytest.mark.parametrize(
    ("status", "part"),
    [(200, WHOLE), (400, REFUSAL), (429, REFUSAL), (501, REFUSAL), (500, ENGINE_ERROR), (502, ENGINE_ERROR)],
)
def test_what_a_status_shows(status, part):
    assert part_of_status(status) is part


ENDS = {
    "done": (b"data: [DONE]\n\n", True),
    "done in a chunk": (b"e\r\ndata: [DONE]\n\n\r\n", True),
    "the last chunk": (b"e\r\ndata: [DONE]\n\n\r\n0\r\n", True),
    "CRLF": (b"data: [DONE]\r\n\r\n", True),
    "completed": (b'event: response.completed\ndata: {"response": {"id": "1"}}\n\n', True),
    "end of a long last event": (b'..."sequence_number":9,"type":"response.completed"}\n\n\r\n', True),
    "failed": (b'event: response.failed\ndata: {"response": {}}\n\n', True),
    "message_stop": (b'event: message_stop\ndata: {"type":"message_stop"}\n\n', True),
    "message_stop in a chunk": (b'33\r\nevent: message_stop\ndata: {"type": "message_stop"}\n\n\r\n', True),
    "message_delta": (b'event: message_delta\ndata: {"type":"message_delta"}\n\n', False),
    "message_stop in a text": (b'data: {"delta":{"text":"\\"type\\":\\"message_stop"}}\n\n', False),
    "a token": (b'data: {"choices": []}\n\n', False),
    "half of the last event": (b'event: response.completed\ndata: {"response": {}', False),
    "something after it": (b'data: [DONE]\n\ndata: {"x": 1}\n\n', False),
    "nothing": (b"", False),
}


@pytest.mark.parametrize(("data", "ends"), ENDS.values(), ids=ENDS)
def test_a_stream_ends_with_its_last_event(data, ends):
    assert ends_stream(data) is ends
