"""Fields that steer KV transfers are the gateway's own, and requests that cannot be split between engines are found."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_gateway.http.routes import Route
from moe_gateway.request.form import parse_form
from moe_gateway.request.parsing import BadBody, parse_body

from tests.gateway.messages import post
from tests.gateway.test_forms import HEADERS, form

REMOTE = {"do_remote_prefill": True, "remote_host": "10.0.0.9", "remote_port": 5600}
NAMES = ("kv_transfer_params", "ec_transfer_params")
JSON_ROUTES = [route for route in Route if route.method == b"POST" and not route.is_form and not route.names_response]
PLACES = {
    "{}": lambda name, value: {name: value},
    "vllm_xargs.{}": lambda name, value: {"vllm_xargs": {name: value}},
    "sampling_params.extra_args.{}": lambda name, value: {"sampling_params": {"extra_args": {name: value}}},
}
VALUES = [REMOTE, {}, [], "x", 0, False]


@pytest.mark.parametrize("route", JSON_ROUTES, ids=lambda route: route.label)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", NAMES)
def test_no_body_of_a_client_steers_a_transfer(route, place, name):
    for value in VALUES:
        body = {"model": "tiny", "prompt": "x", "messages": [], "input": "x"} | PLACES[place](name, value)
        with pytest.raises(BadBody) as refused:
            parse_body(route, json.dumps(body).encode())
        assert refused.value.param == place.format(name)


@pytest.mark.parametrize("place", PLACES)
def test_an_absent_value_is_no_field(place):
    parse_body(Route.CHAT, json.dumps({"messages": []} | PLACES[place]("kv_transfer_params", None)).encode())


@pytest.mark.parametrize(
    "fields",
    [
        [("kv_transfer_params", b"{}")],
        [("ec_transfer_params", b"x")],
        [("vllm_xargs", b'{"kv_transfer_params": "x"}')],
        [("vllm_xargs", b'{"kv\\u005ftransfer_params": [1]}')],
        # Of two fields the engine takes the last.
        [("vllm_xargs", b"{}"), ("vllm_xargs", b'{"kv_transfer_params": "x"}')],
        [("vllm_xargs", b'{"a": "' + b"x" * 70_000 + b'", "kv_transfer_params": "x"}')],
    ],
)
def test_no_form_of_a_client_steers_a_transfer(fields):
    with pytest.raises(BadBody):
        parse_form(HEADERS, form(("model", b"w"), ("file", b"x"), *fields))


def test_other_arguments_in_a_form_pass():
    assert parse_form(HEADERS, form(("model", b"w"), ("vllm_xargs", b'{"a": 1}'))).model == "w"


@pytest.mark.parametrize("place", PLACES)
async def test_the_client_gets_an_error_that_names_the_field(make_engine, serve, place):
    engine = await make_engine()
    served = await serve(engine)
    answer = await served.ask(post({"model": "tiny", "prompt": "x"} | PLACES[place]("kv_transfer_params", REMOTE)))
    assert (answer.status, answer.json["error"]["param"]) == (400, place.format("kv_transfer_params"))
    assert engine.requests == []


@pytest.mark.parametrize(
    ("route", "fields", "expected"),
    [
        (Route.CHAT, {}, False),
        (Route.CHAT, {"n": 1, "use_beam_search": False, "echo": False, "prompt_logprobs": None}, False),
        (Route.CHAT, {"tools": [{"type": "function"}], "tool_choice": "auto"}, False),
        (Route.CHAT, {"response_format": {"type": "json_object"}, "logprobs": True, "top_logprobs": 3}, False),
        (Route.CHAT, {"n": 2}, True),
        (Route.CHAT, {"n": "2"}, True),
        (Route.CHAT, {"n": []}, True),
        (Route.CHAT, {"echo": True}, True),
        (Route.CHAT, {"use_beam_search": True}, True),
        (Route.CHAT, {"prompt_logprobs": 0}, True),
        (Route.CHAT, {"tool_choice": "required"}, True),
        (Route.CHAT, {"tool_choice": {"type": "function", "function": {"name": "f"}}}, True),
        (Route.CHAT, {"truncate_prompt_tokens": -1}, True),
        (Route.MESSAGES, {"tool_choice": {"type": "auto"}}, False),
        (Route.MESSAGES, {"tool_choice": {"type": "any"}}, True),
        (Route.MESSAGES, {"tool_choice": {"type": []}}, True),
        (Route.COMPLETIONS, {"prompt": "x"}, False),
        (Route.COMPLETIONS, {"prompt": ["x"]}, False),
        (Route.COMPLETIONS, {"prompt": [1, 2, 3]}, False),
        (Route.COMPLETIONS, {"prompt": [[1, 2, 3]]}, False),
        (Route.COMPLETIONS, {"prompt": ["x", "y"]}, True),
        (Route.COMPLETIONS, {"prompt": [[1], [2]]}, True),
        (Route.COMPLETIONS, {"prompt": []}, True),
        (Route.COMPLETIONS, {"best_of": 2}, True),
        (Route.COMPLETIONS, {"prompt_embeds": "x"}, True),
        (Route.RESPONSES, {"tools": [{"type": "function"}]}, False),
        (Route.RESPONSES, {"tools": [{"type": "code_interpreter"}]}, True),
        (Route.RESPONSES, {"tools": ["x"]}, True),
        (Route.RESPONSES, {"truncation": "auto"}, True),
        (Route.RESPONSES, {"truncation": "disabled", "background": False}, False),
        (Route.RESPONSES, {"background": True}, True),
        (Route.RESPONSES, {"previous_response_id": "resp_1"}, True),
        (Route.RESPONSES, {"request_id": "resp_1"}, True),
    ],
)
def test_which_requests_stay_whole(route, fields, expected):
    assert parse_body(route, json.dumps(fields).encode()).stays_whole is expected


@given(
    st.dictionaries(
        st.sampled_from(["n", "echo", "tool_choice", "tools", "prompt", "vllm_xargs", "sampling_params"]),
        st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists, max_leaves=4),
    )
)
def test_any_value_of_the_other_fields_is_read(fields):
    for route in (Route.CHAT, Route.RESPONSES, Route.COMPLETIONS):
        assert type(parse_body(route, json.dumps(fields).encode()).stays_whole) is bool
