"""The login to the API server: tokens of a pod and of a kubeconfig are read again, for both are replaced in use."""

import datetime
import json
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from aiohttp import web
from cluster_certificates import Certificates
from hypothesis import given
from hypothesis import strategies as st
from kubernetes.aio.config import incluster_config
from moe_contract import api_server
from moe_contract.api_server import ApiError, ApiServer, Kind, LoginError, _find_proxy, to_yaml

from tests.contract.refusing_proxy import refusing_proxy
from tests.gateway.conftest import free_port

POD = Kind("", "v1", "Pod", "pods")


class Clock(datetime.datetime):
    """Now, moved by `passed`."""

    passed = datetime.timedelta()

    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:
        return datetime.datetime.now(tz) + cls.passed


class TlsApi:
    """An API server over TLS that answers one token."""

    def __init__(self, folder: Path, name: str = "localhost", address: str = "127.0.0.1") -> None:
        self.certificates = Certificates(folder=folder)
        self.certificates.make([name], [address])
        self.port, self.token = free_port(), "first"

    async def start(self) -> web.AppRunner:
        application = web.Application()
        application.router.add_get("/{path:.*}", self._answer)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.certificates.path("apiserver.crt"), self.certificates.path("apiserver.key"))
        runner = web.AppRunner(application, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", self.port, ssl_context=context).start()
        return runner

    async def _answer(self, request: web.Request) -> web.Response:
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        if (scheme.lower(), token) != ("bearer", self.token):
            return web.json_response({"kind": "Status", "code": 401, "message": "Unauthorized"}, status=401)
        return web.json_response({"kind": "Pod", "metadata": {"name": "a"}})


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[TlsApi]:
    server = TlsApi(tmp_path / "pki")
    runner = await server.start()
    yield server
    await runner.cleanup()


@pytest.fixture
def account(tmp_path: Path, api: TlsApi, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a pod's account, as kubelet mounts it."""
    folder = tmp_path / "account"
    folder.mkdir()
    (folder / "token").write_text(api.token)
    (folder / "ca.crt").write_bytes(api.certificates.path("ca.crt").read_bytes())
    (folder / "namespace").write_text("models")
    monkeypatch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(folder / "token"))
    monkeypatch.setattr(incluster_config, "SERVICE_CERT_FILENAME", str(folder / "ca.crt"))
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(api.port))
    return folder


async def status(server: ApiServer) -> int:
    try:
        await server.get(POD, "models", "a")
    except ApiError as error:
        return error.status
    return 200


async def test_a_token_that_kubelet_replaces_is_used_within_a_minute(
    api: TlsApi, account: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module: Any = type("module", (), {"datetime": Clock, "timedelta": datetime.timedelta})
    monkeypatch.setattr(incluster_config, "datetime", module)
    server = ApiServer(trust_env=False)
    assert server.namespace == "models"
    assert await status(server) == 200
    (account / "token").write_text("second")
    api.token = "second"
    assert await status(server) == 401, "the old one, until it is read again"
    monkeypatch.setattr(Clock, "passed", datetime.timedelta(seconds=61))
    assert await status(server) == 200
    # While kubelet replaces it the file may be away or empty: an error of that call, and no more.
    (account / "token").write_text("")
    monkeypatch.setattr(Clock, "passed", datetime.timedelta(seconds=122))
    assert await status(server) == 0
    (account / "token").write_text("second")
    assert await status(server) == 200
    await server.close()


async def test_a_token_file_of_a_kubeconfig_is_read_again(
    api: TlsApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api_server, "REFRESH_S", 0.0)
    (tmp_path / "token").write_text("first")
    cluster = {"server": f"https://127.0.0.1:{api.port}", "certificate-authority": "pki/ca.crt"}
    document = {
        "clusters": [{"name": "c", "cluster": cluster}],
        "users": [{"name": "u", "user": {"tokenFile": "token"}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
        "current-context": "x",
    }
    (tmp_path / "kubeconfig").write_text(json.dumps(document))
    server = ApiServer(tmp_path / "kubeconfig", trust_env=False)
    assert await status(server) == 200
    (tmp_path / "token").write_text("second")
    assert await status(server) == 401
    api.token = "second"
    assert await status(server) == 200
    await server.close()


@pytest.mark.parametrize(("name", "answer"), [("api.internal", 200), ("api.elsewhere", 0), (None, 0)])
async def test_the_certificate_is_checked_for_the_name_that_a_kubeconfig_gives_the_server(
    tmp_path: Path, name: str | None, answer: int
) -> None:
    api = TlsApi(tmp_path / "pki", "api.internal", "127.0.0.9")
    runner = await api.start()
    given_name = {} if name is None else {"tls-server-name": name}
    cluster = {"server": f"https://127.0.0.1:{api.port}", "certificate-authority": "pki/ca.crt"}
    document = {
        "clusters": [{"name": "c", "cluster": cluster | given_name}],
        "users": [{"name": "u", "user": {"token": "first"}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
        "current-context": "x",
    }
    (tmp_path / "kubeconfig").write_text(json.dumps(document))
    server = ApiServer(tmp_path / "kubeconfig", trust_env=False)
    assert await status(server) == answer
    await server.close()
    await runner.cleanup()


async def test_a_server_of_another_authority_is_not_talked_to(api: TlsApi, account: Path, tmp_path: Path) -> None:
    other = Certificates(folder=tmp_path / "other")
    other.make(["localhost"], ["127.0.0.1"])
    (account / "ca.crt").write_bytes(other.path("ca.crt").read_bytes())
    server = ApiServer(trust_env=False)
    with pytest.raises(ApiError, match="CERTIFICATE_VERIFY_FAILED"):
        await server.get(POD, "models", "a")
    await server.close()


def test_an_account_without_a_token_is_refused(account: Path) -> None:
    (account / "token").unlink()
    with pytest.raises(LoginError, match=r"neither a pod's account .*token file"):
        ApiServer()


@pytest.mark.usefixtures("account")
async def test_a_context_that_is_named_goes_before_the_account_and_the_current_one(tmp_path: Path) -> None:
    rows = [{"name": name, "context": {"cluster": "c", "namespace": name}} for name in ("first", "second")]
    path = tmp_path / "several"
    clusters = [{"name": "c", "cluster": {"server": "https://localhost:1"}}]
    path.write_text(yaml.safe_dump({"contexts": rows, "clusters": clusters, "current-context": "first"}))
    current, named = ApiServer(path), ApiServer(path, context="second")
    assert (current.namespace, current.source) == ("first", f"context first of {path}")
    assert (named.namespace, named.source) == ("second", f"context second of {path}")
    assert ApiServer().source == "the account of this pod"
    with pytest.raises(LoginError, match="third"):
        ApiServer(path, context="third")


async def test_a_pod_without_a_token_takes_its_kubeconfig(
    api: TlsApi, account: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (account / "token").unlink()
    document = {
        "clusters": [{"name": "c", "cluster": {"server": "http://127.0.0.1:1"}}],
        "users": [{"name": "u", "user": {}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u", "namespace": "of-the-context"}}],
        "current-context": "x",
    }
    (tmp_path / "kubeconfig").write_text(json.dumps(document))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    assert ApiServer().namespace == "of-the-context"


async def test_a_proxy_of_the_environment_does_not_cut_a_pod_off_from_the_api_server(
    api: TlsApi, account: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with refusing_proxy(monkeypatch) as proxy:
        server = ApiServer()
        assert await status(server) == 200
        await server.close()
        assert proxy.asked == []


@pytest.mark.parametrize(("host", "by_proxy"), [("127.0.0.1", False), ("cluster.test", True)])
async def test_with_a_kubeconfig_a_proxy_is_used_for_servers_elsewhere_alone(
    api: TlsApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str, by_proxy: bool
) -> None:
    cluster = {"server": f"https://{host}:{api.port}", "certificate-authority": "pki/ca.crt"}
    document = {
        "clusters": [{"name": "c", "cluster": cluster}],
        "users": [{"name": "u", "user": {"token": "first"}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
        "current-context": "x",
    }
    (tmp_path / "kubeconfig").write_text(json.dumps(document))
    with refusing_proxy(monkeypatch) as proxy:
        server = ApiServer(tmp_path / "kubeconfig")
        assert await status(server) == (0 if by_proxy else 200)
        await server.close()
        assert proxy.asked == ([f"CONNECT {host}:{api.port} HTTP/1.1"] if by_proxy else [])


@pytest.mark.parametrize(
    ("server", "without", "by_proxy"),
    [
        ("https://[2001:db8::1]:6443", "2001:db8::1", False),
        ("https://[2001:db8::1]:6443", "[2001:db8::1]", False),
        ("https://[2001:db8::1]:6443", "[2001:db8::1]:6443", False),
        ("https://[2001:db8::1]", "10.0.0.1, 2001:DB8::1", False),
        ("https://[2001:db8::1]:6443", "2001:db8::2", True),
        ("https://[2001:db8::1]:6443", "", True),
        ("https://192.0.2.1:6443", "192.0.2.1", False),
        ("https://192.0.2.1:6443", "192.0.2.1:6443", False),
        ("https://api.test:6443", ".test", False),
        ("https://api.test:6443", "*", False),
        ("https://api.test:6443", "other.test", True),
    ],
)
def test_a_server_of_no_proxy_is_reached_directly(
    monkeypatch: pytest.MonkeyPatch, server: str, without: str, by_proxy: bool
) -> None:
    for name in ("no_proxy", "https_proxy"):
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("https_proxy", "http://proxy.test:3128")
    monkeypatch.setenv("no_proxy", without)
    proxy, _ = _find_proxy(server, None, trust_env=True)
    assert (proxy is not None) is by_proxy


@given(
    st.recursive(
        st.text() | st.integers() | st.booleans() | st.none(),
        # YAML takes keys of up to 1,024 characters, and an escape has ten.
        lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=100), inner),
    )
)
def test_what_is_applied_is_the_same_read_as_yaml(value: Any) -> None:
    text = to_yaml({"value": value})
    assert text.isascii()
    assert yaml.safe_load(text) == {"value": value}


def test_a_character_of_four_bytes_is_one_escape() -> None:
    assert to_yaml({"note": "a\U0001f600é\x7f\\u"}) == b'{"note": "a\\U0001f600\\u00e9\\u007f\\\\u"}'
