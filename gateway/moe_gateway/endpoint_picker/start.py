"""Makes the endpoint picker of a gateway, or says why there can be none."""

import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from moe_contract.addresses import is_address
from moe_contract.gateway_config import GatewayConfig
from moe_contract.input_errors import InputError, InvalidInput
from moe_contract.peer_tokens import PeerTokens
from moe_contract.picker_config import EndpointPickerConfig

from moe_gateway.request.context import ExchangeContext

if TYPE_CHECKING:
    from moe_gateway.endpoint_picker.server import EndpointPicker

MODULES = ("grpc", "grpc_health")


def make_picker(
    settings: EndpointPickerConfig,
    config: GatewayConfig,
    context: ExchangeContext,
    *,
    new_request_id: Callable[[], bytes],
    peer_tokens: PeerTokens | None,
    is_ready: Callable[[], bool],
) -> "EndpointPicker":
    """The endpoint picker.

    Args:
        settings: of the endpoint picker.
        config: of the gateway.
        context: the gateway's parts.
        new_request_id: names a request that has no usable id of its own.
        peer_tokens: show an engine that a request was picked by its deployment's own; None without a file of them.
        is_ready: whether requests should be asked about here.

    Raises:
        InvalidInput: gRPC is not installed, or an engine has no IP address.
    """
    check_engines(config)
    if not all(find_spec(module) for module in MODULES):
        message = "the endpoint picker needs gRPC: pip install 'moeserving[epp]'"
        raise InvalidInput([InputError("endpoint_picker", message)])
    # Else gRPC warns at each start of the process that parses large bodies.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "false")
    from moe_gateway.endpoint_picker.admission import PickerParts
    from moe_gateway.endpoint_picker.server import EndpointPicker

    parts = PickerParts(
        context=context,
        settings=settings,
        limits=config.limits,
        new_request_id=new_request_id,
        peer_tokens=peer_tokens,
    )
    return EndpointPicker(parts, is_ready)


def check_engines(config: GatewayConfig) -> None:
    """Proxies take IP addresses, and no names.

    Raises:
        InvalidInput: an engine is named by its host.
    """
    for number, engine in enumerate(config.engines):
        if not is_address(urlsplit(engine.url).hostname or ""):
            message = (
                f"proxies of the endpoint picker take IP addresses, such as http://127.0.0.1:8001, got {engine.url}"
            )
            raise InvalidInput([InputError(f"engines[{number}].url", message)])
