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


def block(kind, **fields):
    """A content block of Anthropic's API."""
    return {"type": kind, **fields}


IMAGE_BLOCK = block("image", source={"type": "base64", "media_type": "image/jpeg", "data": IMAGE})
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
    "messages: a system prompt": (
        Route.MESSAGES,
        {"system": [{"type": "text", "text": "word " * 400}], "messages": [{"role": "user", "content": "word " * 400}]},
        1000,
    ),
    "messages: tools": (
        Route.MESSAGES,
        {"messages": [{"role": "user", "content": "list"}], "tools": TOOLS},
        TOOLS_TOKENS,
    ),
    "messages: a call": (
        Route.MESSAGES,
        {
            "messages": [
                {"role": "assistant", "content": [block("tool_use", id="a", name="write", input={"text": "x" * 4000})]}
            ]
        },
        1000,
    ),
    "messages: the result of a tool": (
        Route.MESSAGES,
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        block("tool_result", tool_use_id="a", content="word " * 400),
                        block("tool_result", tool_use_id="b", content=[block("text", text="word " * 400)]),
                    ],
                }
            ]
        },
        1000,
    ),
    "messages: thinking": (
        Route.MESSAGES,
        {
            "messages": [
                {
                    "role": "assistant",
                    "content": [
                        block("thinking", thinking="hmm " * 1000, signature="s" * 4000),
                        block("redacted_thinking", data="x" * 4000),
                    ],
                }
            ]
        },
        1000,
    ),
    "messages: images": (
        Route.MESSAGES,
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        IMAGE_BLOCK,
                        block("tool_result", tool_use_id="a", content=[IMAGE_BLOCK]),
                    ],
                }
            ]
        },
        2000,
    ),
    "batch": (Route.CHAT_BATCH, {"messages": [[{"role": "user", "content": "word " * 400}]] * 2}, 1000),
    "token ids": (Route.GENERATE, {"token_ids": [7] * 1000}, 1000),
    "token ids and an image": (
        Route.GENERATE,
        {"token_ids": [7] * 1000, "content_parts": [{"type": "image_url", "image_url": {"url": IMAGE}}]},
        1000,
    ),
    "a decision": (
        Route.DECISIONS,
        {"state": {"text": "x" * 2000}, "questions": {"q": {"type": "boolean", "instructions": "x" * 2000}}},
        1000,
    ),
    "a decision on an image": (Route.DECISIONS, {"state": "", "questions": {}, "images": [IMAGE]}, 1000),
    "rerank": (Route.RERANK_V2, {"query": "q" * 400, "documents": ["d" * 400] * 5}, 1000),
    "rerank objects": (
        Route.RERANK,
        {"query": "q" * 400, "documents": [{"content": [{"type": "text", "text": "d" * 400}]}] * 5},
        1000,
    ),
    "score": (Route.SCORE, {"text_1": "q" * 2000, "text_2": "d" * 2000}, 1000),
    "score pairs": (Route.SCORE_V1, {"queries": ["q" * 400] * 5, "documents": ["d" * 400] * 5}, 1000),
    "generative scoring": (Route.GENERATIVE_SCORING, {"query": [7] * 100, "items": [[1] * 100] * 5}, 1000),
    "generative scoring of texts": (Route.GENERATIVE_SCORING, {"query": "q" * 400, "items": ["d" * 400] * 5}, 1000),
    "classify": (Route.CLASSIFY, {"input": ["x" * 2000] * 2}, 1000),
    "classify a chat": (Route.CLASSIFY, {"messages": [{"role": "user", "content": "x" * 4000}]}, 1000),
    "pooling": (Route.POOLING, {"input": [7] * 1000}, 1000),
    "pooling by a plugin": (Route.POOLING, {"data": "x" * 4000}, 1000),
    "embed: texts": (Route.EMBED_V2, {"texts": ["x" * 2000] * 2}, 1000),
    "embed: images": (Route.EMBED_V2, {"images": [IMAGE] * 2}, 2000),
    "embed: inputs": (
        Route.EMBED_V2,
        {"inputs": [{"content": [{"type": "text", "text": "x" * 4000}]}]},
        1000,
    ),
    "documents": (Route.CHAT, {"messages": [], "documents": [{"title": "a", "text": "word " * 800}]}, 1000),
    "tools of a developer": (
        Route.CHAT,
        {"messages": [{"role": "developer", "content": "list", "tools": TOOLS}, {"role": "user", "content": "x"}]},
        TOOLS_TOKENS,
    ),
    "arguments as an object": (
        Route.CHAT,
        {
            "messages": [
                {"role": "assistant", "tool_calls": [{"function": {"name": "w", "arguments": {"path": "x" * 4000}}}]}
            ]
        },
        1000,
    ),
    "a call of a custom tool": (
        Route.CHAT,
        {"messages": [{"role": "assistant", "tool_calls": [{"custom": {"name": "w", "input": "x" * 4000}}]}]},
        1000,
    ),
    "a part of thinking": (
        Route.CHAT,
        {"messages": [{"role": "assistant", "content": [{"type": "thinking", "thinking": "hmm " * 1000}]}]},
        1000,
    ),
    "reasoning under both names": (
        Route.CHAT,
        {"messages": [{"role": "assistant", "reasoning": "hmm " * 1000, "reasoning_content": "hmm " * 1000}]},
        1000,
    ),
    "video as embeddings": (
        Route.CHAT,
        {"messages": [{"role": "user", "content": [{"type": "video_embeds", "video_embeds": IMAGE}]}]},
        4000,
    ),
    "a part of embeddings": (
        Route.CHAT,
        {"messages": [{"role": "user", "content": [{"type": "prompt_embeds", "data": IMAGE}]}]},
        100,
    ),
    "embeddings": (Route.COMPLETIONS, {"prompt_embeds": IMAGE}, 100),
    "lists of embeddings": (Route.COMPLETIONS, {"prompt": "x" * 4000, "prompt_embeds": [IMAGE] * 2}, 1200),
    "prompts": (Route.COMPLETIONS, {"prompt": ["x" * 2000] * 2}, 1000),
    "prompts of token ids": (Route.COMPLETIONS, {"prompt": [[7] * 500] * 2}, 1000),
    "responses: a call of a custom tool": (
        Route.RESPONSES,
        {"input": [{"type": "custom_tool_call", "call_id": "c", "name": "w", "input": "x" * 4000}]},
        1000,
    ),
    "responses: reasoning and its summary": (
        Route.RESPONSES,
        {
            "input": [
                {
                    "type": "reasoning",
                    "summary": [{"type": "summary_text", "text": "x" * 4000}],
                    "content": [{"type": "reasoning_text", "text": "x" * 4000}],
                }
            ]
        },
        1000,
    ),
    "responses: earlier messages": (
        Route.RESPONSES,
        {"input": "x", "previous_input_messages": [{"role": "user", "content": "x" * 4000}]},
        1000,
    ),
    "rerank the parts of an object": (
        Route.RERANK,
        {"query": "q" * 400, "documents": {"content": [{"type": "text", "text": "d" * 400}] * 5}},
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


@pytest.mark.parametrize("where", ["system", "blocks", "message"])
def test_the_billing_header_of_a_coding_agent_is_no_part_of_its_prompt(where):
    def prompt(billing):
        header, text = f"x-anthropic-billing-header: cch={billing};", "word " * 100
        user = {"role": "user", "content": text}
        match where:
            case "system":
                document = {"system": header, "messages": [user]}
            case "blocks":
                blocks = [block("text", text=header), block("text", text=text)]
                document = {"system": blocks, "messages": [user]}
            case _:
                document = {"messages": [{"role": "system", "content": header}, user]}
        return parse(Route.MESSAGES, document).prompt

    assert prompt("a1") == prompt("b2")
    assert b"word" in prompt("a1")


def test_a_long_query_is_not_multiplied_without_bound():
    parsed = parse(Route.RERANK, {"query": "q" * 100_000, "documents": ["d"] * 10_000})
    assert len(parsed.prompt) < 1_200_000


def test_counting_tokens_is_no_work():
    parsed = parse(Route.COUNT_TOKENS, {"messages": [{"role": "user", "content": "word " * 800}]})
    assert (parsed.prompt_tokens, Route.COUNT_TOKENS.has_job) == (0, False)
