"""Finds the prompts in bodies of scoring, rerank, embedding and decision routes. Pure.

The result is texts and chat parts, or token ids, in the order in which an engine reads them.
"""

from typing import Any, NamedTuple

import orjson

# A model that scores pairs reads the query once for each document. It is counted up to this length.
MOST_QUERY_CHARACTERS = 1024 * 1024
_QUERIES = ("query", "queries", "text_1", "data_1")
_DOCUMENTS = ("documents", "items", "text_2", "data_2")
_MEDIA = {"images": "image_url", "audio": "audio_url", "videos": "video_url"}


class Scored(NamedTuple):
    """What a body of a score or rerank route makes an engine read.

    Attributes:
        texts: the documents, a single query before each; before all of them where they are token ids.
        tokens: exact number of tokens, a single query counted once for each document; None where these are no ids.
    """

    texts: object
    tokens: int | None = None


def read_scored(document: dict[str, Any]) -> Scored:
    """The documents of a body, and the query that is read with each; work and memory grow with the body alone."""
    query, scored = _first(document, _QUERIES), _first(document, _DOCUMENTS)
    documents = _list_documents(scored)
    if _is_ids(query) and documents and all(map(_is_ids, documents)):
        return Scored([query, *documents], len(query) * len(documents) + sum(map(len, documents)))
    if type(query) is not str:
        return Scored([*(query if type(query) is list else [query]), *documents])
    times = max(1, min(len(documents), MOST_QUERY_CHARACTERS // (len(query) or 1)))
    return Scored([query] * times + documents)


def _list_documents(scored: Any) -> list[Any]:
    """The documents: of an object with parts each part is one, as in vLLM."""
    if type(scored) is dict and type(scored.get("content")) is list:
        return scored["content"]  # type: ignore[no-any-return]
    return scored if type(scored) is list else [scored]


def read_embedded(document: dict[str, Any]) -> object:
    """What a body of Cohere's embedding route has: texts, images or both."""
    return [document.get("texts"), _parts(document, "images"), document.get("inputs")]


def read_decision(document: dict[str, Any]) -> object:
    """What a body of `/v1/systemone` has: instructions, a state and questions about it, which are read as JSON."""
    state = document.get("state")
    rows = [document.get("instructions"), state if type(state) is str else _spell(state)]
    return [*rows, _spell(document.get("questions")), *(_parts(document, name) for name in _MEDIA)]


def _first(document: dict[str, Any], names: tuple[str, ...]) -> Any:
    return next((document[name] for name in names if name in document), None)


def _is_ids(value: object) -> bool:
    return type(value) is list and bool(value) and type(value[0]) is int


def _parts(document: dict[str, Any], name: str) -> list[object]:
    urls = document.get(name)
    kind = _MEDIA[name]
    return [{"type": kind, kind: {"url": url}} for url in urls] if type(urls) is list else []


def _spell(value: object) -> str:
    try:
        return orjson.dumps(value).decode()
    except orjson.JSONEncodeError:
        return ""
