"""Configuration of the gateway: its file, the settings file laid over it, and the body of its control route.

The operator's plan writes the file, `moeserving gateway` loads it, and `PUT /v1/config` changes the settings.
"""

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar
from urllib.parse import urlsplit

from moe_scheduling.engine.choice import EngineSettings
from moe_scheduling.request.order import RequestSettings
from pydantic import AfterValidator, Field

from moe_contract.access_config import Auth, Tls
from moe_contract.documents import parse_document, parse_model, read_file, read_optional_file
from moe_contract.input_errors import InputError, InvalidInput
from moe_contract.kv_transfer import Disaggregation
from moe_contract.picker_config import EndpointPickerConfig
from moe_contract.sections import Listen, Seconds, Section
from moe_contract.tenancy import DEFAULT_HEADER, check_tenant_header

FOUND_BY_DISCOVERY = "the engines are found by discovery, so there is no list of them; known: groups"


def _check_address(url: str) -> str:
    """The address itself, which must be `http://HOST[:PORT]`.

    Raises:
        ValueError: it has another form.
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


def check_endpoint(url: str) -> str:
    """The address of a collector itself, `http://` or `https://`, perhaps with a path.

    Raises:
        ValueError: it has another form.
    """
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid or not url.isascii() or not url.isprintable() or set(url) & set(" ?#@"):
        raise ValueError(f"an address such as http://collector:4318 is needed, got {url[:80]!r}")
    return url


Address = Annotated[str, AfterValidator(_check_address)]


class EngineAddress(Section):
    """One engine of a fixed list.

    Attributes:
        name: in metrics, logs and states.
        url: of vLLM's HTTP server.
        agent_url: of its node agent; None: a plain vLLM server, whose `/metrics` are scraped.
        ranks: its data-parallel ranks.
    """

    name: str
    url: Address
    agent_url: Address | None = None
    ranks: Annotated[int, Field(ge=1)] = 1


class Limits(Section):
    """Bounds on one request and on the hold queue. A stream's length has no bound, only its silence.

    Attributes:
        max_body_bytes: largest body of a request.
        header_timeout_s: time for the head of a request to arrive.
        body_timeout_s: longest pause within the body of a request; on the whole it may also take 1 s for each KiB.
        connect_timeout_s: time for a connection to an engine to open.
        idle_timeout_s: longest silence of an engine that makes no steps, or of a client, within a request.
        stream_head_after_s: a stream without a token for this long gets its head; later errors come as events.
        hold_requests: most requests held; one more is refused with status 429.
        hold_timeout_s: longest time that a request is held.
    """

    max_body_bytes: Annotated[int, Field(ge=1)] = 32 * 1024 * 1024
    header_timeout_s: Seconds = 10.0
    body_timeout_s: Seconds = 30.0
    connect_timeout_s: Seconds = 2.0
    idle_timeout_s: Seconds = 300.0
    stream_head_after_s: Seconds = 1.0
    hold_requests: Annotated[int, Field(ge=0)] = 1000
    hold_timeout_s: Seconds = 60.0


def _check_origin(origin: str) -> str:
    """The origin itself, which must be `*`, `null` or `SCHEME://HOST[:PORT]`.

    Raises:
        ValueError: it has another form.
    """
    if re.fullmatch(ORIGIN_PATTERN, origin) is None:
        raise ValueError(f"an origin such as https://chat.example.org or * is needed, got {origin[:80]!r}")
    return origin


# As browsers send it: in lower case, without a path, and without the port that a scheme has by itself.
ORIGIN_PATTERN = r"^(\*|null|[a-z][a-z0-9+.-]{0,30}://[a-z0-9.:\[\]_-]{1,260})$"
Origin = Annotated[str, AfterValidator(_check_origin)]


class Cors(Section):
    """Pages in browsers that may use the gateway.

    Attributes:
        allowed_origins: origins of the pages; `*` is any, as vLLM's server has it by default; empty: none.
    """

    allowed_origins: tuple[Origin, ...] = ("*",)


class ContinuedStreams(Section):
    """Streams that go on at another engine when theirs fails or drains, where their tokens are not drawn at random.

    A stream whose engine computes each token from the tokens before it alone goes on from its prompt and the tokens so
    far. Any other is computed anew.

    Attributes:
        completions_by_prefix: whether completions go on so: no setting of the engines counts or limits the tokens of
            an answer, unless the request has it.
        chats_by_prefix: whether chats do: besides, engines take no tool calls or reasoning out of the text.
    """

    completions_by_prefix: bool = True
    chats_by_prefix: bool = False


class Tracing(Section):
    """OpenTelemetry traces of requests.

    Attributes:
        endpoint: of the collector, OTLP over HTTP, such as `http://collector:4318`; `/v1/traces` is added.
        sample_ratio: part of the requests that are traced, 0 to 1, where the client's own trace does not decide it.
    """

    endpoint: Annotated[str, AfterValidator(check_endpoint)]
    sample_ratio: Annotated[float, Field(ge=0, le=1)] = 1.0


class Group(Section):
    """A revision of the engines: those behind one Service.

    Attributes:
        service: name of the Service whose EndpointSlices name the engines.
        weight: its part of the requests beside the weights of the other groups that have an accepting engine.
    """

    service: str
    weight: Annotated[int, Field(ge=0, le=100)] = 100


class Discovery(Section):
    """Engines found in a Kubernetes namespace.

    Attributes:
        namespace: where; None is the pod's own.
        groups: Services of the engines.
        ranks: data-parallel ranks of each engine.
        gateways: name of the gateways' own Service, by whose endpoints quotas are divided and the live page names the
            other gateways; None: neither.
    """

    namespace: str | None = None
    groups: tuple[Group, ...] = ()
    ranks: Annotated[int, Field(ge=1)] = 1
    gateways: str | None = None


class GatewayConfig(Section):
    """The gateway's configuration file.

    Attributes:
        listen: address for clients; only serving routes are there. None: clients come by another proxy.
        admin: address of `/healthz`, `/readyz`, `/metrics`, `/v1/state` and `PUT /v1/config`.
        token_file: control tokens, one a line; None: settings cannot be changed over HTTP.
        tracing: where traces of requests are sent; None: nowhere.
        settings_file: a JSON object with any of `dispatch`, `request` and `groups`, laid over this file at the start
            when it exists.
        model: name of the model that the engines serve, when it is known before any engine is.
        discovery: how engines are found in a cluster; None: `engines` is the list.
        engines: a fixed list, unless `discovery` finds them.
        dispatch: choice of the engine, at the start.
        request: order of the hold queue, at the start.
        limits: bounds on requests.
        cors: pages in browsers that may use the gateway. Only a start can change it.
        tenant_header: header, in lower case, that names the tenant of a request; empty: all belong to the anonymous
            tenant. Only a start can change it.
        auth: who may send requests, and how much; None: everyone.
        tls: TLS on `listen`; None: plain HTTP.
        continuation: streams that go on at another engine; None: none does. Only a start can change it.
        endpoint_picker: picks engines for another proxy; None: it does not.
        disaggregation: requests may be split between two engines; None: none is. Only a start can change it.
        ui: whether `admin` serves the live page under `/ui`, for holders of the page key; it needs `token_file`. Only a
            start can change it.
    """

    listen: Listen | None
    admin: Listen
    token_file: Path | None = None
    tracing: Tracing | None = None
    settings_file: Path | None = None
    model: str | None = None
    discovery: Discovery | None = None
    engines: tuple[EngineAddress, ...] = ()
    dispatch: EngineSettings = EngineSettings()
    request: RequestSettings = RequestSettings()
    limits: Limits = Limits()
    cors: Cors = Cors()
    tenant_header: Annotated[str, AfterValidator(check_tenant_header)] = DEFAULT_HEADER
    auth: Auth | None = None
    tls: Tls | None = None
    continuation: ContinuedStreams | None = None
    endpoint_picker: EndpointPickerConfig | None = None
    disaggregation: Disaggregation | None = None
    ui: bool = True


class SettingsFile(Section):
    """The settings file, once absent fields have their current value."""

    dispatch: EngineSettings
    request: RequestSettings
    groups: tuple[Group, ...]


class ControlBody(SettingsFile):
    """The body of `PUT /v1/config`, once absent fields have their current value."""

    engines: tuple[EngineAddress, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewaySettings:
    """The settings that can change while a gateway runs.

    Attributes:
        dispatch: choice of the engine.
        request: order of the hold queue.
        engines: the fixed list; empty where engines are discovered.
        groups: the groups of engines that are discovered; None where `engines` is a fixed list.
    """

    dispatch: EngineSettings
    request: RequestSettings
    engines: tuple[EngineAddress, ...] = ()
    groups: tuple[Group, ...] | None = None

    def document(self) -> dict[str, Any]:
        """The settings as a JSON object, in the form of a control body."""
        document: dict[str, Any] = {"dispatch": asdict(self.dispatch), "request": asdict(self.request)}
        if self.groups is None:
            return document | {"engines": [address.model_dump() for address in self.engines]}
        return document | {"groups": [group.model_dump() for group in self.groups]}


def initial_settings(config: GatewayConfig) -> GatewaySettings:
    """The settings with which a gateway starts."""
    groups = None if config.discovery is None else config.discovery.groups
    return GatewaySettings(dispatch=config.dispatch, request=config.request, engines=config.engines, groups=groups)


def load_gateway_config(path: Path) -> GatewayConfig:
    """Reads the gateway's file, and lays the settings file over it.

    Raises:
        InvalidInput: one of them cannot be read or is not valid.
    """
    config = parse_model(GatewayConfig, parse_document(read_file(path, "file")))
    _check_unique("engines", "name used twice", (address.name for address in config.engines))
    if config.listen is None and config.endpoint_picker is None:
        raise InvalidInput(
            [InputError("listen", "an address is needed, such as {'port': 8000}, or an endpoint_picker")]
        )
    if config.discovery is not None:
        if config.engines:
            raise InvalidInput([InputError("engines", FOUND_BY_DISCOVERY)])
        _check_unique("groups", "service named twice", (group.service for group in config.discovery.groups))
    return config if config.settings_file is None else _lay_over(config, config.settings_file)


def _lay_over(config: GatewayConfig, path: Path) -> GatewayConfig:
    if (text := read_optional_file(path, "settings_file")) is None:
        return config
    try:
        settings = _parse_settings(SettingsFile, parse_document(text), initial_settings(config))
    except InvalidInput as error:
        raise InvalidInput([InputError("settings_file", f"{path}: {row}") for row in error.errors]) from None
    changed: dict[str, Any] = {"dispatch": settings.dispatch, "request": settings.request}
    if config.discovery is not None:
        changed["discovery"] = config.discovery.model_copy(update={"groups": settings.groups})
    return config.model_copy(update=changed)


def parse_gateway_settings(document: object, current: GatewaySettings) -> GatewaySettings:
    """The settings that a control body asks for; an absent field keeps its current value.

    Raises:
        InvalidInput: the body is not valid; no part takes effect.
    """
    if isinstance(document, dict):
        if current.groups is not None and "engines" in document:
            raise InvalidInput([InputError("engines", FOUND_BY_DISCOVERY)])
        document = {"engines": current.document().get("engines", []), **document}
    change = _parse_settings(ControlBody, document, current)
    _check_unique("engines", "name used twice", (address.name for address in change.engines))
    groups = None if current.groups is None else change.groups
    return GatewaySettings(dispatch=change.dispatch, request=change.request, engines=change.engines, groups=groups)


Form = TypeVar("Form", bound=SettingsFile)


def _parse_settings(form: type[Form], document: object, current: GatewaySettings) -> Form:
    if isinstance(document, dict):
        if current.groups is None and "groups" in document:
            raise InvalidInput([InputError("groups", "there are none: the engines are a fixed list here")])
        present = current.document()
        for name in ("dispatch", "request"):
            if isinstance(document.get(name, {}), dict):
                document = {**document, name: present[name] | document.get(name, {})}
        document = {"groups": present.get("groups", []), **document}
    settings = parse_model(form, document)
    _check_unique("groups", "service named twice", (group.service for group in settings.groups))
    return settings


def _check_unique(path: str, message: str, names: Iterable[str]) -> None:
    given = list(names)
    if twice := sorted({name for name in given if given.count(name) > 1}):
        raise InvalidInput([InputError(path, f"{message}: {', '.join(twice)}")])
