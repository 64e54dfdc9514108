"""Reads and cuts the tool calls in a chunk of a chat. Pure.

An engine draws the id of a call at random and sends it once, with the call's name. So the client keeps the id of the
engine from which it has the name.
"""

from collections.abc import Sequence
from typing import Any

from moe_gateway.continuation.transcript import Piece


def read_calls(delta: dict[str, Any]) -> tuple[Piece, ...] | None:
    """The text of the tool calls in a delta, for each its name and its arguments; None where they have another form."""
    calls = delta.get("tool_calls")
    if not calls:
        return ()
    if type(calls) is not list or not all(map(_is_known, calls)):
        return None
    return tuple(Piece(f"{name} of call {call['index']}", function[name]) for call, function, name in _texts(calls))


def _is_known(call: object) -> bool:
    match call:
        case {"index": int(), "function": {**function}}:
            return all(type(value) in (str, type(None)) for value in function.values())
    return False


def _texts(calls: Sequence[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, Any], str]]:
    """Call, place and name of each text."""
    return [
        (call, call["function"], name)
        for call in calls
        for name in ("name", "arguments")
        if type(call["function"].get(name)) is str
    ]


def replace_calls(delta: dict[str, Any], pieces: Sequence[Piece]) -> None:
    """Leaves only these new texts in a delta's tool calls, in the order in which `read_calls` returned them."""
    calls = delta.get("tool_calls") or []
    for (call, function, name), piece in zip(_texts(calls), pieces, strict=True):
        if piece.text:
            function[name] = piece.text
        elif function[name]:
            del function[name]
            if name == "name":
                # The client has it, with the id.
                call.pop("id", None)
                call.pop("type", None)
    if calls:
        delta["tool_calls"] = [call for call in calls if call["function"]]
