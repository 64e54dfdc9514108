"""The Kubernetes API server as gateway and operator see it: plain JSON documents, one error type, one way to log in.

The only module that calls the official client (`kubernetes.aio`, its dynamic client). The client is imported when a
connection is made and not with this module, because it takes 20 MiB and a second and most processes never connect.
"""

import asyncio
import contextlib
import json
import os
import re
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import orjson

from moe_contract.proxies import is_local

Document = dict[str, Any]
BAD_REQUEST, FORBIDDEN, NOT_FOUND, CONFLICT, GONE, UNPROCESSABLE, TOO_MANY = 400, 403, 404, 409, 410, 422, 429
CALL_TIMEOUT_S, CONNECT_TIMEOUT_S = 30.0, 5.0
PAGE = 500
# With the parameter, which the API server ignores, the client passes bytes on as they are.
_APPLY = "application/apply-patch+yaml; charset=utf-8"
_BEYOND_ASCII = re.compile(r"[^\x00-\x7e]")
# Credentials of a kubeconfig (a token file, a plugin) are read again after so long, as those of a pod are.
REFRESH_S = 60.0


class ApiError(Exception):
    """A call that failed.

    Attributes:
        status: HTTP status of the refusal; 0 when no answer came.
        message: reason given by the API server, else that of the connection.
        retry_after_s: pause that the API server asks for; None without one.
    """

    def __init__(self, status: int, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(f"{status}: {message}" if status else message)
        self.status, self.message, self.retry_after_s = status, message, retry_after_s


class LoginError(Exception):
    """Neither a pod's account nor a usable kubeconfig is there; the text names the attempts."""


@dataclass(frozen=True)
class Kind:
    """A namespaced kind of object.

    Attributes:
        group: API group; empty for the core group.
        optional: its CRD may be absent from the cluster.
    """

    group: str
    version: str
    name: str
    plural: str
    optional: bool = False
    namespaced: bool = True

    @property
    def api_version(self) -> str:
        """Group and version as documents have them."""
        return f"{self.group}/{self.version}" if self.group else self.version


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """All objects of a kind at one version of the cluster's state, from which a watch can go on."""

    items: list[Document]
    version: str


class ApiServer:
    """A connection that opens at its first call.

    Args:
        kubeconfig: file to use; None takes the pod's service account, then `KUBECONFIG`, then `~/.kube/config`.
        trust_env: whether proxies are taken from the environment; never for the pod's own API server, nor for one on
            this machine.

    Raises:
        LoginError: neither a service account nor a usable kubeconfig is there.

    Attributes:
        namespace: that of the pod or of the kubeconfig's context.
    """

    def __init__(self, kubeconfig: Path | None = None, *, trust_env: bool = True) -> None:
        self._login = _find_login(kubeconfig)
        self.namespace = self._login.namespace
        self._trust_env = trust_env
        self._client: Any = None
        self._opening = asyncio.Lock()
        self._resources: dict[tuple[Kind, str], Any] = {}

    async def get(self, kind: Kind, namespace: str, name: str) -> Document:
        """Returns one object.

        Raises:
            ApiError: it does not exist (404), or the call failed.
        """
        return await self._call("get", kind, name=name, namespace=namespace)

    async def list(self, kind: Kind, namespace: str | None, selector: str = "", *, fields: str = "") -> Listing:
        """All objects of a kind in a namespace, read in pages; None means all namespaces.

        Args:
            kind: of the objects.
            namespace: where they are.
            selector: by labels; empty is all.
            fields: by the fields that the kind can be selected by; empty is all.
        """
        items: list[Document] = []
        proceed = None
        while True:
            page = await self._call(
                "get",
                kind,
                namespace=namespace,
                label_selector=selector or None,
                field_selector=fields or None,
                limit=PAGE,
                _continue=proceed,
            )
            # The items of a list do not say their kind.
            items += (row | {"apiVersion": kind.api_version, "kind": kind.name} for row in page.get("items") or ())
            proceed = page["metadata"].get("continue")
            if not proceed:
                return Listing(items=items, version=page["metadata"].get("resourceVersion", ""))

    async def create(self, kind: Kind, document: Document, *, strict: bool = False) -> Document:
        """Creates an object; with `strict` a field that its kind does not have is an error, else it is dropped."""
        return await self._call(
            "create",
            kind,
            body=document,
            namespace=document["metadata"].get("namespace"),
            query_params=[("fieldValidation", "Strict")] if strict else [],
        )

    async def replace(self, kind: Kind, document: Document) -> Document:
        """Writes the whole object; refused with 409 when the version in it is not the newest."""
        return await self._call("replace", kind, body=document, namespace=document["metadata"].get("namespace"))

    async def delete(self, kind: Kind, namespace: str | None, name: str) -> None:
        """Deletes an object and, in the background, the objects that it owns."""
        await self._call("delete", kind, name=name, namespace=namespace)

    async def apply(
        self, kind: Kind, document: Document, manager: str, *, subresource: str = "", dry_run: bool = False
    ) -> Document:
        """Server-side apply that takes fields over from other managers; a dry run is checked and changes nothing."""
        return await self._call(
            "patch",
            kind,
            subresource=subresource,
            body=to_yaml(document),
            name=document["metadata"]["name"],
            namespace=document["metadata"].get("namespace"),
            field_manager=manager,
            force_conflicts=True,
            dry_run="All" if dry_run else None,
            content_type=_APPLY,
        )

    async def merge(
        self, kind: Kind, namespace: str | None, name: str, patch: Document, manager: str, *, subresource: str = ""
    ) -> Document:
        """Applies a merge patch (RFC 7386) and returns the object after it.

        Raises:
            ApiError: the call failed.
        """
        return await self._call(
            "patch",
            kind,
            subresource=subresource,
            body=patch,
            name=name,
            namespace=namespace,
            field_manager=manager,
            content_type="application/merge-patch+json",
        )

    async def watch(
        self, kind: Kind, namespace: str | None, selector: str, version: str, *, watch_s: float, silence_s: float
    ) -> AsyncIterator[Document]:
        """Yields watch events (`type`, `object`) after a version, bookmarks included, until the server ends the watch.

        Args:
            watch_s: length of the watch that the server is asked for.
            silence_s: longest time without a byte; the API server sends a bookmark each minute.

        Raises:
            ApiError: refused, also by an event of type ERROR; 410 when the version is too old; or broken.
        """
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=silence_s)
        with _api_errors():
            resource = await self._resource(kind)
            answer = await resource.get(
                namespace=namespace,
                label_selector=selector or None,
                resource_version=version,
                watch=True,
                timeout_seconds=max(1, round(watch_s)),
                query_params=[("allowWatchBookmarks", "true")],
                _request_timeout=timeout,
                serialize=False,
            )
            try:
                async for line in answer.content:
                    yield _parse_event(line)
            finally:
                answer.close()

    async def close(self) -> None:
        """Closes the connections; without any it does nothing."""
        if self._client is not None:
            await self._client.client.close()

    async def _call(self, verb: str, kind: Kind, *, subresource: str = "", **arguments: Any) -> Document:
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=CALL_TIMEOUT_S, sock_connect=CONNECT_TIMEOUT_S)
        with _api_errors():
            resource = await self._resource(kind, subresource)
            answer = await getattr(resource, verb)(serialize=False, _request_timeout=timeout, **arguments)
            document: Document = orjson.loads(await answer.read())
        return document

    async def _resource(self, kind: Kind, subresource: str = "") -> Any:
        """The dynamic client's handle; made by hand, for its discovery asks for every group and keeps a file."""
        if (known := self._resources.get((kind, subresource))) is not None:
            return known
        from kubernetes.aio.dynamic import DynamicClient, Resource

        async with self._opening:
            if self._client is None:
                self._client = DynamicClient(await self._login.connect(self._trust_env))
        made = Resource(
            prefix="apis" if kind.group else "api",
            group=kind.group or None,
            api_version=kind.version,
            kind=kind.name,
            name=kind.plural,
            namespaced=kind.namespaced,
            client=self._client,
            subresources={
                "status": {"kind": kind.name, "name": f"{kind.plural}/status", "namespaced": kind.namespaced}
            },
        )
        self._resources[kind, ""], self._resources[kind, "status"] = made, made.subresources["status"]
        return self._resources[kind, subresource]


class _Login:
    """Credentials of a pod or of a kubeconfig, kept fresh."""

    def __init__(self, namespace: str, kubeconfig: Any) -> None:
        self.namespace, self._kubeconfig = namespace, kubeconfig
        self._read_s = 0.0

    async def connect(self, trust_env: bool) -> Any:
        """A client whose token is read again while it lives."""
        from kubernetes.aio.client import ApiClient, Configuration
        from kubernetes.aio.config import load_incluster_config

        configuration = Configuration()
        # 0: no bound. Each watch keeps a connection, and with many namespaces calls would wait for ever behind them.
        configuration.connection_pool_maxsize = 0
        if self._kubeconfig is None:
            load_incluster_config(configuration)
        else:
            await self._kubeconfig.load_and_set(configuration)
            configuration.refresh_api_key_hook = self._refresh
        by_proxy = (
            trust_env and self._kubeconfig is not None and not is_local(urlsplit(configuration.host).hostname or "")
        )
        configuration.client_session_kwargs = {"trust_env": by_proxy}
        return ApiClient(configuration)

    async def _refresh(self, configuration: Any) -> None:
        now_s = asyncio.get_running_loop().time()
        if now_s - self._read_s > REFRESH_S:
            self._read_s = now_s
            await self._kubeconfig.load_and_set(configuration)


def to_yaml(document: Document) -> bytes:
    """The document as JSON that is YAML too, as server-side apply reads it, in ASCII.

    Of a character beyond U+FFFF JSON has two escapes, which YAML refuses; it has one of eight digits instead.
    """
    text = json.dumps(document, ensure_ascii=False)
    return _BEYOND_ASCII.sub(lambda found: _escape(ord(found[0])), text).encode()


def _escape(code: int) -> str:
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"


def _find_login(kubeconfig: Path | None) -> _Login:
    from kubernetes.aio.config import ConfigException, incluster_config, kube_config

    tried = []
    if kubeconfig is None and incluster_config.SERVICE_HOST_ENV_NAME in os.environ:
        try:
            incluster_config.load_incluster_config(_configuration())
        except (ConfigException, OSError) as error:
            # A pod without a token may have a kubeconfig.
            tried.append(error)
        else:
            place = Path(incluster_config.SERVICE_TOKEN_FILENAME).with_name("namespace")
            return _Login(place.read_text().strip() if place.is_file() else "default", None)
    paths = str(kubeconfig or os.environ.get("KUBECONFIG") or Path.home() / ".kube/config")
    try:
        # The merger logs a warning of its own where no file is there.
        if not any(Path(path).expanduser().exists() for path in paths.split(os.pathsep) if path):
            raise ConfigException(f"no such file: {paths}")
        merged = kube_config.KubeConfigMerger(paths).config
        # None: relative paths are relative to the file that has them.
        loader = kube_config.KubeConfigLoader(config_dict=merged, config_base_path=None)
        context: Mapping[str, Any] = loader.current_context["context"]
    except Exception as error:
        # A file that is no kubeconfig fails in the loader in any way that a wrong type can.
        raise _unusable(*tried, error) from None
    return _Login(context.get("namespace") or "default", loader)


def _configuration() -> Any:
    from kubernetes.aio.client import Configuration

    return Configuration()


def _unusable(*errors: Exception) -> LoginError:
    reasons = "; ".join(str(error) or type(error).__name__ for error in errors)
    return LoginError(f"neither a pod's account nor a usable kubeconfig: {reasons}")


def _parse_event(line: bytes) -> Document:
    """An event of a watch.

    Raises:
        ApiError: the line is an ERROR, or a Status or a text in place of an event.
    """
    try:
        event = orjson.loads(line)
        if event["type"] != "ERROR" and event["object"]["metadata"]["resourceVersion"]:
            return dict(event)
    except (ValueError, KeyError, TypeError):
        event = _to_document(line)
    status = event.get("object") or event
    raise ApiError(int(status.get("code") or 0), str(status.get("message") or line[:200]), _retry_of_status(status))


def _to_document(line: bytes) -> Document:
    with contextlib.suppress(ValueError):
        document = orjson.loads(line)
        if isinstance(document, dict):
            return document
    return {}


def _retry_of_status(status: Mapping[str, Any]) -> float | None:
    seconds = (status.get("details") or {}).get("retryAfterSeconds")
    return None if seconds is None else float(seconds)


@contextlib.contextmanager
def _api_errors() -> Iterator[None]:
    """The one place where errors of the client and of its connections become an `ApiError`."""
    import aiohttp
    from kubernetes.aio.client import ApiException
    from kubernetes.aio.config import ConfigException

    try:
        yield
    except ApiException as error:
        raise ApiError(error.status or 0, _message(error), _retry_after_s(error.headers)) from error
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError, ConfigException) as error:
        raise ApiError(0, f"{type(error).__name__}: {error}") from error


def _message(error: Any) -> str:
    try:
        return str(orjson.loads(error.body)["message"])
    except (ValueError, TypeError, KeyError):
        return str(error.body or error.reason or type(error).__name__)[:1000]


def _retry_after_s(headers: Any) -> float | None:
    """Seconds of a `Retry-After` header; its form as a date, which the API server does not use, counts as none."""
    try:
        return float((headers or {})["Retry-After"])
    except (KeyError, ValueError):
        return None
