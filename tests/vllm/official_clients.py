"""What the official Python clients of OpenAI and Anthropic do with a server; each check returns what is comparable.

Greedy, so that two servers with the same model give the same answers. No client repeats a request by itself.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import anthropic
import openai

GREEDY = {"temperature": 0}
ASKED = [{"role": "user", "content": "hello"}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False}
TOOL = {"type": "function", "function": {"name": "pick", "description": "Picks.", "parameters": SCHEMA}}
CHAT = {"model": "tiny", "messages": ASKED, "max_tokens": 6, "temperature": 0}
RESPONSE = {"model": "tiny", "input": "hello", "max_output_tokens": 5, "temperature": 0}
MESSAGE = {"model": "tiny", "messages": ASKED, "max_tokens": 6, "extra_body": GREEDY}
LONG = {"ignore_eos": True}


def open_openai(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=120)


def open_anthropic(url: str) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=url, api_key="any", max_retries=0, timeout=120)


def kinds(events: Iterable[Any]) -> list[str]:
    """The types of events, each once: a busy engine may put several tokens into one event."""
    return list(dict.fromkeys(event.type for event in events))


def chat(client: openai.OpenAI) -> Any:
    answer = client.chat.completions.create(**CHAT)
    return answer.choices[0].message.content, answer.choices[0].finish_reason, answer.usage.prompt_tokens


def chat_stream(client: openai.OpenAI) -> Any:
    chunks = list(client.chat.completions.create(**CHAT, stream=True, stream_options={"include_usage": True}))
    text = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
    return "".join(part or "" for part in text), chunks[-1].usage.completion_tokens


def chat_helper(client: openai.OpenAI) -> Any:
    with client.chat.completions.stream(**CHAT) as stream:
        return kinds(stream)


def tools(client: openai.OpenAI) -> Any:
    choice = {"type": "function", "function": {"name": "pick"}}
    made = CHAT | {"tools": [TOOL], "tool_choice": choice, "max_tokens": 60}
    call = client.chat.completions.create(**made).choices[0].message.tool_calls[0].function
    parts = [chunk.choices[0].delta.tool_calls for chunk in client.chat.completions.create(**made, stream=True)]
    streamed = "".join(call.function.arguments or "" for calls in parts for call in calls or ())
    assert streamed == call.arguments
    return call.name, call.arguments


def logprobs(client: openai.OpenAI) -> Any:
    answer = client.chat.completions.create(**CHAT, logprobs=True, top_logprobs=2)
    return [(row.token, [top.token for top in row.top_logprobs]) for row in answer.choices[0].logprobs.content]


def several_choices(client: openai.OpenAI) -> Any:
    answer = client.chat.completions.create(**CHAT | {"temperature": 1.0}, n=3, seed=7)
    return [choice.index for choice in answer.choices]


def structured_outputs(client: openai.OpenAI) -> Any:
    form = {"type": "json_schema", "json_schema": {"name": "made", "schema": {"enum": ["x"]}, "strict": True}}
    answer = client.chat.completions.create(**CHAT | {"max_tokens": 20}, response_format=form)
    text = client.completions.create(
        model="tiny", prompt="a", max_tokens=9, temperature=0, extra_body={"structured_outputs": {"regex": "ab{3}"}}
    )
    return answer.choices[0].message.content, text.choices[0].text


def completions(client: openai.OpenAI) -> Any:
    fields = {"model": "tiny", "prompt": [1, 2, 3], "max_tokens": 5, "temperature": 0}
    whole = client.completions.create(**fields, extra_body={"return_token_ids": True}, logprobs=1)
    streamed = "".join(chunk.choices[0].text for chunk in client.completions.create(**fields, stream=True))
    assert streamed == whole.choices[0].text
    return whole.choices[0].token_ids, whole.usage.prompt_tokens


def responses(client: openai.OpenAI) -> Any:
    first = client.responses.create(**RESPONSE)
    second = client.responses.create(**RESPONSE, previous_response_id=first.id)
    assert client.responses.retrieve(first.id).output_text == first.output_text
    assert second.previous_response_id == first.id
    return first.output_text, second.output_text


def responses_stream(client: openai.OpenAI) -> Any:
    with client.responses.stream(**RESPONSE) as stream:
        passed = kinds(stream)
        response = stream.get_final_response()
    assert client.responses.retrieve(response.id).output_text == response.output_text
    return passed, response.output_text


def background(client: openai.OpenAI) -> Any:
    made = RESPONSE | {"max_output_tokens": 1500, "extra_body": LONG}
    response = client.responses.create(**made, background=True)
    assert client.responses.retrieve(response.id).status in ("queued", "in_progress")
    cancelled = client.responses.cancel(response.id).status
    return response.status, cancelled, client.responses.retrieve(response.id).status


def background_stream(client: openai.OpenAI) -> Any:
    events = list(client.responses.create(**RESPONSE, background=True, stream=True))
    again = list(client.responses.retrieve(events[0].response.id, stream=True, starting_after=2))
    assert [event.type for event in events[3:]] == [event.type for event in again]
    return kinds(events)


def models(client: openai.OpenAI) -> Any:
    return [(model.id, model.max_model_len) for model in client.models.list()]


def refused(ask: Callable[[], Any]) -> tuple[str, int]:
    try:
        ask()
    except (openai.APIStatusError, anthropic.APIStatusError) as error:
        return type(error).__name__, error.status_code
    raise AssertionError("not refused")


def errors(client: openai.OpenAI) -> Any:
    create = client.chat.completions.create
    return [
        refused(lambda: create(**CHAT | {"model": "none"})),
        refused(lambda: create(**CHAT | {"max_tokens": 100_000})),
        refused(lambda: create(**CHAT | {"messages": "none"})),
        refused(lambda: client.responses.retrieve("resp_none")),
        refused(lambda: client.responses.cancel("resp_none")),
        refused(lambda: client.embeddings.create(model="tiny", input="x")),
    ]


def message(client: anthropic.Anthropic) -> Any:
    answer = client.messages.create(**MESSAGE, system="be brief")
    return answer.content[0].text, answer.stop_reason, answer.usage.output_tokens


def message_stream(client: anthropic.Anthropic) -> Any:
    with client.messages.stream(**MESSAGE) as stream:
        return kinds(stream), stream.get_final_message().content[0].text


def message_tools(client: anthropic.Anthropic) -> Any:
    tool = {"name": "pick", "input_schema": SCHEMA}
    made = MESSAGE | {"tools": [tool], "tool_choice": {"type": "any"}, "max_tokens": 20}
    blocks = [block.type for block in client.messages.create(**made).content]
    result = {"type": "tool_result", "tool_use_id": "a", "content": "x"}
    call = {"type": "tool_use", "id": "a", "name": "pick", "input": {"a": "x"}}
    talk = [*ASKED, {"role": "assistant", "content": [call]}, {"role": "user", "content": [result]}]
    after = client.messages.create(**MESSAGE | {"messages": talk, "tools": [tool]})
    return blocks, after.usage.input_tokens


def counted_tokens(client: anthropic.Anthropic) -> Any:
    return client.messages.count_tokens(model="tiny", messages=ASKED, system="be brief").input_tokens


def message_errors(client: anthropic.Anthropic) -> Any:
    create = client.messages.create
    return [
        refused(lambda: create(**MESSAGE | {"model": "none"})),
        refused(lambda: create(**MESSAGE | {"max_tokens": 100_000})),
        refused(lambda: client.messages.count_tokens(model="none", messages=ASKED)),
    ]


OPENAI: Mapping[str, Callable[[openai.OpenAI], Any]] = {
    check.__name__: check
    for check in (
        *(chat, chat_stream, chat_helper, tools, logprobs, several_choices, structured_outputs, completions),
        *(responses, responses_stream, background, background_stream, models, errors),
    )
}
ANTHROPIC: Mapping[str, Callable[[anthropic.Anthropic], Any]] = {
    check.__name__: check for check in (message, message_stream, message_tools, counted_tokens, message_errors)
}
