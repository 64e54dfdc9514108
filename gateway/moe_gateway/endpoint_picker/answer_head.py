"""The head of an answer as a proxy shows it: the engine that has answered, and faults on the way to it. Pure.

Names: Endpoint Picker Protocol 1.0 and Envoy's attributes, which its filter sends where `response_attributes` asks.
"""

from dataclasses import dataclass
from enum import Enum

from moe_contract import engine_death

from moe_gateway.endpoint_picker.proxy_messages import read_headers
from moe_gateway.endpoint_picker.wire import Message

_NAMESPACE, _SERVED = "envoy.lb", "x-gateway-destination-endpoint-served"
_ADDRESS, _DETAILS, _ATTEMPTS = "upstream.address", "response.code_details", "upstream.request_attempt_count"
_VIA_UPSTREAM = "via_upstream"
# With these a proxy says that it got no answer.
_PROXYS_OWN = (502, 503, 504)
# Reasons in Envoy's details and in the text of its own answers, the former with underscores.
_NOT_CONNECTED = (b"connection failure", b"connection timeout")
_CUT_OFF = (b"connection termination", b"remote reset")


class ProxyFault(Enum):
    """What a proxy says of its way to an engine: nothing, no connection came about, or the engine cut it off."""

    NOT_SAID = "not said"
    NOT_CONNECTED = "not connected"
    CUT_OFF = "cut off"


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerHead:
    """The head of an answer.

    Attributes:
        status: of the answer; 0 where it has none.
        content_type: of the answer.
        content_encoding: of the answer; empty for none.
        engine: what the engine's middleware says of its core; empty where nothing.
        served: endpoint that has answered, `IP:PORT`; empty where the proxy does not say.
        details: where the answer comes from, in Envoy's words; empty where the proxy does not say.
        attempts: how often the proxy has sent the request; 0 where it does not say.
        is_overloaded: the proxy has reached a limit of its own.
    """

    status: int
    content_type: bytes = b""
    content_encoding: bytes = b""
    engine: bytes = b""
    served: str = ""
    details: str = ""
    attempts: int = 0
    is_overloaded: bool = False

    @property
    def is_proxys_own(self) -> bool:
        """Whether the proxy has written it; without its word an error that is not JSON, as those of engines are."""
        if self.status not in _PROXYS_OWN:
            return False
        return self.details != _VIA_UPSTREAM if self.details else b"json" not in self.content_type

    @property
    def fault(self) -> ProxyFault:
        """What the head says of the way to the engine."""
        return ProxyFault.NOT_SAID if self.is_overloaded else find_fault(self.details.encode())


def find_fault(text: bytes) -> ProxyFault:
    """What details or the text of a proxy's own answer say of its way to the engine."""
    words = text.replace(b"_", b" ")
    if any(reason in words for reason in _NOT_CONNECTED):
        return ProxyFault.NOT_CONNECTED
    return ProxyFault.CUT_OFF if any(reason in words for reason in _CUT_OFF) else ProxyFault.NOT_SAID


def read_answer_head(message: Message) -> AnswerHead:
    """The head in a message about the headers of an answer."""
    headers = dict(read_headers(message.response_headers.headers))
    status = headers.get(":status", b"")
    attributes = {name: value for struct in message.attributes.values() for name, value in struct.fields.items()}
    texts = {name: value.string_value for name, value in attributes.items()}
    return AnswerHead(
        status=int(status) if status.isdigit() and len(status) == 3 else 0,
        content_type=headers.get("content-type", b""),
        content_encoding=headers.get("content-encoding", b""),
        engine=headers.get(engine_death.NAME.decode(), b""),
        served=_read_served(message) or texts.get(_ADDRESS, ""),
        details=texts.get(_DETAILS, ""),
        attempts=_as_count(attributes[_ATTEMPTS].number_value) if _ATTEMPTS in attributes else 0,
        is_overloaded="x-envoy-overloaded" in headers,
    )


def _read_served(message: Message) -> str:
    found = message.metadata_context.filter_metadata.get(_NAMESPACE)
    return str(found.fields[_SERVED].string_value) if found is not None and _SERVED in found.fields else ""


def _as_count(number: float) -> int:
    return int(number) if 0 <= number < 1000 else 0
