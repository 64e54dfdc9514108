"""A mock engine that computes: its tokens follow from those before alone, as those of a greedy vLLM do.

It speaks completions and chats as vLLM 0.32 does: `return_token_ids`, stop strings with text that is held back for
them, characters spread over several tokens, usage, and a limit on tokens. A token is a byte of the text's UTF-8.
"""

import asyncio
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tests.gateway.messages import SSE_END, SSE_HEAD, Received, chunk

MAX_MODEL_LEN = 4096
END = 0


@dataclass
class Computing:
    """An engine's script; a token follows from the number of tokens before it.

    Attributes:
        text: what it answers, of which the tokens of `prompt` are no part.
        cuts: of the first streams, after how many events each fails; later streams do not fail.
        fail: how it fails.
        at_once: tokens in one chunk.
        drift: later streams than the first have another text from this token of the answer on.
        reasoning: text before `text` that chats get as `reasoning`.
        bodies: path and body of each stream that was asked for.
        paused: set to end a failure of the kind `pauses`.
        end: behind the last event.
    """

    text: str
    cuts: list[int] = field(default_factory=list)
    fail: str = "reset"
    at_once: int = 1
    drift: int | None = None
    reasoning: str = ""
    bodies: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    paused: asyncio.Event = field(default_factory=asyncio.Event)
    end: bytes = SSE_END

    async def __call__(self, request: Received, writer: asyncio.StreamWriter) -> None:
        path = request.line.split(b" ")[1].decode()
        body = json.loads(request.body)
        self.bodies.append((path, body))
        cut = self.cuts.pop(0) if self.cuts else None
        writer.write(SSE_HEAD)
        rows = list(self.events(path, body))
        for number, event in enumerate([*rows, None]):
            if number == cut:
                await self._fail(writer, rows[:cut])
                return
            if event is None:
                break
            writer.write(chunk(event))
            await writer.drain()
        writer.write(self.end)

    async def _fail(self, writer: asyncio.StreamWriter, sent: list[bytes]) -> None:
        await writer.drain()
        error = {"message": "EngineCore encountered an issue. See stack trace", "type": "InternalServerError"}
        match self.fail:
            case "reset":
                writer.transport.abort()
            case "half":
                writer.write(b"40\r\ndata: {")
                await writer.drain()
                writer.transport.abort()
            case "dead":
                writer.write(chunk(event_of({"error": error | {"code": 500}})) + SSE_END)
            case "marked dead":
                writer.write(chunk(b": moeserving-engine: dead\n\n"))
                writer.write(chunk(event_of({"error": {"message": "no", "code": 500}})) + SSE_END)
            case "ends":
                writer.write(b"0\r\n\r\n")
            case "abort" | "error":
                writer.write(self.failing_events(sent) + self.end)
            case "pauses":
                await self.paused.wait()
                writer.transport.abort()

    def failing_events(self, sent: list[bytes]) -> bytes:
        """How a stream with these events ends that was aborted."""
        choice = {"index": 0, "text": "", "delta": {"content": ""}, "finish_reason": "abort"}
        return chunk(event_of({"id": "x", "choices": [choice]}))

    def events(self, path: str, body: dict[str, Any]) -> Iterator[bytes]:
        """The events of a stream, without `[DONE]`."""
        is_chat = path.startswith("/v1/chat")
        prompt = self._prompt(body)
        own = self._own_tokens(is_first=len(self.bodies) <= 1)
        done = 0 if is_chat or type(body["prompt"]) is str else len(prompt) - BASE
        wants_ids = bool(body.get("return_token_ids"))
        head = {"id": "chatcmpl-1" if is_chat else "cmpl-1", "created": 7, "model": "tiny"}
        head["object"] = "chat.completion.chunk" if is_chat else "text_completion"
        limit = body.get("max_tokens") or body.get("max_completion_tokens")
        if limit is None:
            limit = MAX_MODEL_LEN - len(prompt) if is_chat else 16
        options = body.get("stream_options") or {}
        if is_chat:
            choice = {
                "index": 0,
                "delta": {"role": "assistant", "content": ""},
                "logprobs": None,
                "finish_reason": None,
            }
            yield event_of({**head, "choices": [choice], "prompt_token_ids": prompt if wants_ids else None})
        count = 0
        for ids, piece, finish, stop in self._steps(own, done, limit, body):
            count += len(ids)
            choice = {"index": 0, "logprobs": None, "finish_reason": finish}
            if is_chat:
                name = "reasoning" if self.reasoning and count <= len(self.reasoning.encode()) else "content"
                choice["delta"] = {name: piece}
                if finish:
                    choice["stop_reason"] = stop
            else:
                choice |= {"text": piece, "stop_reason": stop}
                choice["prompt_token_ids"] = prompt if wants_ids and count == len(ids) else None
            choice["token_ids"] = ids if wants_ids else None
            document = {**head, "choices": [choice]}
            if options.get("continuous_usage_stats"):
                document["usage"] = usage_of(len(prompt), count)
            yield event_of(document)
        if options.get("include_usage"):
            yield event_of({**head, "choices": [], "usage": usage_of(len(prompt), count)})

    def _prompt(self, body: dict[str, Any]) -> list[int]:
        given = body.get("prompt")
        return given if type(given) is list else [1000 + number for number in range(BASE)]

    def _own_tokens(self, *, is_first: bool) -> list[int]:
        tokens = [*(self.reasoning + self.text).encode(), END]
        if self.drift is not None and not is_first:
            tokens[self.drift :] = [*b"something else", END]
        return tokens

    def _steps(
        self, own: list[int], done: int, limit: int, body: dict[str, Any]
    ) -> Iterator[tuple[list[int], str, str | None, str | None]]:
        """Tokens of a chunk, its text, its finish and stop reasons, as vLLM's detokenizer and stop checker do it."""
        stops = body.get("stop") or []
        stops = [stops] if type(stops) is str else stops
        includes = bool(body.get("include_stop_str_in_output"))
        held = 0 if includes or not stops else max(map(len, stops)) - 1
        pending, text, sent, made = b"", "", 0, 0
        ids: list[int] = []
        finish = stop = None
        while finish is None:
            token = own[done + made]
            made += 1
            ids.append(token)
            if token == END:
                finish = "stop"
            else:
                pending += bytes([token])
                new, pending = decode_whole(pending)
                text += new
                for row in stops if new and made > (body.get("min_tokens") or 0) else ():
                    at = text.find(row, max(0, len(text) - len(new) - len(row) + 1))
                    if at >= 0:
                        text, finish, stop = text[: at + (len(row) if includes else 0)], "stop", row
                        break
            if finish is None and made >= limit:
                finish = "length"
            if finish is not None or made == 1 or len(ids) >= self.at_once:
                until = len(text) if finish is not None else len(text) - held
                piece = text[sent:until] if until > sent else ""
                sent = max(sent, until)
                yield ids, piece, finish, stop
                ids = []


BASE = 5


def decode_whole(data: bytes) -> tuple[str, bytes]:
    """The whole characters at the beginning, and the bytes that follow."""
    for end in range(len(data), -1, -1):
        try:
            return data[:end].decode(), data[end:]
        except UnicodeDecodeError:
            continue
    return "", data


def event_of(document: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def usage_of(prompt: int, completion: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "total_tokens": prompt + completion, "completion_tokens": completion}
