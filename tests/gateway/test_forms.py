"""Forms of the audio routes: the model, the stream and the length of the recording."""

import contextlib
import math
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_gateway.request.form import COMPRESSED_BYTES_PER_S, LONGEST_FIELD_BYTES, TOKENS_PER_S, audio_s, parse_form
from moe_gateway.request.parsing import BadBody

HEADERS = b'accept: x\r\nContent-Type: multipart/form-data; boundary="b-1"\r\n'


def form(*fields):
    rows = []
    for name, value in fields:
        more = b'; filename="a.wav"\r\ncontent-type: audio/wav' if name == "file" else b""
        head = b'--b-1\r\nContent-Disposition: form-data; name="%b"%b' % (name.encode(), more)
        rows.append(head + b"\r\n\r\n" + value + b"\r\n")
    return b"".join(rows) + b"--b-1--\r\n"


def wav(seconds, rate=16_000, *, extra=b""):
    data = b"\0\0" * int(seconds * rate)
    described = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, rate, 2 * rate, 2, 16)
    rows = described + extra + struct.pack("<4sI", b"data", len(data)) + data
    return struct.pack("<4sI4s", b"RIFF", len(rows) + 4, b"WAVE") + rows


def test_the_model_and_the_stream_are_read_wherever_they_stand():
    for fields in ((("model", b"w"), ("file", b"x"), ("stream", b"true")), (("stream", b"True"), ("file", b"x"))):
        parsed = parse_form(HEADERS, form(*fields))
        assert parsed.stream
        assert parsed.model == (None if fields[0][0] == "stream" else "w")
    assert not parse_form(HEADERS, form(("stream", b"false"))).stream


def test_of_two_fields_of_one_name_the_last_counts_as_in_the_engine():
    parsed = parse_form(HEADERS, form(("model", b"a"), ("file", wav(9)), ("file", wav(2)), ("model", b"w")))
    assert (parsed.model, parsed.prompt_tokens) == ("w", 2 * TOKENS_PER_S)


def renamed(first, second, value=b"z"):
    """A field with two names, of which the engine takes the second."""
    heads = b"".join(b'Content-Disposition: form-data; name="%b"\r\n' % name for name in (first, second))
    return b"--b-1\r\n" + heads + b"\r\n" + value + b"\r\n"


def test_a_name_that_the_engine_does_not_take_hides_no_field():
    body = form(("model", b"w"), ("file", wav(2)), ("stream", b"1")).removesuffix(b"--b-1--\r\n")
    for name in (b"model", b"file", b"stream"):
        body += renamed(name, b"other")
    parsed = parse_form(HEADERS, body + b"--b-1--\r\n")
    assert (parsed.model, parsed.stream, parsed.prompt_tokens) == ("w", True, 2 * TOKENS_PER_S)


@pytest.mark.parametrize("name", ["kv_transfer_params", "vllm_xargs"])
def test_such_a_name_hides_no_field_of_the_gateway(name):
    body = form((name, b'{"kv_transfer_params": {}}')).removesuffix(b"--b-1--\r\n")
    with pytest.raises(BadBody, match="kv_transfer_params is set by the gateway alone"):
        parse_form(HEADERS, body + renamed(name.encode(), b"other") + b"--b-1--\r\n")


def test_a_long_first_value_hides_no_later_one():
    long, steers = b"{}" + b" " * LONGEST_FIELD_BYTES, b'{"kv_transfer_params": {}}'
    with pytest.raises(BadBody, match="kv_transfer_params is set by the gateway alone"):
        parse_form(HEADERS, form(("vllm_xargs", long), ("vllm_xargs", steers)))


@pytest.mark.parametrize("charset", ["utf-16", "utf-16-le", "cp037", "utf-7", "punycode", "none"])
def test_a_form_in_a_charset_that_would_hide_names_is_refused(charset):
    headers = HEADERS.replace(b'"b-1"', b'"b-1"; charset=%b' % charset.encode())
    with pytest.raises(BadBody, match="must be utf-8"):
        parse_form(headers, form(("model", b"w")))


@pytest.mark.parametrize(
    ("charset", "model"), [("UTF-8", "ü"), ("utf8", "ü"), ("iso-8859-1", "Ã¼"), ("us-ascii", "Ã¼")]
)
def test_the_usual_charsets_are_read_as_the_engine_does(charset, model):
    headers = HEADERS.replace(b'"b-1"', b'"b-1"; charset=%b' % charset.encode())
    assert parse_form(headers, form(("model", "ü".encode()))).model == model


@pytest.mark.parametrize("value", [b"true", b"TRUE", b"1", b"yes", b"y", b"t", b"on"])
def test_a_stream_is_what_pydantic_reads_as_one(value):
    assert parse_form(HEADERS, form(("stream", value))).stream
    assert not parse_form(HEADERS, form(("stream", value + b"?"))).stream


@pytest.mark.parametrize("seconds", [0, 0.5, 3, 30])
@pytest.mark.parametrize("extra", [b"", struct.pack("<4sI", b"LIST", 3) + b"abc\0"], ids=["plain", "with a list"])
def test_a_wav_has_its_real_length(seconds, extra):
    parsed = parse_form(HEADERS, form(("file", wav(seconds, extra=extra))))
    assert parsed.prompt_tokens == math.ceil(seconds * TOKENS_PER_S)


def test_a_compressed_recording_is_estimated_by_its_bytes():
    assert audio_s(b"ID3", 10 * COMPRESSED_BYTES_PER_S) == 10
    assert audio_s(b"RIFF\0\0\0\0WAVE", COMPRESSED_BYTES_PER_S) == 1


def test_a_stream_of_unknown_length_counts_what_is_there():
    recording = bytearray(wav(2))
    at = recording.index(b"data") + 4
    recording[at : at + 4] = b"\xff\xff\xff\xff"
    assert audio_s(bytes(recording[:100]), len(recording)) == pytest.approx(2)


def test_a_file_that_looks_like_a_boundary_stays_a_file():
    parsed = parse_form(HEADERS, form(("file", b"\r\n--b-" * 40_000), ("model", b"w")))
    assert (parsed.model, parsed.prompt_tokens) == ("w", math.ceil(240_000 / COMPRESSED_BYTES_PER_S * TOKENS_PER_S))


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        (b"", form(("model", b"w"))),
        (b"content-type: application/json\r\n", b"{}"),
        (b"content-type: multipart/form-data\r\n", form(("model", b"w"))),
        (b"content-type: multipart/form-data; boundary=\r\n", form(("model", b"w"))),
        (HEADERS, b"not a form"),
        (HEADERS, b"--b-1\r\nno colon\r\n\r\nx\r\n--b-1--\r\n"),
        (b"content-type: multipart/form-data; boundary=" + b"x" * 5000 + b"\r\n", b""),
    ],
    ids=["no type", "JSON", "no boundary", "empty boundary", "no form", "bad part", "long boundary"],
)
def test_what_is_no_form_is_refused(headers, body):
    with pytest.raises(BadBody):
        parse_form(headers, body)


@given(st.binary(max_size=300), st.binary(max_size=100))
def test_any_bytes_are_read_or_refused(body, headers):
    for head in (headers, HEADERS):
        with contextlib.suppress(BadBody):
            parsed = parse_form(head, body)
            assert parsed.prompt_tokens >= 0


@given(st.binary(max_size=200), st.integers(0, 2**40))
def test_any_recording_has_a_length(head, size):
    assert audio_s(head, size) >= 0
    assert audio_s(b"RIFF\0\0\0\0WAVE" + head, size) >= 0
    assert audio_s(wav(1)[:40] + head, size + 100) >= 0


def described(size, *, channels=1, rate=16_000, byte_rate=32_000, align=2, bits=16):
    """The head of a WAV file with one number that does not fit the others, and how long the whole file is."""
    rows = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, channels, rate, byte_rate, align, bits)
    return struct.pack("<4sI4s", b"RIFF", size + 36, b"WAVE") + rows + struct.pack("<4sI", b"data", size)


@pytest.mark.parametrize(
    "forged", [{"byte_rate": 2**32 - 1}, {"byte_rate": 0}, {"align": 65_535}, {"align": 0}], ids=str
)
def test_the_length_of_a_wav_is_what_a_decoder_finds(forged):
    size = 600 * 32_000
    assert audio_s(described(size, **forged), size + 44) == pytest.approx(600)


def test_a_wav_whose_data_has_no_size_goes_to_the_end_of_the_file():
    size = 600 * 32_000
    assert audio_s(described(0), size + 44) == pytest.approx(600)


@pytest.mark.parametrize(
    ("rate", "channels", "bits", "seconds"), [(8_000, 1, 8, 4), (48_000, 2, 24, 1), (16_000, 2, 4, 2)]
)
def test_channels_and_bits_of_a_wav_count(rate, channels, bits, seconds):
    size = seconds * rate * channels * bits // 8
    assert audio_s(described(size, rate=rate, channels=channels, bits=bits, align=1024), size + 44) == seconds


def test_a_wav_of_no_known_bits_counts_as_compressed():
    assert audio_s(described(COMPRESSED_BYTES_PER_S, bits=0), COMPRESSED_BYTES_PER_S + 44) == 1
