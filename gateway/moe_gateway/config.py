"""Configuration of the gateway: the file that the plan writes, and the body that its control route takes."""

from pathlib import Path
from typing import Annotated

from moe_scheduling.engine import EngineSettings
from moe_scheduling.request import RequestSettings
from pydantic import BaseModel, ConfigDict, Field

Port = Annotated[int, Field(ge=1, le=65535)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Listen(_Section):
    """An address of the gateway."""

    host: str = "127.0.0.1"
    port: Port


class EngineAddress(_Section):
    """One server. Without `agent_url` it is a plain vLLM server and its `/metrics` are scraped."""

    name: str
    url: Annotated[str, Field(pattern=r"^http://[^/\s]+$")]
    agent_url: Annotated[str, Field(pattern=r"^http://[^/\s]+$")] | None = None
    ranks: Annotated[int, Field(ge=1)] = 1


class Limits(_Section):
    """What one client may cost. There is no bound on the length of a stream, only on its silence."""

    max_body_bytes: Annotated[int, Field(ge=1)] = 32 * 1024 * 1024
    header_timeout_s: Seconds = 10.0
    body_timeout_s: Seconds = 30.0
    connect_timeout_s: Seconds = 2.0
    idle_timeout_s: Seconds = 300.0
    hold_requests: Annotated[int, Field(ge=0)] = 1000
    hold_timeout_s: Seconds = 60.0


class GatewayConfig(_Section):
    """The whole file."""

    listen: Listen
    admin: Listen
    token_file: Path
    engines: tuple[EngineAddress, ...] = ()
    dispatch: EngineSettings = EngineSettings()
    request: RequestSettings = RequestSettings()
    limits: Limits = Limits()
