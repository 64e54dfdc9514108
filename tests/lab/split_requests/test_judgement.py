"""Each request of a run with roles is judged by what its client got and what it was owed."""

import json

import pytest
from moe_lab.soak.answers import SoakRoute
from moe_lab.soak.traffic import Leaving
from moe_lab.split_requests.judgement import Outcomes, SplitAnswer, SplitOutcome, judge, read_content
from moe_lab.split_requests.traffic import SplitRequest, plan_request

OWED = "5 6 7 "
ERROR = 'data: {"error": "x"}\n\n'


def request(api: SoakRoute = SoakRoute.COMPLETIONS, *, stream: bool = True) -> SplitRequest:
    return SplitRequest(number=1, api=api, stream=stream, tokens=3, prompt="a")


def stream(*ids: int, end: str = "data: [DONE]\n\n") -> bytes:
    rows = [{"choices": [{"text": "x", "token_ids": [token]}]} for token in ids]
    return ("".join(f"data: {json.dumps(row)}\n\n" for row in rows) + end).encode()


def piece(*ids: int) -> bytes:
    return json.dumps({"choices": [{"text": "x", "token_ids": list(ids)}]}).encode()


def test_ids_are_read_from_streams_and_from_pieces():
    assert read_content(request(), stream(5, 6, 7)).tokens == OWED
    assert read_content(request(stream=False), piece(5, 6, 7)).tokens == OWED
    messages = json.dumps({"content": [{"type": "text", "text": "words"}]}).encode()
    assert read_content(request(SoakRoute.MESSAGES, stream=False), messages).tokens == "words"


@pytest.mark.parametrize(
    ("received", "streams", "expected"),
    [
        (SplitAnswer(status=200, body=stream(5, 6, 7), is_complete=True), True, SplitOutcome.RIGHT),
        (SplitAnswer(status=200, body=piece(5, 6, 7), is_complete=True), False, SplitOutcome.RIGHT),
        (SplitAnswer(status=200, body=stream(5, 6, 8), is_complete=True), True, SplitOutcome.WRONG),
        (SplitAnswer(status=200, body=stream(5, 6), is_complete=True), True, SplitOutcome.WRONG),
        (SplitAnswer(status=200, body=piece(5, 6, 7, 8), is_complete=True), False, SplitOutcome.WRONG),
        (SplitAnswer(status=200, body=stream(5, end="")), True, SplitOutcome.CUT),
        (
            SplitAnswer(status=200, body=stream(5, end='data: {"error": "x"}\n\n'), is_complete=True),
            True,
            SplitOutcome.CUT,
        ),
        (SplitAnswer(status=200, body=stream(9, end="")), True, SplitOutcome.WRONG),
        (SplitAnswer(status=200, body=stream(9), has_left=True), True, SplitOutcome.WRONG),
        (SplitAnswer(status=200, body=stream(5, end=""), has_left=True), True, SplitOutcome.LEFT),
        (SplitAnswer(has_left=True), True, SplitOutcome.LEFT),
        (SplitAnswer(), True, SplitOutcome.LOST),
        (SplitAnswer(status=503, body=b"{}", is_complete=True), True, SplitOutcome.LOST),
        (SplitAnswer(status=200), True, SplitOutcome.LOST),
        (SplitAnswer(status=200, body=b'{"cho'), False, SplitOutcome.LOST),
    ],
)
def test_an_outcome_is_what_came_beside_what_was_owed(received, streams, expected):
    assert judge(request(stream=streams), received, OWED) is expected


def test_text_that_ends_amid_a_character_is_no_wrong_text():
    events = [{"type": "content_block_delta", "delta": {"text": text}} for text in ("ab", "\N{REPLACEMENT CHARACTER}")]
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events).encode()
    cut = SplitAnswer(status=200, body=body)
    assert judge(request(SoakRoute.MESSAGES), cut, "ab\N{LATIN SMALL LETTER E WITH ACUTE}c") is SplitOutcome.CUT
    assert judge(request(SoakRoute.MESSAGES), cut, "b") is SplitOutcome.WRONG


def test_broken_guarantees_are_named_with_examples():
    outcomes = Outcomes()
    outcomes.add(request(), SplitAnswer(status=200, body=stream(5, 6, 7), is_complete=True, ttft_s=0.5), OWED)
    assert (outcomes.problems, outcomes.ttft_s, outcomes.finished) == ([], [0.5], 1)
    outcomes.add(request(), SplitAnswer(status=200, body=stream(1), is_complete=True), OWED)
    outcomes.add(request(), SplitAnswer(), OWED)
    assert outcomes.problems == ["wrong tokens: 1 requests", "lost before the first byte: 1 requests"]
    assert len(outcomes.examples) == 2


def test_requests_follow_from_seed_and_number_and_are_of_all_kinds():
    rows = [plan_request(3, number) for number in range(600)]
    assert rows == [plan_request(3, number) for number in range(600)]
    assert rows != [plan_request(4, number) for number in range(600)]
    assert {row.api for row in rows} == set(SoakRoute)
    assert {Leaving.STAYS, Leaving.BEFORE_ANSWER, Leaving.IN_ANSWER} == {row.leaving for row in rows}
    assert len({row.prompt for row in rows}) == len(rows)
    # More than an engine that decodes computes itself, at four bytes a token; with room in 4,096 tokens.
    assert min(len(row.prompt) for row in rows) > 4 * 256
    assert max(len(row.prompt) for row in rows) < 8000
