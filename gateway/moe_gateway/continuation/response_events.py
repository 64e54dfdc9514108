"""The events of a stream of `/v1/responses`, as vLLM writes them and as another engine repeats them. Pure.

Each event has the next number. The response, its items and its calls have ids drawn at random: those that the client
knows stay in all later events, the last one included, which repeats the whole response.
"""

from collections.abc import Mapping
from types import NoneType
from typing import Any

from moe_gateway.continuation.transcript import MARK, Piece

_TEXTS = frozenset(
    f"response.{name}.delta"
    for name in ("output_text", "reasoning_text", "function_call_arguments", "custom_tool_call_input")
)
_PARTS = frozenset(
    f"response.{name}"
    for name in (
        *("content_part.added", "content_part.done", "output_text.done", "reasoning_text.done"),
        *("function_call_arguments.done", "custom_tool_call_input.done"),
    )
)
_ITEMS = frozenset({"message", "reasoning", "function_call", "custom_tool_call"})
_IDS = ("id", "call_id")


class ResponseEvents:
    """The state of one stream; see `Dialect`."""

    __slots__ = ("_created_at", "_items", "_names", "_number", "has_begun", "last_events", "response_id")

    def __init__(self) -> None:
        self.response_id = ""
        self.has_begun = False
        # The last event repeats the whole response, with its usage.
        self.last_events: bytes | None = None
        self._created_at: object = None
        # Number of the newest event.
        self._number = -1
        # The ids of each item as the client has them, by the item's index.
        self._items: dict[object, dict[str, str]] = {}
        # Those ids by the ids that the present engine has in their place.
        self._names: dict[str, str] = {}

    def read(self, document: Mapping[str, Any]) -> Piece | None:
        """The text of a delta, or what another event is; see `Dialect`."""
        kind, index, part = document.get("type"), document.get("output_index"), document.get("content_index")
        if type(kind) is not str or type(index) not in (int, NoneType):
            return None
        if kind in _TEXTS:
            text = document.get("delta")
            is_plain = type(text) is str and not document.get("logprobs")
            return Piece(f"{kind} {index} {part}", str(text)) if is_plain else None
        mark = f"{kind} {index} {part}" if kind in _PARTS else _read_mark(document)
        return None if mark is None else Piece(MARK, f"{mark}\n")

    def closes(self, document: Mapping[str, Any]) -> bool:
        """vLLM ends a part of a response only where the next event does not take it back."""
        return False

    def is_cut_off(self, document: Mapping[str, Any]) -> bool:
        """See `Dialect`; vLLM says so of gpt-oss alone, and calls other aborted responses completed."""
        match document:
            case {"type": "response.completed", "response": {"status": "cancelled"}}:
                return True
        return False

    def is_last(self, document: Mapping[str, Any]) -> bool:
        """Whether an event is the last one."""
        return document.get("type") in ("response.completed", "response.incomplete")

    def begin_again(self) -> None:
        """Another engine has other ids."""
        self._names.clear()

    def match(self, document: Mapping[str, Any]) -> None:
        """An event of another engine is one that the client has: where it names an item, the client knows the names."""
        if document.get("type") != "response.output_item.added":
            return
        item, known = document["item"], self._items.get(document.get("output_index"), {})
        for name, value in known.items():
            if type(item.get(name)) is str:
                self._names[item[name]] = value

    def adopt(self, document: dict[str, Any], text: str | None) -> None:
        """Makes an event of another engine the next one of the stream."""
        if "sequence_number" in document:
            document["sequence_number"] = self._number + 1
        if text is not None:
            document["delta"] = text
        self._rename(document, ("item_id",))
        self._rename(document.get("item"), _IDS)
        response = document.get("response")
        if type(response) is dict:
            response["id"] = self.response_id
            response["created_at"] = self._created_at
            for item in response.get("output") or ():
                self._rename(item, _IDS)

    def _rename(self, part: object, names: tuple[str, ...]) -> None:
        if type(part) is not dict:
            return
        for name in names:
            if type(value := part.get(name)) is str:
                part[name] = self._names.get(value, value)

    def note(self, document: Mapping[str, Any]) -> None:
        """An event goes to the client."""
        number = document.get("sequence_number")
        if type(number) is int:
            self._number = number
        kind = document.get("type")
        if kind == "response.created":
            response = document["response"]
            self.has_begun, self.response_id, self._created_at = True, response["id"], response.get("created_at")
        elif kind == "response.output_item.added":
            item = document["item"]
            self._items[document.get("output_index")] = {
                name: item[name] for name in _IDS if type(item.get(name)) is str
            }


def _read_mark(document: Mapping[str, Any]) -> str | None:
    """What an event is that is about a response or one of its items; None where it is about something else."""
    match document:
        case {"type": "response.output_item.added" | "response.output_item.done" as kind, "item": {"type": str(type_)}}:
            item, index = document["item"], document.get("output_index")
            return f"{kind} {index} {type_} {item.get('namespace')} {item.get('name')}" if type_ in _ITEMS else None
        case {"type": "response.created" | "response.in_progress" as kind, "response": {"id": str()}}:
            return str(kind)
        case {"type": "response.completed" | "response.incomplete", "response": {"output": list()}}:
            return "end"
    return None
