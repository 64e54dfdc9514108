"""Reads the forms of the audio routes: the model, whether a stream is asked for, and the length of the recording. Pure.

The form itself goes to the engine as it came. `python-multipart`, which vLLM uses too, reads it.
"""

import math
import struct

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from moe_gateway.request.json_body import read_flag
from moe_gateway.request.parsing import BadBody, Parsed, refuse_transfer
from moe_gateway.request.unusual_fields import find_form_transfer_field

# Whisper makes 1,500 positions of 30 seconds.
TOKENS_PER_S = 50
# Bytes of a second of compressed sound, at the usual 128 kbit/s; its real length would have to be decoded.
COMPRESSED_BYTES_PER_S = 16_000
LONGEST_FIELD_BYTES = 64 * 1024
# Of a form, by the names that clients give them. vLLM reads names and values in any that Python knows, also in some in
# which a name has other bytes, or that take long.
_CHARSETS = {
    **dict.fromkeys(("utf-8", "utf8"), "utf-8"),
    **dict.fromkeys(("us-ascii", "ascii"), "ascii"),
    **dict.fromkeys(("iso-8859-1", "latin-1", "latin1"), "latin-1"),
}
_FILE = "file"


class _Fields:
    """Collects the fields of a form; of a file its length and its first bytes.

    It reads them as the engine does: of two fields of one name the last counts, and so does the last name of a field.

    Attributes:
        values: texts by the name of their field.
        file_head: the first bytes of the file.
        file_bytes: its length; None without a file.
    """

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.file_head = b""
        self.file_bytes: int | None = None
        self._name = ""
        self._disposition = self._header = self._value = b""

    def on_part_begin(self) -> None:
        self._disposition = b""

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def on_header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = self._value
        self._header = self._value = b""

    def on_headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        self._name = options.get(b"name", b"").decode("latin-1")
        if self._name == _FILE:
            self.file_bytes, self.file_head = 0, b""
        else:
            self.values.pop(self._name, None)

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._name == _FILE:
            self.file_bytes = (self.file_bytes or 0) + end - start
            self.file_head += data[start : min(end, start + LONGEST_FIELD_BYTES - len(self.file_head))]
        else:
            known = self.values.get(self._name, b"")
            self.values[self._name] = known + data[start : min(end, start + LONGEST_FIELD_BYTES - len(known))]


def parse_form(headers: bytes, body: bytes) -> Parsed:
    """Reads a form.

    Args:
        headers: the lines of the request's head, each ended by CRLF.
        body: the whole body.

    Raises:
        BadBody: it is not a form, or has a field that the gateway alone may set.
    """
    boundary, charset = _read_type(headers)
    fields = _read_fields(boundary, body)
    values = {name: _decode(value, charset) for name, value in fields.values.items()}
    refuse_transfer(find_form_transfer_field(values))
    seconds = 0.0 if fields.file_bytes is None else audio_s(fields.file_head, fields.file_bytes)
    model, stream, prompt = values.get("model"), read_flag(values.get("stream", "")), fields.values.get("prompt", b"")
    tokens = math.ceil(seconds * TOKENS_PER_S) + len(prompt) // 4
    return Parsed(model or None, stream, 0, None, b"", tokens)


def audio_s(head: bytes, file_bytes: int) -> float:
    """The length of a recording in seconds: exact for WAV, by `COMPRESSED_BYTES_PER_S` for all else.

    Args:
        head: its first bytes.
        file_bytes: its whole length.
    """
    at = 12
    bytes_per_s = 0.0
    if head[:4] != b"RIFF" or head[8:12] != b"WAVE":
        return file_bytes / COMPRESSED_BYTES_PER_S
    while at + 8 <= len(head):
        name, size = head[at : at + 4], int(struct.unpack_from("<I", head, at + 4)[0])
        if name == b"fmt " and at + 24 <= len(head):
            bytes_per_s = _read_rate(head, at + 8)
        elif name == b"data" and bytes_per_s:
            # Who writes a stream does not know its length, and leaves 0 or the largest number there.
            rest = file_bytes - at - 8
            return min(size or rest, rest) / bytes_per_s
        at += 8 + size + size % 2
    return file_bytes / (bytes_per_s or COMPRESSED_BYTES_PER_S)


def _read_rate(head: bytes, at: int) -> float:
    """Bytes of a second of sound by a WAV file's format: what decoders go by, which is not its field for that rate."""
    channels, rate = struct.unpack_from("<HI", head, at + 2)
    bits = int(struct.unpack_from("<H", head, at + 14)[0])
    return float(rate * channels * bits / 8) or COMPRESSED_BYTES_PER_S


def _read_type(headers: bytes) -> tuple[bytes, str]:
    """The boundary and the charset of a form."""
    lines = (line.partition(b":") for line in headers.split(b"\r\n"))
    content_type = next((value.strip() for name, _, value in lines if name.lower() == b"content-type"), b"")
    kind, options = parse_options_header(content_type)
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not boundary:
        raise BadBody("the body must be multipart/form-data with a boundary")
    charset = _CHARSETS.get(options.get(b"charset", b"utf-8").decode("latin-1").lower())
    if charset is None:
        raise BadBody("the charset of a form must be utf-8")
    return boundary, charset


def _decode(text: bytes, charset: str) -> str:
    """A value as vLLM's server reads it."""
    try:
        return text.decode(charset)
    except UnicodeDecodeError:
        return text.decode("latin-1")


def _read_fields(boundary: bytes, body: bytes) -> _Fields:
    fields = _Fields()
    try:
        parser = MultipartParser(
            boundary,
            {
                "on_part_begin": fields.on_part_begin,
                "on_header_field": fields.on_header_field,
                "on_header_value": fields.on_header_value,
                "on_header_end": fields.on_header_end,
                "on_headers_finished": fields.on_headers_finished,
                "on_part_data": fields.on_part_data,
            },
        )
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise BadBody(f"the body is not a valid form: {error}") from None
    return fields
