"""The events of a stream of `/v1/messages`, as vLLM writes them and as another engine repeats them. Pure.

A block of thinking ends with a signature and a tool call begins with an id, both drawn at random: those of the engine
whose event the client got stay.
"""

from collections.abc import Mapping
from typing import Any

from moe_gateway.continuation.transcript import MARK, Piece

# The field of a delta that has its text, by its type.
_TEXTS = {"text_delta": "text", "thinking_delta": "thinking", "input_json_delta": "partial_json"}
_BLOCKS = frozenset({"text", "thinking", "tool_use"})
_LAST_EVENT = b'event: message_stop\ndata: {"type":"message_stop"}\n\n'


class MessageEvents:
    """The state of one stream; see `Dialect`."""

    __slots__ = ("has_begun", "last_events", "response_id")

    def __init__(self) -> None:
        self.response_id = ""
        self.has_begun = False
        self.last_events: bytes | None = None

    def read(self, document: Mapping[str, Any]) -> Piece | None:
        """See `Dialect`; a ping may come at any time, so it is no part of the answer."""
        match document:
            case {"type": "ping"}:
                return Piece(MARK, "")
            case {"type": "message_start" | "message_delta" | "message_stop" as kind}:
                return Piece(MARK, f"{kind}\n")
            case {"type": "content_block_start", "index": int(index), "content_block": {"type": str(kind), **block}}:
                is_known = kind in _BLOCKS and not any(block.get(name) for name in ("text", "thinking", "input"))
                return Piece(MARK, f"start {index} {kind} {block.get('name')}\n") if is_known else None
            case {"type": "content_block_delta", "index": int(index), "delta": {"type": str(kind)}}:
                return _read_delta(index, kind, document["delta"])
            case {"type": "content_block_stop", "index": int(index)}:
                return Piece(MARK, f"stop {index}\n")
        return None

    def closes(self, document: Mapping[str, Any]) -> bool:
        """See `Dialect`: vLLM also ends a block before it says that its engine has failed or aborted the request."""
        match document:
            case {"type": "content_block_stop"} | {"delta": {"type": "signature_delta"}}:
                return True
        return False

    def is_cut_off(self, document: Mapping[str, Any]) -> bool:
        """See `Dialect`: each other end has a reason."""
        match document:
            case {"type": "message_delta", "delta": {"stop_reason": str()}}:
                return False
        return document.get("type") == "message_delta"

    def is_last(self, document: Mapping[str, Any]) -> bool:
        """Whether an event is the last one."""
        return document.get("type") == "message_stop"

    def begin_again(self) -> None:
        """Nothing is counted or named anew."""

    def match(self, document: Mapping[str, Any]) -> None:
        """No later event refers to what differs in one that the client has."""

    def adopt(self, document: dict[str, Any], text: str | None) -> None:
        """Leaves the new text alone in a delta."""
        if text is not None:
            delta = document["delta"]
            delta[_TEXTS[delta["type"]]] = text

    def note(self, document: Mapping[str, Any]) -> None:
        """An event goes to the client; behind the one with the usage of the whole only the last one is missing."""
        kind = document.get("type")
        self.has_begun = self.has_begun or kind == "message_start"
        if kind == "message_delta":
            self.last_events = _LAST_EVENT


def _read_delta(index: int, kind: str, delta: Mapping[str, Any]) -> Piece | None:
    if kind == "signature_delta":
        return Piece(MARK, f"signature {index}\n")
    text = delta.get(_TEXTS.get(kind, ""))
    return Piece(f"{index} {kind}", text) if type(text) is str else None
