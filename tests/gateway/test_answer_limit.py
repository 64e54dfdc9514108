"""The most tokens of an answer by its body: what a tenant's quota reserves."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_gateway.http.routes import Route
from moe_gateway.request.answer_limit import COMPLETION_DEFAULT, MOST_TOKENS, read_answer_limit
from moe_gateway.request.parsing import parse_body


@pytest.mark.parametrize(
    ("route", "document", "tokens"),
    [
        (Route.CHAT, {}, 0),
        (Route.CHAT, {"max_tokens": 7}, 7),
        (Route.CHAT, {"max_completion_tokens": 9, "max_tokens": 7}, 9),
        (Route.CHAT, {"max_completion_tokens": None, "max_tokens": 7}, 7),
        (Route.CHAT, {"max_tokens": 7, "n": 3}, 21),
        (Route.CHAT, {"max_output_tokens": 7}, 0),
        (Route.CHAT_BATCH, {"max_tokens": 7, "messages": [[], [], []]}, 21),
        (Route.COMPLETIONS, {"prompt": "a"}, COMPLETION_DEFAULT),
        (Route.COMPLETIONS, {"prompt": "a", "max_tokens": 5, "n": 2, "best_of": 4}, 20),
        (Route.COMPLETIONS, {"prompt": ["a", "b"], "max_tokens": 5}, 10),
        (Route.COMPLETIONS, {"prompt": [[1, 2], [3]], "max_tokens": 5}, 10),
        (Route.COMPLETIONS, {"prompt": [1, 2, 3], "max_tokens": 5}, 5),
        (Route.RESPONSES, {"max_output_tokens": 8, "max_tokens": 3}, 8),
        (Route.MESSAGES, {"max_tokens": 8}, 8),
        (Route.GENERATE, {"sampling_params": {"max_tokens": 8, "n": 2}, "max_tokens": 3}, 16),
        (Route.GENERATE, {"sampling_params": "x"}, 0),
        (Route.EMBEDDINGS, {"max_tokens": 8}, 0),
        (Route.CHAT, {"max_tokens": "8"}, 8),
        (Route.CHAT, {"max_tokens": 8.0}, 8),
        (Route.CHAT, {"max_tokens": "many"}, 0),
        (Route.CHAT, {"max_tokens": [8]}, 0),
        (Route.CHAT, {"max_tokens": -8}, 0),
        (Route.CHAT, {"max_tokens": 10**15}, MOST_TOKENS),
        (Route.CHAT, {"max_tokens": 10**9, "n": 10**9}, MOST_TOKENS),
        (Route.COMPLETIONS, {"max_tokens": 10**9, "prompt": ["a"] * 9}, MOST_TOKENS),
        (Route.CHAT, {"max_tokens": 8, "n": "all"}, 8),
    ],
)
def test_the_limit_of_an_answer(route, document, tokens):
    assert read_answer_limit(route, document) == tokens
    body = json.dumps({"model": "m", **document}).encode()
    assert parse_body(route, body, bounds_answer=True).answer_tokens == tokens
    assert parse_body(route, body).answer_tokens == 0


VALUES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.lists(st.integers()))
FIELDS = st.sampled_from(
    [
        "max_tokens",
        "max_completion_tokens",
        "max_output_tokens",
        "n",
        "best_of",
        "prompt",
        "messages",
        "sampling_params",
    ]
)


@given(st.sampled_from(list(Route)), st.dictionaries(FIELDS, VALUES))
def test_each_body_has_a_limit_within_bounds(route, document):
    assert 0 <= read_answer_limit(route, document) <= MOST_TOKENS
