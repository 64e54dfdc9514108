"""Reads the fields of a request's body that dispatch needs: model, stream, priority, session, prompt. Pure.

The body itself goes to the engine as it came. The engine checks all other fields.
"""

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from moe_scheduling.request.order import clamp_priority

from moe_gateway.http.routes import Route
from moe_gateway.request.answer_limit import read_answer_limit
from moe_gateway.request.json_body import dump_text, load_json, read_flag, read_integer
from moe_gateway.request.messages_body import read_as_chat, read_session
from moe_gateway.request.pooling_body import read_decision, read_embedded, read_scored
from moe_gateway.request.unusual_fields import UNUSUAL, find_transfer_field, stays_whole

# More of a prompt, some 500,000 tokens, is in no index: to remember it would take longer than it can save.
MOST_KEYED_BYTES = 2 * 1024 * 1024
_NO_MEDIA: Mapping[str, int] = MappingProxyType({})
# A look-up of a member in its enum costs a fifth of a microsecond in Python 3.11.
_CHAT, _MESSAGES, _RESPONSES = Route.CHAT, Route.MESSAGES, Route.RESPONSES


class BadBody(ValueError):
    """The body cannot be dispatched; the text is for the client, `param` names the field."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class Parsed(NamedTuple):
    """The fields that dispatch needs; a tuple, because one is made for each request.

    Attributes:
        model: name of the model asked for; None when the body names none.
        stream: whether the answer is a stream of events.
        priority: level, lower is more urgent.
        user: `user` field, the session where no header names one.
        prompt: text of the prompt as bytes, for its size and its prefix.
        prompt_tokens: exact number of tokens where the prompt is token ids, else None.
        previous_response: id of the response that is continued; None: none is.
        media: how many images, audio and video parts the prompt has, by kind.
        prompt_bytes: length of the whole prompt where `prompt` is not; 0 where it is.
        keys: of the blocks of the prompt, where they are computed already.
        background: whether a response is to be computed after its answer (`/v1/responses`).
        names_itself: whether the client chose the id of a response (`/v1/responses`).
        stays_whole: whether its fields keep it from being split between two engines.
        answer_tokens: most tokens of the answer; 0 where the body names no limit, or nobody has asked.
    """

    model: str | None
    stream: bool
    priority: int
    user: str | None
    prompt: bytes
    prompt_tokens: int | None
    previous_response: str | None = None
    media: Mapping[str, int] = _NO_MEDIA
    prompt_bytes: int = 0
    keys: tuple[int, ...] | None = None
    background: bool = False
    names_itself: bool = False
    stays_whole: bool = False
    answer_tokens: int = 0


def parse_body(route: Route, body: bytes, *, bounds_answer: bool = False) -> Parsed:
    """Reads a JSON body.

    Args:
        route: of the request.
        body: the whole body.
        bounds_answer: whether the limit of the answer is wanted, which only a quota of tokens needs.

    Raises:
        BadBody: it is not a JSON object, or a field that dispatch needs has the wrong type.
    """
    try:
        document = load_json(body)
    except ValueError as error:
        raise BadBody(f"the body is not valid JSON: {error}") from None
    if type(document) is not dict:
        raise BadBody("the body must be a JSON object")
    model = document.get("model")
    if model is not None and type(model) is not str:
        raise BadBody("model must be a string", "model")
    priority = document.get("priority")
    if priority is None:
        priority = 0
    elif type(priority) is not int:
        try:
            priority = read_integer(priority)
        except ValueError:
            if route.has_job and route is not _MESSAGES:
                raise BadBody("priority must be an integer", "priority") from None
            # These bodies have no such field in vLLM.
            priority = 0
    if priority:
        priority = clamp_priority(priority)
    stream = document.get("stream", False)
    if type(stream) is not bool:
        stream = read_flag(stream)
    user = read_session(document) if route is _MESSAGES else document.get("user")
    prompt, prompt_tokens, media, is_several = read_prompt(route, document)
    session = user if type(user) is str and user else None
    parsed = Parsed(model or None, stream, priority, session, prompt, prompt_tokens, None, media)
    if bounds_answer:
        parsed = parsed._replace(answer_tokens=read_answer_limit(route, document))
    if is_several or not UNUSUAL.isdisjoint(document):
        parsed = _read_unusual_fields(parsed, route, document, is_several=is_several)
    return _read_response_fields(parsed, document) if route is _RESPONSES else parsed


def refuse_transfer(field: str | None) -> None:
    """Refuses a field by which a client would steer a transfer between engines.

    Raises:
        BadBody: there is one.
    """
    if field is not None:
        raise BadBody(f"{field} is set by the gateway alone; leave it out", field)


def _read_unusual_fields(parsed: Parsed, route: Route, document: dict[str, Any], *, is_several: bool) -> Parsed:
    refuse_transfer(find_transfer_field(document))
    return parsed._replace(stays_whole=is_several or stays_whole(route, document))


def _read_response_fields(parsed: Parsed, document: dict[str, Any]) -> Parsed:
    """Adds the fields that only bodies of `/v1/responses` have."""
    return parsed._replace(
        previous_response=_read_previous_response(document),
        background=read_flag(document.get("background")),
        names_itself="request_id" in document,
    )


def _read_previous_response(document: dict[str, Any]) -> str | None:
    """The response that a body of `/v1/responses` continues.

    Raises:
        BadBody: it asks for state that could not be found again here, or the id is of the wrong type.
    """
    if document.get("conversation") is not None:
        raise BadBody("conversations are not kept here; continue with previous_response_id", "conversation")
    previous = document.get("previous_response_id")
    if previous is not None and type(previous) is not str:
        raise BadBody("previous_response_id must be a string", "previous_response_id")
    return previous or None


class Prompt(NamedTuple):
    """What a prompt is made of.

    Attributes:
        text: its texts as bytes, about as a chat template renders them.
        tokens: its exact tokens where they are given as ids, else None.
        media: how many images, audio and video parts it has, by kind.
        is_several: whether it is several prompts, or none.
    """

    text: bytes
    tokens: int | None = None
    media: Mapping[str, int] = _NO_MEDIA
    is_several: bool = False


def read_prompt(route: Route, document: dict[str, Any]) -> Prompt:
    """The prompt of a body, by where its route has it."""
    if route is _CHAT:
        return _with_tools(document, _read_messages(document.get("messages")))
    match route:
        case Route.RESPONSES:
            fields = ("instructions", "previous_input_messages", "input")
            return _with_tools(document, _read_texts([document.get(name) for name in fields]))
        case Route.COMPLETIONS:
            return _with_embeds(document.get("prompt_embeds"), _read_input(document.get("prompt")))
        case Route.EMBEDDINGS | Route.POOLING | Route.CLASSIFY:
            if "input" not in document and "messages" in document:
                return _read_messages(document["messages"])
            return _read_input(document.get("input", document.get("data")))
        case _:
            return _read_rare_prompt(route, document)


def _read_rare_prompt(route: Route, document: dict[str, Any]) -> Prompt:
    """The prompt of the other routes; none where an engine computes nothing."""
    match route:
        case Route.MESSAGES:
            return _with_tools(document, _read_messages(read_as_chat(document)))
        case Route.CHAT_BATCH:
            return _read_texts(document.get("messages"))
        case Route.EMBED_V2 | Route.DECISIONS:
            return _read_texts(read_embedded(document) if route is Route.EMBED_V2 else read_decision(document))
        case Route.GENERATE:
            return _read_input(document.get("token_ids"))._replace(
                media=_read_texts(document.get("content_parts")).media
            )
        case _ if route.only_reads:
            scored = read_scored(document)
            prompt = _read_input(scored.texts)
            return prompt if scored.tokens is None else prompt._replace(tokens=scored.tokens)
        case _:
            return Prompt(b"", 0)


def _with_tools(document: dict[str, Any], prompt: Prompt) -> Prompt:
    """The prompt behind its tools and documents, which chat templates render first, as JSON."""
    for rows in (document.get("documents"), document.get("tools") or document.get("functions")):
        if type(rows) is list and rows:
            prompt = prompt._replace(text=dump_text(rows) + b"\n" + prompt.text)
    return prompt


def _with_embeds(embeds: object, prompt: Prompt) -> Prompt:
    """The prompt with its embeddings, whose tokens their bytes do not tell."""
    count = len(embeds) if type(embeds) is list else int(type(embeds) is str)
    return prompt._replace(media={**prompt.media, "embeds": count}) if count else prompt


def _read_messages(messages: object) -> Prompt:
    """The prompt of messages; for the usual ones, each a role and a text, it costs a fraction of `_read_texts`."""
    parts: list[str] = []
    for message in messages if type(messages) is list else ():
        if type(message) is not dict or len(message) != 2:
            return _read_texts(messages)
        role, text = message.get("role"), message.get("content")
        if type(role) is not str or type(text) is not str:
            return _read_texts(messages)
        parts += (role, text)
    return Prompt(_join(parts))


def _join(texts: Iterable[str]) -> bytes:
    return "\n".join(texts).encode("utf-8", "replace")


def _read_input(value: object) -> Prompt:
    """The prompt of a text, texts, token ids or lists of token ids."""
    if type(value) is str:
        return Prompt(value.encode("utf-8", "replace"))
    if type(value) is list and value:
        if type(value[0]) is int:
            return Prompt(dump_text(value), len(value))
        if type(value[0]) is list:
            ids = sum(len(ids) for ids in value if type(ids) is list)
            return Prompt(dump_text(value), ids, is_several=len(value) > 1)
    texts = _read_texts(value)
    return texts._replace(is_several=True) if type(value) is list and len(value) != 1 else texts


# Fields of messages, content parts, tool calls and items of `/v1/responses` that chat templates render, the last first.
_RENDERED = (
    *("text", "refusal", "thinking", "summary", "output", "arguments", "input", "function", "custom", "function_call"),
    *("tool_calls", "content", "reasoning_content", "reasoning", "tools", "name", "role"),
)
# Of these two fields, which clients send both, one is rendered.
_SAME = (("reasoning_content", "reasoning"), ("summary", "content"))
_AS_JSON = frozenset({"arguments", "tools"})
_MEDIA_FIELDS = {
    **dict.fromkeys(("image_url", "input_image", "image", "image_pil", "image_embeds"), "image"),
    **dict.fromkeys(("input_audio", "audio_url", "audio", "audio_embeds"), "audio"),
    **dict.fromkeys(("video_url", "input_video", "video", "video_embeds"), "video"),
    "prompt_embeds": "embeds",
}
# Characters at the end of a medium that stand for it in the text: enough for another one to differ.
_MARK_CHARACTERS = 32


def _read_texts(value: object) -> Prompt:
    """All texts below messages, items, parts or lists of them, in their order; without recursion, for any depth."""
    texts: list[str] = []
    media: dict[str, int] = {}
    waiting = [value]
    while waiting:
        part = waiting.pop()
        if type(part) is str:
            texts.append(part)
        elif type(part) is list:
            waiting.extend(reversed(part))
        elif type(part) is dict:
            if (field := _media_field(part)) is not None:
                kind = _MEDIA_FIELDS[field]
                media[kind] = media.get(kind, 0) + 1
                texts.append(_mark(kind, part))
            else:
                waiting.extend(_rendered_fields(part))
    return Prompt(_join(texts), None, media or _NO_MEDIA)


def _rendered_fields(part: dict[str, Any]) -> list[Any]:
    """What a chat template renders of an object, the last first."""
    names = [name for name in _RENDERED if name in part]
    for name, other in _SAME:
        if name in names and part.get(other):
            names.remove(name)
    return [
        dump_text(part[name]).decode() if name in _AS_JSON and type(part[name]) is not str else part[name]
        for name in names
    ]


def _media_field(part: dict[str, Any]) -> str | None:
    """The field or type by which a content part is an image, audio or video; None for any other part."""
    kind = part.get("type")
    if type(kind) is str:
        return kind if kind in _MEDIA_FIELDS else None
    if "role" in part or "text" in part:
        return None
    return next((name for name in _MEDIA_FIELDS if name in part), None)


def _mark(kind: str, part: dict[str, Any]) -> str:
    """A short text that stands for a medium: its end, found below at most two objects."""
    values: list[Any] = [part]
    for _ in range(3):
        longest = max((row for row in values if type(row) is str), key=len, default="")
        if len(longest) >= _MARK_CHARACTERS:
            return f"{kind} {len(longest)} {longest[-_MARK_CHARACTERS:]}"
        values = [inner for row in values if type(row) is dict for inner in row.values()]
    return kind
