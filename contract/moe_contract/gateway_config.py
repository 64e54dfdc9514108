"""Configuration of the gateway: the file that the plan writes, and the body that its control route takes."""

from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

from moe_scheduling.engine.choice import EngineSettings
from moe_scheduling.request.order import RequestSettings
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from moe_contract.tenancy import DEFAULT_HEADER, check_tenant_header

Port = Annotated[int, Field(ge=1, le=65535)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def _check_address(url: str) -> str:
    """`http://HOST[:PORT]` and nothing more.

    Raises:
        ValueError: it is something else.
    """
    try:
        parts = urlsplit(url)
        rebuilt = f"http://[{parts.hostname}]" if ":" in (parts.hostname or "") else f"http://{parts.hostname}"
        if parts.port is not None:
            rebuilt += f":{parts.port}"
    except ValueError:
        rebuilt = ""
    if not url.isascii() or not url.isprintable() or " " in url or rebuilt != url.lower():
        raise ValueError(f"an address such as http://127.0.0.1:8001 is needed, got {url[:80]!r}")
    return url


Address = Annotated[str, AfterValidator(_check_address)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Listen(_Section):
    """An address of the gateway."""

    host: str = "127.0.0.1"
    port: Port


class EngineAddress(_Section):
    """One server. Without `agent_url` it is a plain vLLM server and its `/metrics` are scraped."""

    name: str
    url: Address
    agent_url: Address | None = None
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


class Group(_Section):
    """A revision of the engines: those behind one Service.

    Attributes:
        service: name of the Service whose EndpointSlices name the engines.
        weight: its part of the requests beside the weights of the other groups that have an accepting engine.
    """

    service: str
    weight: Annotated[int, Field(ge=0, le=100)] = 100


class Discovery(_Section):
    """Engines found in a Kubernetes namespace.

    Attributes:
        namespace: where; None is the pod's own.
        groups: Services of the engines.
        ranks: data-parallel ranks of each engine.
    """

    namespace: str | None = None
    groups: tuple[Group, ...] = ()
    ranks: Annotated[int, Field(ge=1)] = 1


class GatewayConfig(_Section):
    """The whole file.

    Attributes:
        settings_file: a JSON object with any of `dispatch`, `request` and `groups`, laid over this file at the start
            when it exists.
        model: name of the model that the engines serve, when it is known before any engine is.
        engines: a fixed list, unless `discovery` finds them.
        tenant_header: the header that names the tenant of a request, in lower case; empty: all are the nameless one's.
    """

    listen: Listen
    admin: Listen
    token_file: Path
    settings_file: Path | None = None
    model: str | None = None
    discovery: Discovery | None = None
    engines: tuple[EngineAddress, ...] = ()
    dispatch: EngineSettings = EngineSettings()
    request: RequestSettings = RequestSettings()
    limits: Limits = Limits()
    tenant_header: Annotated[str, AfterValidator(check_tenant_header)] = DEFAULT_HEADER
