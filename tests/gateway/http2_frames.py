"""HTTP/2 requests written frame by frame, for those that a client library does not send."""

import asyncio
import contextlib
import struct

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, GOAWAY = 0, 1, 3, 4, 7
END_STREAM, END_HEADERS = 1, 4


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """One frame."""
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def literal(name: str, value: str) -> bytes:
    """A header that enters no table."""
    return b"\x10" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()


def request_with_trailers(headers: dict[str, str], body: bytes | None = None) -> bytes:
    """The frames of a request that ends with a trailer; no frame of a body with None."""
    head = frame(HEADERS, END_HEADERS, 1, b"".join(literal(*row) for row in headers.items()))
    middle = b"" if body is None else frame(DATA, 0, 1, body)
    return head + middle + frame(HEADERS, END_HEADERS | END_STREAM, 1, literal("x-t", "1"))


async def exchange(port: int, frames: bytes) -> bytes:
    """Sends the frames and returns the bytes that come until the stream of the request has ended."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(PREFACE + frame(SETTINGS, 0, 0, b"") + frames)
    received = b""
    with contextlib.suppress(asyncio.IncompleteReadError):
        async with asyncio.timeout(60):
            while True:
                head = await reader.readexactly(9)
                payload = await reader.readexactly(int.from_bytes(head[:3]))
                kind, flags, stream = head[3], head[4], int.from_bytes(head[5:])
                received += payload if stream else b""
                ended = stream and kind in (DATA, HEADERS) and flags & END_STREAM
                if ended or kind == GOAWAY or (kind == RST_STREAM and stream):
                    break
    writer.close()
    return received
