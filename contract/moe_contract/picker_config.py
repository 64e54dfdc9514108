"""The section of the gateway's configuration for its endpoint picker, which picks engines for another proxy."""

from typing import Annotated

from pydantic import Field

from moe_contract.sections import Listen, Section

# Where an endpoint picker of an `InferencePool` listens unless its reference says otherwise.
PICKER_PORT_NAME, PICKER_PORT = "picker", 9002


class EndpointPickerConfig(Section):
    """The endpoint picker: an Envoy external processor of the Gateway API Inference Extension.

    Attributes:
        listen: address of its gRPC server.
        tls: serve TLS, with a certificate that is made at the start; proxies do not verify it.
        fallbacks: further engines that are named behind the picked one, for proxies that retry.
    """

    listen: Listen
    tls: bool = False
    fallbacks: Annotated[int, Field(ge=0, le=8)] = 0
