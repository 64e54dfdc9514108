"""Which paths the serving port knows: a closed list, so that no admin route of an engine can be reached. Pure."""

import re
from enum import Enum


class Route(Enum):
    """A path of the serving port, with its method."""

    CHAT = (b"/v1/chat/completions", b"POST")
    COMPLETIONS = (b"/v1/completions", b"POST")
    RESPONSES = (b"/v1/responses", b"POST")
    EMBEDDINGS = (b"/v1/embeddings", b"POST")
    TOKENIZE = (b"/tokenize", b"POST")
    DETOKENIZE = (b"/detokenize", b"POST")
    MODELS = (b"/v1/models", b"GET")
    HEALTH = (b"/health", b"GET")

    def __init__(self, path: bytes, method: bytes) -> None:
        self.path = path
        self.method = method
        self.label = self.name.lower()
        # Whether an engine computes for it, so that its size and its first token count.
        self.has_job = self.name in {"CHAT", "COMPLETIONS", "RESPONSES", "EMBEDDINGS"}
        # Whether its answer in one piece comes once the prompt is computed, as the first token of a stream does.
        self.only_reads = self.name == "EMBEDDINGS"


ROUTES: dict[bytes, Route] = {route.path: route for route in Route}


def strip_authority(target: bytes) -> bytes:
    """The path and query of a request target that names a host too (RFC 9112, 3.2.2); any other target as it is."""
    return _ABSOLUTE.sub(b"/", target, count=1) if target[:1] != b"/" else target


_ABSOLUTE = re.compile(rb"\Ahttps?://[^/?#]+(?:/|(?=\?)|\Z)", re.IGNORECASE)


def find_route(url: bytes) -> Route | None:
    """The route of a request target; None unless its path, without a query, is spelt exactly."""
    return ROUTES.get(url if b"?" not in url else url[: url.index(b"?")])
