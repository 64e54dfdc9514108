"""Finds fields in the bytes of an answer: the tokens of its prompt, and the id by which a response is kept. Pure."""

import re

# `/v1/responses` and `/v1/messages` name them `input_tokens`.
_PROMPT_TOKENS = re.compile(rb'"(?:prompt|input)_tokens":\s*(\d{1,11})\b')
# Anthropic's API has the tokens that the prefix cache read or wrote in fields of their own.
_CACHE_TOKENS = re.compile(rb'"cache_(?:read|creation)_input_tokens":\s*(\d{1,11})\b')
# The first id in an answer of `/v1/responses` is its own.
_RESPONSE_ID = re.compile(rb'"id": ?"(resp[!#-~]{1,128})"')


def find_prompt_tokens(answer: bytes) -> int | None:
    """The tokens of the prompt, cached ones included; None where the answer does not tell."""
    found = _PROMPT_TOKENS.search(answer)
    if found is None:
        return None
    cached = sum(int(row) for row in _CACHE_TOKENS.findall(answer)) if b"cache_" in answer else 0
    return int(found[1]) + cached


def find_response_id(answer: bytes) -> str | None:
    """The id of a response; None where the answer has none."""
    found = _RESPONSE_ID.search(answer)
    return None if found is None else found[1].decode()
