"""The tokens of an answer, wherever it has its usage and however it is cut."""

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_contract.access_config import Quota
from moe_gateway.access.key_table import build_caller
from moe_gateway.access.metering import MeteredClient, read_usage
from moe_gateway.access.quotas import Lease, Quotas

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n"


class Nobody:
    """A client that keeps what it gets."""

    def __init__(self):
        self.data = b""

    def write(self, data):
        self.data += data

    def answered(self, *, keep_alive):
        pass


def meter_of(charged=7):
    quotas = Quotas(Quota(tokens_per_minute=10**9))
    # What is reserved for the answer is no estimate of it.
    lease = quotas.admit(build_caller("a"), charged, 0.0, answer_tokens=1000)
    assert isinstance(lease, Lease)
    return MeteredClient(Nobody(), lease)


def count(*writes, charged=7):
    meter = meter_of(charged)
    for data in writes:
        meter.write(data)
    assert meter._client.data == b"".join(writes)
    return meter.count_tokens(is_answer=True)


USAGE = {"prompt_tokens": 3, "completion_tokens": 50_000, "total_tokens": 50_003}
DETAILS = {"prompt_tokens_details": {"cached_tokens": 1, "input_tokens_per_turn": [9, 9]}}


def events(*documents):
    return [b"data: %b\n\n" % (row if isinstance(row, bytes) else json.dumps(row).encode()) for row in documents]


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        (b'{"usage":{"input_tokens":10,"output_tokens":5,"cache_read_input_tokens":9000}}', 9015),
        (b'{"usage":{"input_tokens":1,"output_tokens":2,"cache_creation_input_tokens":4}}', 7),
        (b'{"usage":{"input_tokens":1,"cache_creation":{"x":2},"output_tokens":2}}', 3),
        (json.dumps({"usage": DETAILS | USAGE}).encode(), 50_003),
        # What a tool was called with is JSON of the model in Anthropic's API.
        (b'{"content":[{"input":{"total_tokens":0}}],"usage":{"input_tokens":5,"output_tokens":5}}', 10),
        # Tools of a request may come back behind the usage.
        (b'{"usage":{"total_tokens":9},"tools":[{"usage":{"total_tokens":0},"total_tokens":0}]}', 9),
        (b'{"total_tokens": 5}', None),
        (b'{"usage": null}', None),
        (b'{"usage": {}}', None),
    ],
)
def test_all_tokens_of_a_usage_count(text, tokens):
    assert read_usage(text) == tokens


def test_a_usage_before_a_long_end_counts():
    document = json.dumps({"usage": USAGE, "prompt_token_ids": [1] * 200_000}).encode()
    assert count(*[document[at : at + 65_536] for at in range(0, len(document), 65_536)]) == 50_003


@given(st.lists(st.integers(0, 400), max_size=6), st.integers(0, 300), st.integers(0, 2000))
def test_a_usage_is_found_however_the_answer_is_cut(cuts, before, after):
    document = json.dumps({"a": "x" * before, "usage": DETAILS | USAGE, "z": [1] * after}).encode()
    places = [0, *sorted(min(cut + before, len(document)) for cut in cuts), len(document)]
    writes = [document[begin:end] for begin, end in pairwise(places)]
    assert count(*writes) == 50_003


def test_a_stream_without_usage_counts_its_events():
    assert count(HEAD, *events(*[{"text": "x", "usage": None}] * 20, b"[DONE]")) == 28


@pytest.mark.parametrize("ending", [[b"[DONE]"], [], [{"type": "message_stop"}]])
def test_a_stream_with_usage_counts_that_alone(ending):
    assert count(HEAD, *events(*[{"text": "x"}] * 20, {"usage": USAGE}, *ending)) == 50_003


def test_the_usage_at_the_beginning_of_a_stream_is_not_all_of_it():
    begin = {"type": "message_start", "message": {"usage": {"input_tokens": 40, "output_tokens": 0}}}
    end = {"type": "message_delta", "usage": {"input_tokens": 40, "output_tokens": 1000}}
    deltas = [{"type": "content_block_delta", "delta": {"text": "x" * 100}}] * 500
    assert count(HEAD, *events(begin, *deltas, end, {"type": "message_stop"})) == 1040
    assert count(HEAD, *events(begin, *deltas)) == 508
    assert count(HEAD, *events(begin)) == 40


def test_a_client_that_leaves_pays_for_the_last_usage_it_saw():
    rows = [{"text": "x" * 50, "usage": {"total_tokens": 40 + number}} for number in range(100)]
    assert count(HEAD, *events(*rows)) == 139
