"""Which streams can go on at another engine, and in which way; what is asked of that engine."""

import gc
import json
import tracemalloc
from array import array

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_gateway.continuation.events import EventReader
from moe_gateway.continuation.resend import ask_for_tokens, build_prefix_body
from moe_gateway.continuation.transcript import (
    MOST_CHARACTERS,
    MOST_CHUNKS_BACK,
    MOST_TOKENS,
    Cut,
    Expected,
    Mismatch,
    Piece,
    Transcript,
)
from moe_gateway.continuation.ways import Way, find_way
from moe_gateway.http.routes import Route

from tests.gateway.messages import SSE_END, SSE_HEAD, chunk

GREEDY = {"model": "tiny", "prompt": "x", "messages": [], "stream": True, "temperature": 0}
PREFIX, REPLAY = Way.PREFIX, Way.REPLAY


@pytest.mark.parametrize(
    ("fields", "way"),
    [
        ({}, PREFIX),
        ({"temperature": 0.0}, PREFIX),
        ({"prompt": [1, 2, 3]}, PREFIX),
        ({"max_tokens": 9, "min_tokens": 2, "stop": ["a", "b"], "stop_token_ids": [4]}, PREFIX),
        ({"top_p": 0.5, "top_k": 3, "repetition_penalty": 1.1, "logit_bias": {"3": 1}, "ignore_eos": True}, PREFIX),
        ({"presence_penalty": 0, "frequency_penalty": 0.0, "n": 1, "response_format": {"type": "text"}}, PREFIX),
        ({"logprobs": None, "tools": None, "bad_words": [], "echo": False, "watermarking": False}, PREFIX),
        ({"seed": 4, "user": "u", "cache_salt": "s", "priority": 1, "truncate_prompt_tokens": 7}, PREFIX),
        ({"add_generation_prompt": False, "continue_final_message": True, "chat_template_kwargs": {"a": 1}}, PREFIX),
        # What counts or follows the answer's own tokens, or is not known.
        ({"presence_penalty": 0.1}, REPLAY),
        ({"frequency_penalty": -0.1}, REPLAY),
        ({"bad_words": ["x"]}, REPLAY),
        ({"response_format": {"type": "json_object"}}, REPLAY),
        ({"structured_outputs": {"regex": "a*"}}, REPLAY),
        ({"guided_json": {}, "thinking_token_budget": 0}, REPLAY),
        ({"repetition_detection": {"max_pattern_size": 3}}, REPLAY),
        ({"tools": [{"type": "function"}]}, REPLAY),
        ({"logprobs": 0}, REPLAY),
        ({"logprobs": True, "top_logprobs": 2}, REPLAY),
        ({"echo": True}, REPLAY),
        ({"suffix": "x"}, REPLAY),
        ({"field_of_tomorrow": 1}, REPLAY),
        ({"stop": ["x" * 2000]}, REPLAY),
        ({"stop": [""]}, REPLAY),
        ({"max_tokens": "9"}, REPLAY),
        ({"temperature": 0.7, "seed": 4}, REPLAY),
        ({"temperature": None, "seed": 0}, REPLAY),
        # Drawn at random, or not to be split or repeated.
        ({"temperature": 0.7}, None),
        ({"temperature": None}, None),
        ({"temperature": "0"}, None),
        ({"temperature": False}, None),
        ({"temperature": 0.7, "seed": "4"}, None),
        ({"n": 2}, None),
        ({"n": "1"}, None),
        ({"prompt_logprobs": 1}, None),
        ({"use_beam_search": True}, None),
        ({"vllm_xargs": {"a": 1}}, None),
        ({"kv_transfer_params": {"a": 1}}, None),
    ],
    ids=str,
)
def test_the_fields_of_a_request_say_how_its_stream_goes_on(fields, way):
    assert find_way(Route.COMPLETIONS, GREEDY | fields, has_media=False, by_prefix=True) is way
    assert find_way(Route.CHAT, GREEDY | fields, has_media=False, by_prefix=True) is way
    less = None if way is None else REPLAY
    assert find_way(Route.CHAT, GREEDY | fields, has_media=True, by_prefix=True) is less
    assert find_way(Route.CHAT, GREEDY | fields, has_media=False, by_prefix=False) is less


@pytest.mark.parametrize("prompt", [["a", "b"], ["a"], [[1, 2]], [], None, 7], ids=str)
def test_several_prompts_have_no_order_among_their_chunks(prompt):
    assert find_way(Route.COMPLETIONS, GREEDY | {"prompt": prompt}, has_media=False, by_prefix=True) is None
    assert find_way(Route.CHAT, GREEDY | {"prompt": prompt}, has_media=False, by_prefix=True) is PREFIX


def test_token_ids_are_asked_for_beside_all_that_the_body_has():
    body = b' {"temperature": 0, "return_token_ids": false, "prompt": "}"}\n'
    assert json.loads(ask_for_tokens(body)) == {"temperature": 0, "return_token_ids": True, "prompt": "}"}


IDS, SO_FAR = array("I", [1, 2, 3]), array("I", [7, 8])


@pytest.mark.parametrize(
    ("route", "fields", "limits"),
    [
        (Route.COMPLETIONS, {}, {"max_tokens": 14, "min_tokens": 0}),
        (Route.COMPLETIONS, {"max_tokens": 10, "min_tokens": 5}, {"max_tokens": 8, "min_tokens": 3}),
        (Route.CHAT, {"max_tokens": 10, "max_completion_tokens": 5}, {"max_tokens": 3, "min_tokens": 0}),
        (Route.CHAT, {"min_tokens": 1}, {"max_tokens": 95, "min_tokens": 0}),
    ],
)
def test_another_engine_gets_the_tokens_so_far_and_the_limits_that_are_left(route, fields, limits):
    document = GREEDY | {"seed": 3, "stop": ["x"], "stream_options": {"include_usage": True}} | fields
    body = json.loads(build_prefix_body(route, document, IDS, SO_FAR, 100))
    assert body == {
        **{name: document[name] for name in ("model", "stream", "temperature", "seed", "stop", "stream_options")},
        "prompt": [1, 2, 3, 7, 8],
        "return_token_ids": True,
        **limits,
    }


def test_a_limit_that_is_not_known_or_used_up_leaves_no_prefix():
    assert build_prefix_body(Route.CHAT, GREEDY, IDS, SO_FAR, None) is None
    assert build_prefix_body(Route.COMPLETIONS, GREEDY | {"max_tokens": 2}, IDS, SO_FAR, None) is None


def test_a_field_of_the_client_that_is_nested_deeply_is_not_written_again():
    document = orjson.loads(b'{"max_tokens": 9, "session_id": %b%b}' % (b"[" * 600, b"]" * 600))
    assert build_prefix_body(Route.COMPLETIONS, document, IDS, SO_FAR, None) is None


def transcript(*chunks, stops=(), includes_stop=False):
    made = Transcript(stops, includes_stop=includes_stop)
    for text, tokens in chunks:
        made.add([Piece("text", text)], tokens, is_single=len(tokens) == 1)
    return made


@pytest.mark.parametrize(
    ("chunks", "options", "cut"),
    [
        ([("a", [1]), ("b", [2])], {}, Cut(2, 2)),
        # The last token has no text yet: it may be the beginning of a character.
        ([("a", [1]), ("", [2])], {}, Cut(1, 1)),
        ([("a", [1]), ("", [2]), ("", [3])], {}, Cut(1, 1)),
        ([("", [1]), ("", [2])], {}, None),
        # After several tokens the next character shows whether one was begun.
        ([("ab", [1, 2]), ("c", [3, 4])], {}, Cut(2, 2)),
        ([("ab", [1, 2]), ("é", [3, 4])], {}, None),
        ([("ab", [1, 2])], {}, None),
        # Three characters are held back for the stop string, and a cut may not be within them.
        ([("a", [4]), ("b", [5]), ("c", [6]), ("d", [7]), ("e", [8])], {"stops": ["STOP"]}, Cut(2, 5)),
        ([("a", [4]), ("b", [5])], {"stops": ["STOP"]}, None),
        ([("a", [1]), ("b", [2]), ("c", [3]), ("d", [4])], {"stops": ["abc"], "includes_stop": True}, Cut(2, 2)),
        ([], {}, None),
    ],
)
def test_a_stream_is_cut_where_no_character_and_no_stop_string_is(chunks, options, cut):
    found = transcript(*chunks, **options).find_cut()
    # The name of the text's field is before it.
    assert found == (None if cut is None else Cut(cut.tokens, cut.characters + len("\0text\0")))


def slow_cut(chunks, held_back, overlap):
    """The last cut, looked for from the end of the whole text."""
    text, tokens, boundaries = "\0text\0" if any(text for text, _ in chunks) else "", 0, []
    for piece, ids in chunks:
        text += piece
        tokens += len(ids)
        if piece and ids:
            boundaries.append((tokens, len(text), len(ids) == 1))
    for tokens, characters, is_clean in boundaries[: -(held_back + overlap + MOST_CHUNKS_BACK + 1) : -1]:
        at = characters + held_back
        if at <= len(text) - overlap and (is_clean or (text[at : at + 1].isascii() and at < len(text))):
            return Cut(tokens, at)
    return None


@settings(max_examples=500, deadline=None)
@given(
    chunks=st.lists(st.tuples(st.sampled_from(["", "a", "é", "東京", "東a", "ab"]), st.integers(0, 3)), max_size=60),
    reach=st.sampled_from([0, 0, 1, 3, 7]),
    includes_stop=st.booleans(),
)
def test_a_cut_is_the_one_that_a_search_from_the_end_finds(chunks, reach, includes_stop):
    rows = [(text, [7] * count) for text, count in chunks]
    made = Transcript(["x" * (reach + 1)], includes_stop=includes_stop)
    for number, (text, ids) in enumerate(rows):
        made.add([Piece("text", text)], ids, is_single=len(ids) == 1)
        want = slow_cut(rows[: number + 1], *((0, reach) if includes_stop else (reach, 0)))
        assert made.find_cut() == want
    text = "\0text\0" + "".join(text for text, _ in rows)
    assert [made.text_from(at) for at in range(made.characters + 1)] == [
        text[at:] if made.characters else "" for at in range(made.characters + 1)
    ]


def test_a_long_stream_costs_little_memory_and_no_copy_to_find_its_cut():
    ids, pieces = array("I", [1]), [f" word{number}" for number in range(10)]
    made, cjk = Transcript(), Transcript(["x" * 200])
    for number in range(200):
        made.add([Piece("text", pieces[number % 10])], ids, is_single=True)
    tracemalloc.start()
    try:
        for number in range(20_000):
            made.add([Piece("text", pieces[number % 10] + "!")], ids, is_single=True)
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] < 20_000 * 16
        for _ in range(20_000):
            cjk.add([Piece("text", "東京")], array("I", [1, 2]))
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        assert (made.find_cut().tokens, cjk.find_cut()) == (20_200, None)
        assert tracemalloc.get_traced_memory()[1] - before < 1000
    finally:
        tracemalloc.stop()


def test_the_fields_of_a_chat_are_compared_too():
    made = Transcript()
    made.add([Piece("reasoning", "think")], [])
    made.add([Piece("content", "say")], [])
    again = made.expect(None)
    assert again.subtract([Piece("reasoning", "think")], array("I"))[0] == [Piece("reasoning", "")]
    assert again.subtract([Piece("content", "saying")], array("I"))[0] == [Piece("content", "ing")]
    assert again.is_past
    for pieces in ([Piece("content", "think")], [Piece("reasoning", "thinks")], [Piece("reasoning", "thought")]):
        with pytest.raises(Mismatch):
            made.expect(None).subtract(pieces, array("I"))


def test_tokens_are_compared():
    with pytest.raises(Mismatch):
        Expected("", "", array("I", [1, 2])).subtract([], array("I", [1, 3]))
    expected = Expected("", "", array("I", [1, 2]))
    assert expected.subtract([], array("I", [1, 2, 3]))[1] == array("I", [3])


@pytest.mark.parametrize("pieces", [("x" * (MOST_CHARACTERS + 1), [1]), ("x", range(MOST_TOKENS + 1))])
def test_a_stream_that_is_too_long_is_forgotten(pieces):
    made = transcript(pieces)
    assert made.is_lost
    assert (len(made.tokens), made.find_cut(), made.text_from(0)) == (0, None, "")


@pytest.mark.parametrize("size", [1, 2, 3, 7, 10_000])
def test_events_are_whole_however_their_bytes_come(size):
    data = SSE_HEAD + chunk(b"data: a\n") + chunk(b"\ndata: b\r\n\r\n: c\n\n") + SSE_END
    reader = EventReader()
    events = [event for at in range(0, len(data), size) for event in reader.read(data[at : at + size])]
    assert events == [b"data: a\n\n", b"data: b\r\n\r\n", b": c\n\n", b"data: [DONE]\n\n"]
    assert (reader.head, reader.is_stream, reader.has_ended) == (SSE_HEAD, True, True)


@settings(max_examples=300, deadline=None)
@given(text=st.text(st.sampled_from("a\n\n\r"), max_size=30), sizes=st.integers(1, 30))
def test_an_event_ends_with_the_first_blank_line(text, sizes):
    reader, data = EventReader(), text.encode()
    frames = b"".join(chunk(data[at : at + sizes]) for at in range(0, len(data), sizes))
    found = reader.read(SSE_HEAD + frames + chunk(b"\n\n"))
    assert data + b"\n\n" in (b"".join(found), b"".join(found) + b"\n")
    assert all(row.endswith((b"\n\n", b"\r\r", b"\r\n\r\n")) for row in found)
    assert not any(blank in row[:-1] for row in found for blank in (b"\n\n", b"\r\r", b"\r\n\r\n"))
