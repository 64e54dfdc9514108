"""The Kubernetes API server as gateway and operator see it: plain JSON documents, one error type, one way to log in.

The only module that calls the official client (`kubernetes.aio`), which logs in: a pod's account or a kubeconfig, with
their certificates, plugins, proxies and tokens. The calls themselves are plain requests. The client is imported when a
connection is made and not with this module, because it takes 20 MiB and a second and most processes never connect.
"""

import asyncio
import contextlib
import json
import os
import re
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode, urlsplit
from urllib.request import getproxies, proxy_bypass

import orjson

from moe_contract.proxies import is_local

Document = dict[str, Any]
BAD_REQUEST, FORBIDDEN, NOT_FOUND, CONFLICT, GONE, UNPROCESSABLE, TOO_MANY = 400, 403, 404, 409, 410, 422, 429
CALL_TIMEOUT_S, CONNECT_TIMEOUT_S = 30.0, 5.0
PAGE = 500
# Credentials of a kubeconfig (a token file, a plugin) are read again after so long, as those of a pod are.
REFRESH_S = 60.0
JSON = "application/json"
APPLY_PATCH, MERGE_PATCH = "application/apply-patch+yaml; charset=utf-8", "application/merge-patch+json"
USER_AGENT = "moeserving"
# An event of a watch is one line.
READ_BUFFER_BYTES = 1 << 21
_BEYOND_ASCII = re.compile(r"[^\x00-\x7e]")


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
        context: of the kubeconfig, which is then used in a pod too; empty is its current one.

    Raises:
        LoginError: neither a service account nor a usable kubeconfig is there, or it has no such context.

    Attributes:
        namespace: that of the pod or of the kubeconfig's context.
        source: where the credentials are from, such as `context kind of /home/a/.kube/config`.
    """

    def __init__(self, kubeconfig: Path | None = None, *, trust_env: bool = True, context: str = "") -> None:
        self._login = _find_login(kubeconfig, context)
        self.namespace, self.source = self._login.namespace, self._login.source
        self._trust_env = trust_env
        self._connection: _Connection | None = None
        self._opening = asyncio.Lock()

    async def read(self, path: str) -> Document:
        """Returns a document that is no object, such as `/version` or `/apis/apps/v1`, the kinds of a group.

        Raises:
            ApiError: it does not exist (404), or the call failed.
        """
        return await self._call("GET", path)

    async def get(self, kind: Kind, namespace: str, name: str) -> Document:
        """Returns one object.

        Raises:
            ApiError: it does not exist (404), or the call failed.
        """
        return await self._call("GET", _path(kind, namespace, name))

    async def list(
        self,
        kind: Kind,
        namespace: str | None,
        selector: str = "",
        *,
        fields: str = "",
        pack: Callable[[Document], Document] | None = None,
    ) -> Listing:
        """All objects of a kind in a namespace, read in pages; None means all namespaces.

        Args:
            kind: of the objects.
            namespace: where they are.
            selector: by labels; empty is all.
            fields: by the fields that the kind can be selected by; empty is all.
            pack: gives each object a smaller form, page by page, so that a long list needs little memory.
        """
        items: list[Document] = []
        params = {"limit": str(PAGE)} | ({"labelSelector": selector} if selector else {})
        params |= {"fieldSelector": fields} if fields else {}
        while True:
            page = await self._call("GET", _path(kind, namespace), params)
            # The items of a list do not say their kind.
            named = (row | {"apiVersion": kind.api_version, "kind": kind.name} for row in page.pop("items", None) or ())
            items += named if pack is None else map(pack, named)
            del named
            params["continue"] = page["metadata"].get("continue", "")
            if not params["continue"]:
                return Listing(items=items, version=page["metadata"].get("resourceVersion", ""))

    async def create(self, kind: Kind, document: Document, *, strict: bool = False) -> Document:
        """Creates an object; with `strict` a field that its kind does not have is an error, else it is dropped."""
        path = _path(kind, document["metadata"].get("namespace"))
        return await self._call("POST", path, {"fieldValidation": "Strict"} if strict else {}, orjson.dumps(document))

    async def replace(self, kind: Kind, document: Document) -> Document:
        """Writes the whole object; refused with 409 when the version in it is not the newest."""
        metadata = document["metadata"]
        path = _path(kind, metadata.get("namespace"), metadata["name"])
        return await self._call("PUT", path, {}, orjson.dumps(document))

    async def delete(self, kind: Kind, namespace: str | None, name: str, *, uid: str = "") -> None:
        """Deletes an object and, in the background, the objects that it owns; another `uid` is refused with 409."""
        options = orjson.dumps({"preconditions": {"uid": uid}}) if uid else None
        await self._call("DELETE", _path(kind, namespace, name), data=options)

    async def apply(
        self, kind: Kind, document: Document, manager: str, *, subresource: str = "", dry_run: bool = False
    ) -> Document:
        """Server-side apply that takes fields over from other managers; a dry run is checked and changes nothing."""
        metadata = document["metadata"]
        path = _path(kind, metadata.get("namespace"), metadata["name"], subresource)
        params = {"fieldManager": manager, "force": "true"} | ({"dryRun": "All"} if dry_run else {})
        return await self._call("PATCH", path, params, to_yaml(document), content_type=APPLY_PATCH)

    async def merge(
        self, kind: Kind, namespace: str | None, name: str, patch: Document, manager: str, *, subresource: str = ""
    ) -> Document:
        """Applies a merge patch (RFC 7386) and returns the object after it.

        Raises:
            ApiError: the call failed.
        """
        path = _path(kind, namespace, name, subresource)
        text = orjson.dumps(patch)
        return await self._call("PATCH", path, {"fieldManager": manager}, text, content_type=MERGE_PATCH)

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

        params = {
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": version,
            "timeoutSeconds": str(max(1, round(watch_s))),
        } | ({"labelSelector": selector} if selector else {})
        limits = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=silence_s)
        with _api_errors():
            answer = await self._request("GET", _path(kind, namespace), params, limits=limits)
            try:
                if answer.status >= BAD_REQUEST:
                    raise _refusal(answer, await answer.read())
                async for line in answer.content:
                    yield _parse_event(line)
            finally:
                answer.close()

    async def close(self) -> None:
        """Closes the connections; without any it does nothing."""
        if self._connection is not None:
            await self._connection.close()

    async def _call(
        self,
        method: str,
        path: str,
        params: Mapping[str, str] | None = None,
        data: bytes | None = None,
        *,
        content_type: str = JSON,
    ) -> Document:
        import aiohttp

        limits = aiohttp.ClientTimeout(total=CALL_TIMEOUT_S, sock_connect=CONNECT_TIMEOUT_S)
        with _api_errors():
            answer = await self._request(method, path, params or {}, data, content_type, limits=limits)
            async with answer:
                text = await answer.read()
            if answer.status >= BAD_REQUEST:
                raise _refusal(answer, text)
            document: Document = orjson.loads(text)
        return document

    async def _request(
        self,
        method: str,
        path: str,
        params: Mapping[str, str],
        data: bytes | None = None,
        content_type: str = JSON,
        *,
        limits: Any,
    ) -> Any:
        """An answer whose body is not read yet."""
        if self._connection is None:
            async with self._opening:
                self._connection = self._connection or await self._login.connect(self._trust_env)
        return await self._connection.request(method, path, params, data, content_type, limits)


def _path(kind: Kind, namespace: str | None, name: str = "", subresource: str = "") -> str:
    """The path of an object, or without a name of all objects of a kind."""
    group = f"/apis/{kind.group}/{kind.version}" if kind.group else f"/api/{kind.version}"
    within = f"/namespaces/{quote(namespace, safe='')}" if namespace and kind.namespaced else ""
    rest = [quote(part, safe="") for part in (name, subresource) if part]
    return "/".join((f"{group}{within}/{kind.plural}", *rest))


class _Connection:
    """Requests with what the official client has read from the login: address, certificates, proxy and credentials.

    Its own request path encodes, copies and logs each call several times, and reads `.netrc` for each: of a call that
    is one small object it was nine tenths of the time.
    """

    def __init__(self, client: Any, *, trust_env: bool) -> None:
        import aiohttp

        configuration, transport = client.configuration, client.rest_client
        self._configuration, self._client = configuration, client
        self._host = str(configuration.host).rstrip("/")
        self._proxy, self._proxy_auth = _find_proxy(self._host, transport.proxy, trust_env=trust_env)
        self._proxy_headers = transport.proxy_headers
        # 0: no bound. Each watch keeps a connection, and with many namespaces calls would wait for ever behind them.
        connector = aiohttp.TCPConnector(limit=0, ssl=transport.ssl_context)
        self._session = aiohttp.ClientSession(connector=connector, read_bufsize=READ_BUFFER_BYTES)

    async def request(
        self, method: str, path: str, params: Mapping[str, str], data: bytes | None, content_type: str, limits: Any
    ) -> Any:
        """An answer whose body is not read yet."""
        import yarl

        headers = {"Accept": JSON, "User-Agent": USER_AGENT}
        if data is not None:
            headers["Content-Type"] = content_type
        # Reads a token again when it is time to.
        key = await self._configuration.get_api_key_with_prefix("BearerToken", alias="authorization")
        if key:
            headers["Authorization"] = key
        query = f"?{urlencode(params)}" if params else ""
        return await self._session.request(
            method,
            yarl.URL(self._host + path + query, encoded=True),
            headers=headers,
            data=data,
            timeout=limits,
            proxy=self._proxy,
            proxy_auth=self._proxy_auth,
            proxy_headers=self._proxy_headers,
            server_hostname=self._configuration.tls_server_name or None,
        )

    async def close(self) -> None:
        """Closes all connections to the API server."""
        await self._session.close()
        await self._client.close()


def _find_proxy(host: str, configured: str | None, *, trust_env: bool) -> tuple[Any, Any]:
    """The proxy on the way to the API server, and its credentials: of the login, else of the environment."""
    import aiohttp
    import yarl

    address = urlsplit(host)
    proxy = configured
    # Python compares an IPv6 address of `no_proxy` with the brackets of a URL only where it has them too.
    is_direct = proxy_bypass(address.netloc) or proxy_bypass(address.hostname or "")
    if proxy is None and trust_env and not is_direct:
        proxy = getproxies().get(address.scheme)
    if not proxy:
        return None, None
    url = yarl.URL(proxy)
    auth = None if url.user is None else aiohttp.BasicAuth(url.user, url.password or "")
    return url.with_user(None), auth


def _refusal(answer: Any, text: bytes) -> ApiError:
    return ApiError(answer.status, _message(text, answer.reason), _retry_after_s(answer.headers))


class _Login:
    """Credentials of a pod or of a kubeconfig, kept fresh."""

    def __init__(self, namespace: str, kubeconfig: Any, source: str = "the account of this pod") -> None:
        self.namespace, self._kubeconfig, self.source = namespace, kubeconfig, source
        self._read_s = 0.0

    async def connect(self, trust_env: bool) -> "_Connection":
        """A connection whose token is read again while it lives."""
        from kubernetes.aio.client import ApiClient, Configuration
        from kubernetes.aio.config import load_incluster_config

        configuration = Configuration()
        if self._kubeconfig is None:
            load_incluster_config(configuration)
        else:
            await self._kubeconfig.load_and_set(configuration)
            configuration.refresh_api_key_hook = self._refresh
        is_elsewhere = self._kubeconfig is not None and not is_local(urlsplit(configuration.host).hostname or "")
        return _Connection(ApiClient(configuration), trust_env=trust_env and is_elsewhere)

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


def _find_login(kubeconfig: Path | None, context_name: str = "") -> _Login:
    from kubernetes.aio.config import ConfigException, incluster_config, kube_config

    tried = []
    if kubeconfig is None and not context_name and incluster_config.SERVICE_HOST_ENV_NAME in os.environ:
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
        loader = kube_config.KubeConfigLoader(
            config_dict=merged, config_base_path=None, active_context=context_name or None
        )
        context: Mapping[str, Any] = loader.current_context["context"]
    except Exception as error:
        # A file that is no kubeconfig fails in the loader in any way that a wrong type can.
        raise _unusable(*tried, _explain(error, paths)) from None
    source = f"context {loader.current_context['name']} of {paths}"
    return _Login(context.get("namespace") or "default", loader, source)


def _configuration() -> Any:
    from kubernetes.aio.client import Configuration

    return Configuration()


def _explain(error: Exception, paths: str) -> Exception:
    """The error in words for people where it is one of the loader's own."""
    from kubernetes.aio.config import ConfigException

    if isinstance(error, ConfigException | OSError):
        return error
    mark = getattr(error, "problem_mark", None)
    where = f" (line {mark.line + 1}: {getattr(error, 'problem', '')})" if mark is not None else ""
    explained: Exception = ConfigException(f"{paths} is no kubeconfig{where}")
    return explained


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
    from kubernetes.aio.config import ConfigException

    try:
        yield
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError, ConfigException) as error:
        raise ApiError(0, f"{type(error).__name__}: {error}") from error


def _message(text: bytes, reason: str | None) -> str:
    try:
        return str(orjson.loads(text)["message"])
    except (ValueError, TypeError, KeyError):
        return (text.decode(errors="replace") or reason or "")[:1000]


def _retry_after_s(headers: Any) -> float | None:
    """Seconds of a `Retry-After` header; its form as a date, which the API server does not use, counts as none."""
    try:
        return float((headers or {})["Retry-After"])
    except (KeyError, ValueError):
        return None
