"""Credentials in the head of a request: found, and taken out before the head goes on to an engine. Pure."""

import re

# The lines are read as the clients wrote them, so their names may have any case.
_CREDENTIAL = re.compile(rb"(?:(?<=\n)|\A)(authorization|x-api-key):[\t ]*([^\r]*)\r\n", re.IGNORECASE)
_BEARER = re.compile(rb"bearer[ \t]+(\S+)", re.IGNORECASE)


def split_credentials(headers: bytes) -> tuple[list[bytes], bytes]:
    """Keys and tokens of a request in their order, and its header lines without the fields that carry them.

    A field of another scheme than `Bearer` carries none, and is taken out as well: it was meant for the gateway.
    """
    found = _CREDENTIAL.findall(headers)
    if not found:
        return [], headers
    return [key for name, value in found if (key := _read(name, value))], _CREDENTIAL.sub(b"", headers)


def _read(name: bytes, value: bytes) -> bytes:
    if len(name) == len(b"x-api-key"):
        return value.strip()
    bearer = _BEARER.fullmatch(value.strip())
    return b"" if bearer is None else bearer[1]
