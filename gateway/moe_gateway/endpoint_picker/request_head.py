"""The head of a proxy's request as the gateway has it, and its changes on the way to an engine. Pure."""

from collections.abc import Iterable, Sequence

from moe_contract.peer_tokens import HEADER as PEER_HEADER
from moe_contract.tenancy import NOT_FORWARDED

from moe_gateway.endpoint_picker.proxy_messages import ENDPOINT
from moe_gateway.http.heads import RANK_HEADER
from moe_gateway.http.rare_headers import PRIORITY
from moe_gateway.http.whole_request import REQUEST_ID, SESSION_HEADERS
from moe_gateway.request.context import ClientRequest

Headers = Sequence[tuple[str, bytes]]
# Set by the endpoint picker alone, whatever a client sends.
OWN = (RANK_HEADER.decode(), PEER_HEADER)


def read_head(headers: Headers, new_request_id: bytes, now_s: float) -> ClientRequest:
    """The request, without its body.

    Args:
        headers: names in lower case and values, those that begin with a colon included.
        new_request_id: its id where it has none that can be used.
        now_s: when it came.
    """
    found = dict(reversed(headers))
    session = next((found[name] for name in map(bytes.decode, SESSION_HEADERS) if name in found), None)
    request_id = found.get("x-request-id", b"")
    return ClientRequest(
        method=found.get(":method", b""),
        url=found.get(":path", b""),
        headers=b"".join(b"%b: %b\r\n" % (name.encode(), value) for name, value in headers if _is_passed(name)),
        body=b"",
        request_id=request_id if REQUEST_ID.fullmatch(request_id) else new_request_id,
        session=None if session is None else session.decode("latin-1"),
        keep_alive=True,
        http10=False,
        arrived_s=now_s,
    )


def _is_passed(name: str) -> bool:
    return not name.startswith(":") and name not in NOT_FORWARDED and name not in OWN


def body_length(headers: Headers) -> int:
    """The length of the body as the head says it; 0 where it does not."""
    text = dict(headers).get("content-length", b"")
    return int(text) if text.isdigit() and len(text) <= 15 else 0


def find_given(headers: Headers, passed: bytes) -> dict[str, bytes]:
    """The priority that the gateway has written into the lines for the engine, by its header; empty where it has not.

    Args:
        headers: as they came.
        passed: the lines for the engine.
    """
    name = PRIORITY.decode()
    theirs = [value for key, value in headers if key == name]
    lines = [line.partition(b": ") for line in passed.split(b"\r\n")]
    written = [value for key, _, value in lines if key == PRIORITY]
    return {} if not written or written == theirs else {name: written[-1]}


def find_removed(headers: Headers, passed: bytes, given: Iterable[str]) -> set[str]:
    """Names of the headers that the engine must not get.

    Args:
        headers: as they came.
        passed: the lines that are left for the engine, such as without credentials and the encoding of a decoded body.
        given: names that get a value of the gateway's own.
    """
    left = {line.partition(b":")[0].decode("latin-1").lower() for line in passed.split(b"\r\n")}
    known = {name for name, _ in headers if _is_passed(name)}
    theirs = {name for name, _ in headers if name in OWN}
    return ((known - left) | theirs) - set(given) - {ENDPOINT}
