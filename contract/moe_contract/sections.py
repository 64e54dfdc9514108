"""Field types that the configuration of the agent and of the gateway share."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from moe_contract.addresses import LOOPBACK

Port = Annotated[int, Field(ge=1, le=65535)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Section(BaseModel):
    """Base of all sections of a configuration file: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Listen(Section):
    """An address that a process listens on.

    Attributes:
        host: name or IP address; `::` is all addresses of IPv4 and IPv6, of IPv4 alone on a machine without IPv6.
        port: TCP port.
    """

    host: str = LOOPBACK
    port: Port
