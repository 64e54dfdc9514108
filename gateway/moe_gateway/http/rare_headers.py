"""Headers that the gateway reads and few requests have: one look at a head tells whether any of them is there. Pure.

A client's connection takes the look once for each head that it has not seen before (`HeadMemory`), so that the parts
that read these headers cost the usual request nothing.
"""

DEADLINE = b"x-request-timeout"
# vLLM's own, which counts before the field `priority` of a body.
PRIORITY = b"x-vllm-priority"
_ENCODING = b"content-encoding"
_ORIGIN = b"origin"


class RareHeaders:
    """Finds out whether a head may have one of these headers.

    Args:
        tenant: name of the header that names a tenant, in lower case; empty: none does.
    """

    __slots__ = ("_marks",)

    def __init__(self, tenant: bytes = b"") -> None:
        self._marks = tuple(name + b":" for name in (DEADLINE, PRIORITY, _ENCODING, _ORIGIN, tenant) if name)

    def may_occur(self, headers: bytes) -> bool:
        """Whether these lines may have one: never False where they do, and True too for a name that ends alike."""
        lines = headers.lower()
        return any(mark in lines for mark in self._marks)
