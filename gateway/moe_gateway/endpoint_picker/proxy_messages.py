"""The messages of a proxy, read and built. Pure.

Names and structure: Endpoint Picker Protocol 1.0 (gateway-api-inference-extension, proposal 004).
"""

from collections.abc import Iterable, Mapping, Sequence

from google.protobuf.struct_pb2 import Struct

from moe_gateway.endpoint_picker.wire import (
    FULL_DUPLEX,
    OVERWRITE_IF_EXISTS_OR_ADD,
    BodyMutation,
    BodyResponse,
    CommonResponse,
    HeaderMutation,
    HeadersResponse,
    HeaderValue,
    HeaderValueOption,
    HttpStatus,
    ImmediateResponse,
    Message,
    ProcessingResponse,
    StreamedBodyResponse,
    TrailersResponse,
)

ENDPOINT = "x-gateway-destination-endpoint"
_NAMESPACE = "envoy.lb"
_SUBSET_NAMESPACE, _SUBSET = "envoy.lb.subset_hint", "x-gateway-destination-endpoint-subset"
# Envoy takes a body in parts of this length without a buffer of its own being exceeded.
PART_BYTES = 62_000
_NOT_OF_ANSWER = frozenset({"content-length", "connection"})


def read_headers(headers: Message) -> list[tuple[str, bytes]]:
    """Names, in lower case, and values of the headers, those that begin with a colon included."""
    return [(row.key.lower(), row.raw_value or row.value.encode()) for row in headers.headers]


def read_body_modes(message: Message) -> tuple[int, int]:
    """How the bodies of request and answer are sent; in both directions, as the protocol has it, by default."""
    if not message.HasField("protocol_config"):
        return FULL_DUPLEX, FULL_DUPLEX
    return message.protocol_config.request_body_mode, message.protocol_config.response_body_mode


def read_subset(metadata: Message) -> frozenset[str] | None:
    """The endpoints, `IP:PORT`, from which one must be picked; None: from all."""
    found = metadata.filter_metadata.get(_SUBSET_NAMESPACE)
    if found is None or _SUBSET not in found.fields:
        return None
    value = found.fields[_SUBSET]
    rows = [row.string_value for row in value.list_value.values]
    # Some proxies give one text instead of a list.
    rows += value.string_value.split(",")
    return frozenset(row.strip() for row in rows if row.strip())


def continue_answer() -> Message:
    """The headers of an answer stay as they are."""
    return ProcessingResponse(response_headers=HeadersResponse(response=CommonResponse()))


def await_body(removed: Iterable[str]) -> Message:
    """The headers of a request whose pick follows its body: without these, and without a destination of the client."""
    mutation = HeaderMutation(remove_headers=sorted({ENDPOINT, *removed}))
    return ProcessingResponse(request_headers=HeadersResponse(response=CommonResponse(header_mutation=mutation)))


def continue_body(body: Message, mode: int, *, of_answer: bool) -> Message:
    """A part of a body stays as it is; in both directions it is given back."""
    common = CommonResponse()
    if mode == FULL_DUPLEX:
        common = _give_back(body.body, end=body.end_of_stream)
    unchanged = BodyResponse(response=common)
    return ProcessingResponse(response_body=unchanged) if of_answer else ProcessingResponse(request_body=unchanged)


def continue_trailers(*, of_answer: bool) -> Message:
    """Trailers stay as they are."""
    unchanged = TrailersResponse()
    if of_answer:
        return ProcessingResponse(response_trailers=unchanged)
    return ProcessingResponse(request_trailers=unchanged)


def pick_at_headers(endpoints: Sequence[str], changes: Mapping[str, bytes], removed: Iterable[str]) -> Message:
    """The answer to the headers of a request: where it goes, `IP:PORT` each, the first choice first."""
    common = CommonResponse(header_mutation=_mutate(endpoints, changes, removed))
    return ProcessingResponse(
        request_headers=HeadersResponse(response=common), dynamic_metadata=_build_metadata(endpoints)
    )


def pick_at_body(
    endpoints: Sequence[str], changes: Mapping[str, bytes], removed: Iterable[str], body: bytes | None
) -> Message:
    """The answer to the whole body of a request: where it goes; `body` is in its place, None leaves it."""
    mutation = None if body is None else BodyMutation(body=body)
    common = CommonResponse(header_mutation=_mutate(endpoints, changes, removed), body_mutation=mutation)
    return ProcessingResponse(request_body=BodyResponse(response=common), dynamic_metadata=_build_metadata(endpoints))


def send_body(parts: Iterable[bytes], *, end: bool) -> list[Message]:
    """The body of a request in parts; `end`: no trailers follow it."""
    pieces = [part[at : at + PART_BYTES] for part in parts for at in range(0, len(part), PART_BYTES)] or [b""]
    return [
        ProcessingResponse(
            request_body=BodyResponse(response=_give_back(piece, end=end and number == len(pieces) - 1)),
        )
        for number, piece in enumerate(pieces)
    ]


def answer_at_once(answer: bytes) -> Message:
    """An answer without an engine; `answer` is a whole HTTP response of the gateway."""
    head, _, body = answer.partition(b"\r\n\r\n")
    status_line, *lines = head.decode("latin-1").split("\r\n")
    rows = [(name.lower(), value.strip()) for name, _, value in (line.partition(":") for line in lines)]
    headers = [_header(name, value.encode()) for name, value in rows if name not in _NOT_OF_ANSWER]
    return ProcessingResponse(
        immediate_response=ImmediateResponse(
            status=HttpStatus(code=int(status_line.split(" ")[1])),
            headers=HeaderMutation(set_headers=headers),
            body=body,
            details="endpoint_picker",
        )
    )


def _give_back(part: bytes, *, end: bool) -> Message:
    return CommonResponse(
        body_mutation=BodyMutation(streamed_response=StreamedBodyResponse(body=part, end_of_stream=end))
    )


def _mutate(endpoints: Sequence[str], changes: Mapping[str, bytes], removed: Iterable[str]) -> Message:
    given = {ENDPOINT: ",".join(endpoints).encode(), **changes}
    return HeaderMutation(
        set_headers=[_header(name, value) for name, value in given.items()], remove_headers=sorted(removed)
    )


def _header(name: str, value: bytes) -> Message:
    return HeaderValueOption(
        header=HeaderValue(key=name, raw_value=value),
        append_action=OVERWRITE_IF_EXISTS_OR_ADD,
    )


def _build_metadata(endpoints: Sequence[str]) -> Struct:
    metadata = Struct()
    metadata.update({_NAMESPACE: {ENDPOINT: ",".join(endpoints)}})
    return metadata
