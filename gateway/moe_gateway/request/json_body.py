"""JSON as the engine takes it, which is more than RFC 8259 has. Pure.

vLLM reads bodies with Python's `json` and pydantic. Python's reader takes UTF-16, UTF-32 and a byte order mark, lone
surrogates, and `NaN` and `Infinity` as numbers. It is asked only where the fast reader refuses a body.
"""

import json
from typing import Any

import orjson
from pydantic import TypeAdapter, ValidationError

_INTEGER: TypeAdapter[int] = TypeAdapter(int)
_FLAG: TypeAdapter[bool] = TypeAdapter(bool)


def load_json(body: bytes) -> Any:
    """Returns the document of a body.

    Raises:
        ValueError: it is no JSON, not even in Python's sense, or nested too deep.
    """
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        try:
            return json.loads(body)
        except (ValueError, RecursionError):
            raise error from None


def dump_text(document: Any) -> bytes:
    """Returns a document as JSON; empty where it is nested too deep."""
    try:
        return orjson.dumps(document)
    except orjson.JSONEncodeError:
        try:
            return json.dumps(document).encode()
        except RecursionError:
            return b""


def read_integer(value: object) -> int:
    """Returns the integer that pydantic makes of a value, also of `0.0`, `"0"` and `false`.

    Raises:
        ValueError: it makes none.
    """
    try:
        return _INTEGER.validate_python(value)
    except ValidationError:
        raise ValueError("not an integer") from None


def read_flag(value: object) -> bool:
    """Returns whether pydantic reads a value as true, as it does `1` and `"true"`; False for what it refuses."""
    try:
        return _FLAG.validate_python(value)
    except ValidationError:
        return False
