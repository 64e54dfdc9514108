"""A mock engine whose streams of `/v1/messages` and `/v1/responses` have the events that vLLM 0.32 writes.

Its answer is fixed; ids are new in each stream, and so is how text is spread over deltas.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tests.gateway.computing_engine import Computing
from tests.gateway.messages import chunk

MESSAGES, RESPONSES = "/v1/messages", "/v1/responses"
PROMPT_TOKENS = 5


class Part(NamedTuple):
    """A part of an answer: `text`, `thinking`, or `tool` with its name."""

    kind: str
    text: str
    name: str = ""


@dataclass
class Speaking(Computing):
    """An engine's script; see `Computing`.

    Attributes:
        parts: what it answers.
        sizes: characters in a delta, by the number of the stream; the last one holds for all that follow.
        stop_reason: why a message ends.
        status: of a whole response.
        before_error: whether the open block of a message is ended before an error or an abort, as vLLM 0.33 does it.
    """

    text: str = ""
    parts: tuple[Part, ...] = ()
    sizes: list[int] = field(default_factory=lambda: [3])
    stop_reason: str = "end_turn"
    status: str = "completed"
    before_error: bool = True
    end: bytes = b"0\r\n\r\n"

    @property
    def _number(self) -> int:
        return max(1, len(self.bodies))

    def events(self, path: str, body: dict[str, Any]) -> Iterator[bytes]:
        write = self._messages if path.startswith(MESSAGES) else self._responses
        return map(named, write(body))

    def failing_events(self, sent: list[bytes]) -> bytes:
        path, body = self.bodies[-1]
        if path.startswith(RESPONSES):
            *_, last = self._responses(body)
            return chunk(named(last | {"response": last["response"] | {"status": "cancelled"}}))
        rows: list[dict[str, Any]] = []
        opened = [row for row in map(read_event, sent) if row["type"] in ("content_block_start", "content_block_stop")]
        if self.before_error and opened and opened[-1]["type"] == "content_block_start":
            rows.append({"type": "content_block_stop", "index": opened[-1]["index"]})
        if self.fail == "abort":
            delta = {"stop_reason": None, "stop_sequence": None}
            rows += [{"type": "message_delta", "delta": delta, "usage": {}}, {"type": "message_stop"}]
        else:
            around = "1 validation error for ChatCompletionStreamResponse\n{'error': {'message': 'x', 'code': 500}}"
            rows.append({"type": "error", "error": {"type": "internal_error", "message": around}})
        return b"".join(chunk(named(row)) for row in rows)

    def _deltas(self, part: Part, at: int) -> Iterator[str]:
        """The text of a part, of which `at` characters of the answer are before it."""
        size = self.sizes[min(self._number, len(self.sizes)) - 1]
        text = part.text
        if self.drift is not None and self._number > 1:
            text = text[: max(0, self.drift - at)] + "?" * max(0, len(text) - max(0, self.drift - at))
        yield from (text[begin : begin + size] for begin in range(0, len(text), size))

    @property
    def _tokens(self) -> int:
        return sum(len(part.text) for part in self.parts)

    def _starts(self) -> Iterator[tuple[int, int, Part]]:
        at = 0
        for index, part in enumerate(self.parts):
            yield index, at, part
            at += len(part.text)

    # `/v1/messages`.

    def _messages(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        number = self._number
        message = {
            "id": f"chatcmpl-{number}",
            "content": [],
            "model": "tiny",
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {"output_tokens": 0, "input_tokens": PROMPT_TOKENS},
            "type": "message",
            "role": "assistant",
        }
        yield {"type": "message_start", "message": message}
        for index, at, part in self._starts():
            block: dict[str, Any] = {"type": part.kind, part.kind: ""}
            if part.kind == "tool":
                block = {"type": "tool_use", "id": f"chatcmpl-tool-{number}-{index}", "input": {}, "name": part.name}
            yield {"type": "content_block_start", "content_block": block, "index": index}
            kind = {"text": "text", "thinking": "thinking", "tool": "input_json"}[part.kind]
            name = "partial_json" if part.kind == "tool" else kind
            for text in self._deltas(part, at):
                delta = {"type": f"{kind}_delta", name: text}
                yield {"type": "content_block_delta", "delta": delta, "index": index}
            if part.kind == "thinking":
                signature = {"type": "signature_delta", "signature": f"signature-{number}-{index}"}
                yield {"type": "content_block_delta", "delta": signature, "index": index}
            yield {"type": "content_block_stop", "index": index}
        usage = {"output_tokens": self._tokens, "input_tokens": PROMPT_TOKENS}
        end = {"stop_reason": self.stop_reason, "stop_sequence": None}
        yield {"type": "message_delta", "delta": end, "usage": usage}
        yield {"type": "message_stop"}

    # `/v1/responses`.

    def _responses(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        response = {
            "id": body.get("request_id", f"resp_{self._number}"),
            "created_at": 100 + self._number,
            "output": [],
            "object": "response",
            "model": "tiny",
            "status": "in_progress",
            "usage": None,
            "temperature": 0.0,
            "parallel_tool_calls": True,
            "tool_choice": "auto",
            "tools": [],
            "top_p": 1.0,
            "background": False,
            "max_output_tokens": 60,
            "service_tier": "auto",
            "truncation": "disabled",
        }
        rows = [{"type": "response.created", "response": response}]
        rows.append({"type": "response.in_progress", "response": response})
        items = []
        for index, at, part in self._starts():
            item_rows, item = self._item(index, at, part)
            rows += item_rows
            items.append(item)
        details = {"cached_tokens": 0, "cache_write_tokens": 0}
        usage = {
            "input_tokens": PROMPT_TOKENS,
            "output_tokens": self._tokens,
            "input_tokens_details": details,
            "total_tokens": PROMPT_TOKENS + self._tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
        }
        last = {"type": "response.completed", "response": response | {"output": items, "usage": usage}}
        last["response"]["status"] = self.status
        rows.append(last)
        for number, row in enumerate(rows):
            yield row | {"sequence_number": number}

    def _item(self, index: int, at: int, part: Part) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """The events of one item, and the item as it ends."""
        prefix = {"text": "msg", "thinking": "rs", "tool": "fc"}[part.kind]
        item_id = f"{prefix}_{self._number}_{index}"
        place = {"output_index": index, "item_id": item_id}
        if part.kind == "tool":
            item = {"type": "function_call", "id": item_id, "call_id": f"call_{self._number}_{index}"}
            item |= {"name": part.name, "arguments": "", "status": "in_progress"}
            kind, done = "function_call_arguments", {"arguments": part.text, "name": part.name}
            ended = item | {"arguments": part.text, "status": "completed"}
            opens: list[dict[str, Any]] = []
            closes: list[dict[str, Any]] = []
        else:
            kind = "output_text" if part.kind == "text" else "reasoning_text"
            more = {"annotations": [], "logprobs": []} if part.kind == "text" else {}
            content = {"type": kind, "text": part.text} | more
            item = {"id": item_id, "status": "in_progress"}
            item |= {"type": "message", "role": "assistant"} if part.kind == "text" else {"type": "reasoning"}
            item |= {"content": []} if part.kind == "text" else {"summary": []}
            ended = item | {"content": [content], "status": "completed"}
            place |= {"content_index": 0}
            done = {"text": part.text} | ({"logprobs": []} if part.kind == "text" else {})
            opens = [{"type": "response.content_part.added", **place, "part": content | {"text": ""}}]
            closes = [{"type": "response.content_part.done", **place, "part": content}]
        logprobs = {"logprobs": []} if part.kind == "text" else {}
        deltas = [
            {"type": f"response.{kind}.delta", **place, **logprobs, "delta": text} for text in self._deltas(part, at)
        ]
        return [
            {"type": "response.output_item.added", "output_index": index, "item": item},
            *opens,
            *deltas,
            {"type": f"response.{kind}.done", **place, **done},
            *closes,
            {"type": "response.output_item.done", "output_index": index, "item": ended},
        ], ended


def named(document: dict[str, Any]) -> bytes:
    data = json.dumps(document, ensure_ascii=False).encode()
    return b"event: %b\ndata: %b\n\n" % (document["type"].encode(), data)


def read_event(event: bytes) -> dict[str, Any]:
    """The document of an event."""
    kind, data = event.decode().rstrip("\n").split("\n")
    document: dict[str, Any] = json.loads(data.removeprefix("data: "))
    assert kind == f"event: {document['type']}"
    return document
