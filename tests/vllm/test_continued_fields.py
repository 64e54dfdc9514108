"""The fields of vLLM's completions and chats against those that a stream may have which goes on at another engine."""

import pytest
from moe_gateway.continuation.ways import Way, find_way, is_repeatable
from moe_gateway.http.routes import Route


@pytest.mark.filterwarnings("ignore")
def test_every_field_of_vllm_is_sorted():
    """A field that a later vLLM adds rules out the prefix until somebody has looked at it."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    given = {"temperature": 0, "prompt": "x"}
    fields = {*ChatCompletionRequest.model_fields, *CompletionRequest.model_fields} - {*given, "n"}
    ways = {
        name: find_way(Route.CHAT, given | {name: "unknown"}, has_media=False, by_prefix=True)
        for name in sorted(fields)
    }
    assert {name for name, way in ways.items() if way is None} == {
        "ec_transfer_params",
        "kv_transfer_params",
        "prompt_logprobs",
        "use_beam_search",
        "vllm_xargs",
    }
    # `return_weight_versions` is one of vLLM 0.33.
    assert {name for name, way in ways.items() if way is Way.REPLAY} - {"return_weight_versions"} == {
        *("bad_words", "echo", "frequency_penalty", "logprob_token_ids", "logprobs", "max_completion_tokens"),
        *("max_tokens", "media_io_kwargs", "min_tokens", "mm_payload", "mm_processor_kwargs"),
        *("presence_penalty", "prompt_embeds", "repetition_detection", "response_format", "return_mm_kwargs"),
        *("return_prompt_text", "return_token_offsets", "return_tokens_as_token_ids", "routed_experts_prompt_start"),
        *("structured_outputs", "suffix", "thinking_token_budget", "tools", "watermarking"),
    }


@pytest.mark.filterwarnings("ignore")
def test_fields_of_messages_and_responses_that_rule_out_a_second_answer():
    from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

    refused = {
        route: {name for name in fields if not is_repeatable(route, {"temperature": 0} | {name: "unknown"})}
        for route, fields in (
            (Route.MESSAGES, AnthropicMessagesRequest.model_fields),
            (Route.RESPONSES, ResponsesRequest.model_fields),
        )
    }
    both = {"temperature", "ec_transfer_params", "kv_transfer_params", "vllm_xargs"}
    assert refused == {
        Route.MESSAGES: both,
        Route.RESPONSES: both | {"background", "previous_response_id", "tools"},
    }
    assert "seed" not in AnthropicMessagesRequest.model_fields
    assert "return_token_ids" not in {*AnthropicMessagesRequest.model_fields, *ResponsesRequest.model_fields}
