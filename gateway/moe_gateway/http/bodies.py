"""Bodies of requests: one of the usual size is bytes, a large one stays in the pieces in which it came. Pure.

To join a large body takes milliseconds, in which no other stream moves, and nobody but a parser needs it in one piece.
"""

from moe_gateway.http.replies import RequestOutcome

LARGE_BODY_BYTES = 1024 * 1024


class BodyRefused(ValueError):
    """A body cannot be read; the text is for the client.

    Attributes:
        outcome: how the request ends.
        retry_after_s: when the client may come again; None where that would change nothing.
    """

    def __init__(self, outcome: RequestOutcome, message: str, *, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.outcome = outcome
        self.retry_after_s = retry_after_s


class LargeBody:
    """A body in pieces.

    Attributes:
        parts: the pieces in their order.
    """

    __slots__ = ("_length", "parts")

    def __init__(self, parts: tuple[bytes, ...]) -> None:
        self.parts = parts
        self._length = sum(map(len, parts))

    def __len__(self) -> int:
        return self._length

    def join(self) -> bytes:
        """The body in one piece."""
        return b"".join(self.parts)


Body = bytes | LargeBody
PIECE_BYTES = 256 * 1024


def build_body(parts: list[bytes]) -> Body:
    """The body that came in these pieces."""
    if len(parts) == 1:
        return split_body(parts[0])
    if sum(map(len, parts)) > LARGE_BODY_BYTES:
        return LargeBody(tuple(parts))
    return b"".join(parts)


def split_body(body: bytes) -> Body:
    """A body that is in one piece, in smaller ones where it is large."""
    if len(body) <= LARGE_BODY_BYTES:
        return body
    return LargeBody(tuple(body[start : start + PIECE_BYTES] for start in range(0, len(body), PIECE_BYTES)))
