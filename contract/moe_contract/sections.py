"""Field types that the configuration of the agent and of the gateway share."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Port = Annotated[int, Field(ge=1, le=65535)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Section(BaseModel):
    """Base of all sections of a configuration file: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Listen(Section):
    """An address that a process listens on.

    Attributes:
        host: name or IP address.
        port: TCP port.
    """

    host: str = "127.0.0.1"
    port: Port
