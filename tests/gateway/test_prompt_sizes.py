"""The size of a prompt counts all that a chat template renders, and images by what they cost."""

import json

import pytest
from moe_gateway.engines.job_builder import JobBuilder
from moe_gateway.http.routes import Route
from moe_gateway.request.parsing import parse_body

IMAGE = "data:image/jpeg;base64," + "A" * 80_000
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": f"tool_{number}",
            "description": "Does a thing with a file. " * 20,
            "parameters": {"type": "object", "properties": {"path": {"type": "string"}}},
        },
    }
    for number in range(25)
]
CALL = {
    "id": "a",
    "type": "function",
    "function": {"name": "write", "arguments": json.dumps({"text": "line\n" * 4000})},
}
TOOLS_TOKENS = len(json.dumps(TOOLS)) / 4
SIZES = {
    "a plain chat": (Route.CHAT, {"messages": [{"role": "user", "content": "word " * 800}]}, 1000),
    "tools": (
        Route.CHAT,
        {"messages": [{"role": "user", "content": "list"}], "tools": TOOLS},
        TOOLS_TOKENS,
    ),
    "functions": (Route.CHAT, {"messages": [], "functions": TOOLS}, TOOLS_TOKENS),
    "arguments of a call": (
        Route.CHAT,
        {"messages": [{"role": "assistant", "content": None, "tool_calls": [CALL]}]},
        6000,
    ),
    "an older call": (
        Route.CHAT,
        {"messages": [{"role": "assistant", "function_call": {"name": "w", "arguments": "x" * 4000}}]},
        1000,
    ),
    "reasoning": (Route.CHAT, {"messages": [{"role": "assistant", "reasoning": "hmm " * 1000, "content": "x"}]}, 1000),
    "reasoning_content": (
        Route.CHAT,
        {"messages": [{"role": "assistant", "reasoning_content": "hmm " * 1000, "content": "x"}]},
        1000,
    ),
    "the result of a tool": (
        Route.CHAT,
        {"messages": [{"role": "tool", "tool_call_id": "a", "content": [{"type": "text", "text": "word " * 800}]}]},
        1000,
    ),
    "images": (
        Route.CHAT,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": IMAGE}}] * 3}]},
        3000,
    ),
    "audio": (
        Route.CHAT,
        {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": IMAGE}}]}]},
        400,
    ),
    "responses: tools": (Route.RESPONSES, {"input": "list", "tools": TOOLS}, TOOLS_TOKENS),
    "responses: function output": (
        Route.RESPONSES,
        {"input": [{"type": "function_call_output", "call_id": "c", "output": "line of a file\n" * 400}]},
        1500,
    ),
    "responses: function call": (
        Route.RESPONSES,
        {"input": [{"type": "function_call", "name": "w", "arguments": "x" * 4000}]},
        1000,
    ),
    "responses: reasoning": (
        Route.RESPONSES,
        {"input": [{"type": "reasoning", "summary": [{"type": "summary_text", "text": "x" * 4000}]}]},
        1000,
    ),
    "responses: an image": (
        Route.RESPONSES,
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": IMAGE}]}]},
        1000,
    ),
}


def parse(route, document):
    return parse_body(route, json.dumps({"model": "m"} | document).encode())


@pytest.mark.parametrize(("route", "document", "tokens"), SIZES.values(), ids=SIZES)
def test_a_prompt_has_about_its_size_at_once_and_spoils_no_other(route, document, tokens):
    jobs, parsed = JobBuilder(), parse(route, document)
    assert jobs.build(parsed, None)[0].prompt_tokens == pytest.approx(tokens, rel=0.15, abs=30)
    for _ in range(30):
        jobs.learn_tokens(parsed, int(tokens))
    plain = parse(*SIZES["a plain chat"][:2])
    assert jobs.build(plain, None)[0].prompt_tokens == pytest.approx(1000, rel=0.15)


def test_the_cost_of_an_image_is_learned_and_leaves_the_text_alone():
    jobs, parsed = JobBuilder(), parse(*SIZES["images"][:2])
    for _ in range(20):
        jobs.learn_tokens(parsed, 3 * 250 + 60)
    assert jobs.build(parsed, None)[0].prompt_tokens == pytest.approx(3 * 250 + 60, rel=0.1)
    text = parse(*SIZES["a plain chat"][:2])
    assert jobs.build(text, None)[0].prompt_tokens == pytest.approx(1000, rel=0.01)


def test_another_image_is_another_prompt():
    def text(end):
        part = {"type": "image_url", "image_url": {"url": IMAGE + end}}
        return parse(Route.CHAT, {"messages": [{"role": "user", "content": [part]}]}).prompt

    assert text("B") != text("C")
    assert len(text("B")) < 200


def test_a_continued_response_teaches_nothing_about_texts():
    jobs = JobBuilder()
    parsed = parse(Route.RESPONSES, {"input": "short", "previous_response_id": "resp_1"})
    for _ in range(30):
        jobs.learn_tokens(parsed, 50_000)
    assert jobs.build(parse(*SIZES["a plain chat"][:2]), None)[0].prompt_tokens == pytest.approx(1000, rel=0.01)
