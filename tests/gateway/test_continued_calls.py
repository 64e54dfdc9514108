"""Tool calls of chats and log-probabilities go on at another engine, which computes them anew."""

import json
from typing import NamedTuple

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_gateway.continuation import probabilities
from moe_gateway.http.routes import Route
from moe_gateway.request.stream_events import split_chunks

from tests.gateway.computing_engine import Computing, event_of, usage_of
from tests.gateway.messages import SSE_HEAD, chunk, post
from tests.gateway.test_continuation import NOTICE, PATHS, body_of, events, start
from tests.gateway.test_continuation_bytes import make_stream

DONE = b"data: [DONE]\n\n"


class Part(NamedTuple):
    """Content of a chat, or a call of a tool with this name."""

    text: str
    name: str = ""


class Calling(Computing):
    """An engine whose tokens are characters; each stream has its own ids, sizes of chunks and last bits of numbers."""

    def __init__(self, parts, *, sizes=(1,), held=0, scored=True, **script):
        super().__init__("", **script)
        self.parts, self.sizes, self.held, self.scored = parts, sizes, held, scored

    def events(self, path, body):
        number = max(1, len(self.bodies))
        size = self.sizes[min(number, len(self.sizes)) - 1]
        is_chat = path == PATHS[Route.CHAT]
        head = {"id": "x-1", "object": "chat.completion.chunk", "created": 7, "model": "tiny"}
        if is_chat:
            delta = {"role": "assistant", "content": ""}
            yield event_of({**head, "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}]})
        rows = list(self._chats(number, size) if is_chat else self._completions(size))
        for at, (fields, tokens) in enumerate(rows):
            finish = "stop" if at == len(rows) - 1 else None
            choice = {"index": 0, **fields, "logprobs": None, "finish_reason": finish}
            if self.scored and tokens:
                choice["logprobs"] = self._score(tokens, number, is_chat=is_chat)
            yield event_of({**head, "choices": [choice]})
        yield event_of({**head, "choices": [], "usage": usage_of(5, 9)})

    def _chats(self, number, size):
        calls = 0
        for part in self.parts:
            for begin in range(0, len(part.text), size):
                text = part.text[begin : begin + size]
                tokens = [(0, character) for character in text]
                if not part.name:
                    yield {"delta": {"content": text}}, tokens
                    continue
                call = {"index": calls, "function": {"arguments": text}}
                if begin == 0:
                    call |= {"id": f"call-{number}-{calls}", "type": "function"}
                    call["function"]["name"] = part.name
                yield {"delta": {"tool_calls": [call]}}, tokens
            calls += bool(part.name)
        yield {"delta": {"content": ""}}, []

    def _completions(self, size):
        """Text that is held back for a stop string comes after its tokens."""
        text, sent = "".join(part.text for part in self.parts), 0
        for begin in range(0, len(text), size):
            until = max(sent, min(begin + size, len(text)) - self.held)
            yield {"text": text[sent:until]}, list(enumerate(text))[begin : begin + size]
            sent = until
        yield {"text": text[sent:]}, []

    def _score(self, tokens, number, *, is_chat):
        value = -1.0 - number / 1000
        texts = [text for _, text in tokens]
        if is_chat:
            return {"content": [{"token": text, "logprob": value, "bytes": [], "top_logprobs": []} for text in texts]}
        return {
            "tokens": texts,
            "token_logprobs": [value] * len(texts),
            "text_offset": [at for at, _ in tokens],
            "top_logprobs": [{text: value} for text in texts],
        }


def folded(rows):
    """A stream as a client understands it."""
    choices = [row["choices"][0] for row in rows if type(row) is dict and row["choices"]]
    calls, text, scored, offsets, lengths = {}, "", [], [], set()
    for choice in choices:
        delta = choice.get("delta", {})
        text += choice.get("text") or delta.get("content") or ""
        for call in delta.get("tool_calls") or ():
            known = calls.setdefault(call["index"], {"ids": 0, "name": "", "arguments": ""})
            known["ids"] += "id" in call
            for name, value in call["function"].items():
                known[name] += value
        logprobs = choice.get("logprobs") or {}
        scored += [row["token"] for row in logprobs.get("content") or ()] + logprobs.get("tokens", [])
        offsets += logprobs.get("text_offset", [])
        lengths |= {len(set(map(len, logprobs.values())))} if "tokens" in logprobs else set()
    return {
        "text": text,
        "calls": calls,
        "scored": scored,
        "offsets": offsets,
        "even": lengths <= {1},
        "ends": [choice["finish_reason"] for choice in choices if choice["finish_reason"]],
        "usage": [row["usage"] for row in rows if type(row) is dict and "usage" in row],
    }


FIELDS = {"logprobs": 1, "stream_options": {"include_usage": True}, "tools": [{"type": "function"}]}
TEXTS = st.text(st.sampled_from('ab東{"'), min_size=1, max_size=8)


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_cuts_change_nothing(data):
    route = data.draw(st.sampled_from(list(PATHS)))
    names = st.sampled_from(["", "", "pick"]) if route is Route.CHAT else st.just("")
    parts = [Part(*row) for row in data.draw(st.lists(st.tuples(TEXTS, names), min_size=1, max_size=4))]
    script = Calling(
        parts,
        sizes=data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)),
        held=data.draw(st.integers(0, 3)),
        scored=data.draw(st.booleans()),
    )
    body = body_of(route, **FIELDS)
    want = folded([json.loads(row.removeprefix(b"data: ")) for row in script.events(PATHS[route], body)])
    stream = make_stream(route, body)
    out, has_begun = b"", False
    for attempt in range(3):
        url, sent = stream.start()
        script.bodies.append((url.decode(), json.loads(sent)))
        rows = [chunk(row) for row in (*script.events(url.decode(), body), DONE)]
        if attempt < 2:
            least = (2 if route is Route.CHAT else 1) if attempt == 0 else 0
            rows = rows[: data.draw(st.integers(least, len(rows) - 1))]
        else:
            rows.append(b"0\r\n\r\n")
        out += b"".join(stream.read(row, has_begun=has_begun) for row in (SSE_HEAD, *rows))
        assert stream.failure is None
        has_begun = True
        if (ending := stream.build_ending()) is not None:
            out += ending
            break
        assert stream.can_go_on
        stream.prepare(None)
    passed, rest = split_chunks(out.removeprefix(SSE_HEAD))
    assert rest == b"0\r\n\r\n"
    assert folded(events(passed)) == want


PARTS = [Part("Let me see."), Part('{"city": "東京"}', "weather"), Part("{}", "time")]


@pytest.mark.parametrize("cut", [6, 20, 27])
async def test_openais_client_sees_one_chat_with_calls_and_probabilities(make_engine, serve, cut):
    script = Calling(PARTS, cuts=[cut], sizes=[1, 3])
    served = await start(make_engine, serve, script)
    plain = await start(make_engine, serve, Calling(PARTS), continuation=None)
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "temperature": 0, "logprobs": True}
    answers = []
    for url in (served.url, plain.url):
        client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        async with client, client.chat.completions.stream(**asked) as stream:
            answers.append((await stream.get_final_completion()).choices[0])
    assert len(script.bodies) == 2
    for choice in answers:
        assert choice.message.content == "Let me see."
        calls = [(call.function.name, call.function.arguments) for call in choice.message.tool_calls]
        assert calls == [("weather", '{"city": "東京"}'), ("time", "{}")]
    continued, undisturbed = ([row.token for row in choice.logprobs.content] for choice in answers)
    assert continued == undisturbed


@pytest.mark.parametrize("other", [[Part("Let me go.")], [Part("Let me see.")]], ids=["differs", "is shorter"])
async def test_other_tokens_of_the_same_text_end_the_stream(make_engine, serve, other):
    script = Calling(PARTS, cuts=[20])
    served = await start(make_engine, serve, script)
    write = script.events

    def second(path, body):
        script.parts = PARTS if len(script.bodies) == 1 else other
        return write(path, body)

    script.events = second
    answer = await served.ask(post(body_of(Route.CHAT, **FIELDS), PATHS[Route.CHAT]))
    assert b"something else" in answer.body
    assert NOTICE not in answer.body
    assert served.gateway.stats.continuations == {"replay": 1, "none": 1}


def test_tokens_that_are_spelt_otherwise_are_something_else():
    """The text is the same, and so no text shows it."""
    stream = make_stream(Route.COMPLETIONS, body_of(Route.COMPLETIONS, logprobs=0))

    def feed(text, tokens):
        logprobs = {"tokens": tokens, "token_logprobs": [-1.0] * len(tokens)}
        choice = {"index": 0, "text": text, "logprobs": logprobs, "finish_reason": None}
        return stream.read(SSE_HEAD + chunk(event_of({"id": "x", "choices": [choice]})), has_begun=True)

    stream.start()
    assert b'"tokens":["ab"]' in feed("ab", ["ab"])
    stream.prepare(None)
    stream.start()
    assert feed("ab", ["a", "b"]) == b""
    assert stream.failure is not None


@pytest.mark.parametrize(
    "choice",
    [
        {"delta": {"tool_calls": [{"index": 0}]}},
        {"delta": {"tool_calls": [{"index": 0, "function": {"name": 3}}]}},
        {"delta": {"tool_calls": ["x"]}},
        {"delta": {"content": "x"}, "logprobs": {"content": [3]}},
        {"delta": {"content": "x"}, "logprobs": 3},
        {"delta": {"refusal": "no"}},
    ],
    ids=str,
)
def test_what_has_no_known_form_passes_and_does_not_go_on(choice):
    stream = make_stream(Route.CHAT, body_of(Route.CHAT))
    stream.start()
    event = event_of({"id": "x", "choices": [{"index": 0, "finish_reason": None, **choice}]})
    assert event in stream.read(SSE_HEAD + chunk(event), has_begun=True)
    assert not stream.can_go_on


def chunk_of(delta, **fields):
    row = {"id": "x-1", "choices": [{"index": 0, "delta": delta, "finish_reason": None, **fields}]}
    return chunk(b"data: %b\n\n" % json.dumps(row).encode())


def resumed_chat():
    stream = make_stream(Route.CHAT, body_of(Route.CHAT))
    stream.start()
    stream.read(SSE_HEAD + chunk_of({"content": "a"}), has_begun=True)
    stream.prepare(None)
    stream.start()
    stream.read(SSE_HEAD, has_begun=True)
    return stream


UNKNOWN_CALLS = [[{"index": 0, "type": "function"}], {"a": 1}, ["x"], [{"index": 0, "function": {"name": 3}}]]


@pytest.mark.parametrize("calls", UNKNOWN_CALLS)
def test_calls_of_another_form_pass_behind_the_seam_alone(calls):
    stream = resumed_chat()
    assert stream.read(chunk_of({"content": "ab", "tool_calls": calls}), has_begun=True) == b""
    assert stream.failure is not None
    stream = resumed_chat()
    assert b'"content":"b"' in stream.read(chunk_of({"content": "ab"}), has_begun=True)
    for delta in ({"tool_calls": calls}, {"refusal": "no"}, {"content": "c", "tool_calls": calls}):
        [row] = events(split_chunks(stream.read(chunk_of(delta), has_begun=True))[0])
        assert row["choices"][0]["delta"] == delta
    assert (stream.failure, stream.can_go_on) == (None, False)


def test_tokens_without_text_are_not_remembered_without_end(monkeypatch):
    monkeypatch.setattr(probabilities, "MOST_TOKENS", 10)
    stream = make_stream(Route.CHAT, body_of(Route.CHAT, logprobs=True))
    stream.start()
    stream.read(SSE_HEAD + chunk_of({"content": "a"}), has_begun=True)
    for _ in range(10):
        assert stream.can_go_on
        stream.read(chunk_of({"content": ""}, logprobs={"content": [{"token": ""}]}), has_begun=True)
    stream.read(chunk_of({"content": ""}, logprobs={"content": [{"token": ""}]}), has_begun=True)
    assert not stream.can_go_on
    assert stream._scored._tokens == []
