"""Reads bodies of Anthropic's Messages API as the messages of a chat, which they become in the engine. Pure.

vLLM makes a chat of them before it renders a prompt: the system prompt first, calls of tools with their arguments as
JSON, thoughts as reasoning. A text of the system prompt that begins as `BILLING` is left out there, because it has a
new hash in each request of Claude Code; so it is here, or no prefix would ever be found again.
"""

from typing import Any

import orjson

BILLING = "x-anthropic-billing-header"


def read_as_chat(document: dict[str, Any]) -> list[object]:
    """The messages, the system prompt first, in the shape of a chat; what has another shape stays as it is."""
    system = document.get("system")
    messages = document.get("messages")
    rows: list[object] = [] if system is None else [{"role": "system", "content": _without_billing(system)}]
    if type(messages) is list:
        rows.extend(_convert_message(message) for message in messages)
    return rows


def read_session(document: dict[str, Any]) -> object:
    """The session of a body: Claude Code names it in the id of its user."""
    metadata = document.get("metadata")
    return metadata.get("user_id") if type(metadata) is dict else None


def _convert_message(message: object) -> object:
    if type(message) is not dict:
        return message
    content = message.get("content")
    if message.get("role") == "system":
        content = _without_billing(content)
    if type(content) is list:
        content = [_convert_block(block) for block in content]
    return {"role": message.get("role"), "content": content}


def _without_billing(content: object) -> object:
    if type(content) is str:
        return "" if content.startswith(BILLING) else content
    if type(content) is not list:
        return content
    return [block for block in content if not _is_billing(block)]


def _is_billing(block: object) -> bool:
    text = block.get("text") if type(block) is dict else None
    return type(text) is str and text.startswith(BILLING)


def _convert_block(block: object) -> object:
    if type(block) is not dict:
        return block
    match block.get("type"):
        case "tool_use":
            return {"name": block.get("name"), "arguments": _spell(block.get("input"))}
        case "thinking":
            return {"reasoning": block.get("thinking")}
        case "redacted_thinking":
            return ""
        case "tool_addition":
            return _spell(block.get("tool"))
        case _:
            return block


def _spell(value: object) -> str:
    try:
        return orjson.dumps(value).decode()
    except orjson.JSONEncodeError:
        return ""
