"""Compressed bodies of requests (`Content-Encoding`), decoded within a limit of their size. Pure.

vLLM's server decodes none, so the gateway does and passes the decoded body on, without the header.
"""

import re
import zlib
from collections.abc import Callable
from typing import Protocol

from backports.zstd import DecompressionParameter, ZstdDecompressor, ZstdError

from moe_gateway.http.bodies import BodyRefused
from moe_gateway.http.replies import KNOWN_ENCODINGS, RequestOutcome

# More than one is allowed (RFC 9110, 8.4) and hardly used.
MOST_ENCODINGS = 3
# Each of the members (gzip) or frames (zstd) of a body costs a decoder of its own.
MOST_MEMBERS = 1000
# A decoder gets this much at a time, since it copies what follows the end of its member.
SLICE_BYTES = 64 * 1024
# The largest window that zstd may have in HTTP (RFC 9659), 8 MiB, which bounds the memory of a decoder.
_ZSTD_WINDOW_LOG = 23
_LINE = re.compile(rb"(?:(?<=\n)|\A)content-encoding:([^\r\n]*)\r\n", re.IGNORECASE)


class EncodingRefused(BodyRefused):
    """A body cannot be decoded."""


class Decoder(Protocol):
    """A decoder of one compressed piece of data."""

    @property
    def eof(self) -> bool:
        """Whether its end has been reached."""

    @property
    def unused_data(self) -> bytes:
        """The bytes that follow its end."""

    def decompress(self, data: bytes, max_length: int) -> bytes:
        """Returns the next decoded bytes, at most `max_length`."""


def may_have_encoding(headers: bytes) -> bool:
    """Whether `take_encoding` is worth calling: a search that costs next to nothing, for every request."""
    return b"ent-encoding:" in headers or b"ent-Encoding:" in headers or b"ENT-ENCODING:" in headers


def take_encoding(headers: bytes) -> tuple[list[bytes], bytes]:
    """The encodings in the order in which they were applied, and the header lines without them.

    Args:
        headers: lines that each end with CRLF.
    """
    values = b",".join(_LINE.findall(headers))
    names = [name.strip().lower() for name in values.split(b",")]
    return [name for name in names if name not in (b"", b"identity")], _LINE.sub(b"", headers)


def check_encodings(encodings: list[bytes]) -> None:
    """Refuses encodings that are not known, or too many.

    Raises:
        EncodingRefused: the text names the known ones.
    """
    unknown = [name for name in encodings if name not in _DECODERS]
    if unknown or len(encodings) > MOST_ENCODINGS:
        named = b", ".join(unknown or encodings)[:100].decode("latin-1")
        message = f"content-encoding {named!r} is not known; known: {KNOWN_ENCODINGS.decode()}, identity"
        raise EncodingRefused(RequestOutcome.UNSUPPORTED_ENCODING, message)


def decode_body(
    body: bytes, encodings: list[bytes], most_bytes: int, is_wanted: Callable[[], bool] = lambda: True
) -> bytes:
    """Returns the decoded body.

    Args:
        body: as it came.
        encodings: in the order in which they were applied.
        most_bytes: largest size that any step may have.
        is_wanted: whether somebody still waits for the body; asked before each slice.

    Raises:
        EncodingRefused: an encoding is not known, the body is not valid in it, has more than `MOST_MEMBERS` parts, is
            larger than `most_bytes`, or nobody waits for it.
    """
    check_encodings(encodings)
    for name in reversed(encodings):
        body = _decode(body, name, most_bytes, is_wanted)
    return body


def _decode(body: bytes, name: bytes, most_bytes: int, is_wanted: Callable[[], bool]) -> bytes:
    parts: list[bytes] = []
    at, left = 0, most_bytes
    for _ in range(MOST_MEMBERS):
        if at >= len(body):
            return b"".join(parts)
        # Several members or frames may follow one another.
        decoder = _DECODERS[name](body[at : at + 2])
        while not decoder.eof:
            if at >= len(body):
                raise _bad(f"the body in {name.decode()} ends before it is whole")
            if not is_wanted():
                raise EncodingRefused(RequestOutcome.CLIENT_GONE, "nobody waits for the body")
            parts.append(_decode_slice(decoder, body[at : at + SLICE_BYTES], name, left + 1))
            at = min(at + SLICE_BYTES, len(body)) - len(decoder.unused_data)
            left -= len(parts[-1])
            if left < 0:
                message = f"the decoded body is larger than {most_bytes} bytes"
                raise EncodingRefused(RequestOutcome.BODY_TOO_LARGE, message)
    if at < len(body):
        raise _bad(f"the body has more than {MOST_MEMBERS} parts that are each compressed in {name.decode()}")
    return b"".join(parts)


def _decode_slice(decoder: Decoder, data: bytes, name: bytes, most_bytes: int) -> bytes:
    try:
        return decoder.decompress(data, most_bytes)
    except (zlib.error, ZstdError) as error:
        raise _bad(f"the body is not valid {name.decode()}: {error}") from None


def _bad(message: str) -> EncodingRefused:
    return EncodingRefused(RequestOutcome.BAD_REQUEST, message)


def _gzip(_body: bytes) -> Decoder:
    return zlib.decompressobj(16 + zlib.MAX_WBITS)


def _deflate(body: bytes) -> Decoder:
    """Decodes zlib's format (RFC 1950), and the bare data that some clients send, by which of them it begins like."""
    is_zlib = len(body) > 1 and body[0] & 0x0F == 8 and (body[0] << 8 | body[1]) % 31 == 0
    return zlib.decompressobj(zlib.MAX_WBITS if is_zlib else -zlib.MAX_WBITS)


def _zstd(_body: bytes) -> Decoder:
    return ZstdDecompressor(options={DecompressionParameter.window_log_max: _ZSTD_WINDOW_LOG})


_DECODERS = {b"gzip": _gzip, b"x-gzip": _gzip, b"deflate": _deflate, b"zstd": _zstd}
