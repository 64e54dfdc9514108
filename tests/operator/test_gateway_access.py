"""Keys, quotas and TLS of the gateway: from the resource to pods, Services and processes."""

import json
from pathlib import Path
from typing import Any

import pytest
from moe_contract.access_config import Auth, Jwt, Quota, Tls
from moe_contract.documents import parse_model
from moe_contract.gateway_config import GatewayConfig
from moe_contract.input_errors import InvalidInput
from moe_operator.api import MoEServing, parse_resource
from moe_operator.kubernetes.report import _endpoint
from moe_operator.local.folder import Folder
from moe_operator.local.record import load_record, save_record
from moe_operator.local.start import Programs, build_record, check_secrets, find_site
from moe_operator.plan import Defaults, LocalPlan, LocalSite, Observed, plan_cluster, plan_local, ports_needed
from moe_operator.plan.names import CONFIG

JWT = {"issuer": "https://login.test", "audience": "models", "jwksUrl": "https://login.test/keys"}
AUTH = {"secrets": ["team-keys", "more"], "jwt": JWT, "quota": {"requestsPerMinute": 600, "concurrency": 8}}
TLS = {"secretName": "cert", "clientCaSecret": "clients"}
Document = dict[str, Any]


def resource(**gateway: Any) -> MoEServing:
    spec = {"model": {"uri": "hf://org/a"}, "engine": {"runtime": "vllm-cpu"}, "gateway": gateway}
    document = {"apiVersion": "moeserving.dev/v1alpha1", "kind": "MoEServing", "metadata": {"name": "a"}, "spec": spec}
    return parse_resource(document)


def objects(**gateway: Any) -> list[Document]:
    return list(plan_cluster(resource(**gateway), "ns", Observed(tokens=("t",)), Defaults()).objects)


def gateway_template(**gateway: Any) -> Document:
    rows = {(row["kind"], row["metadata"]["name"]): row for row in objects(**gateway)}
    return dict(rows["Deployment", "a-gateway"]["spec"]["template"])


def service_port(**gateway: Any) -> Document:
    service = next(row for row in objects(**gateway) if (row["kind"], row["metadata"]["name"]) == ("Service", "a"))
    return dict(service["spec"]["ports"][0])


def gateway_config(**gateway: Any) -> GatewayConfig:
    return parse_model(GatewayConfig, json.loads(gateway_template(**gateway)["metadata"]["annotations"][CONFIG]))


def test_a_pod_mounts_each_secret_once_and_its_gateway_reads_them_there() -> None:
    spec = gateway_template(auth=AUTH, tls=TLS)["spec"]
    volumes = {row["name"]: row["secret"]["secretName"] for row in spec["volumes"] if row["name"].startswith("secret-")}
    assert list(volumes.values()) == ["team-keys", "more", "cert", "clients"]
    mounts = {row["name"]: row for row in spec["containers"][0]["volumeMounts"]}
    folders = {volumes[name]: mounts[name]["mountPath"] for name in volumes}
    assert folders == {name: f"/etc/moeserving-secrets/{name}" for name in volumes.values()}
    assert all(mounts[name]["readOnly"] for name in volumes)
    config = gateway_config(auth=AUTH, tls=TLS)
    assert config.auth == Auth(
        key_dirs=(Path(folders["team-keys"]), Path(folders["more"])),
        jwt=Jwt(issuer="https://login.test", audience="models", jwks_url="https://login.test/keys"),
        quota=Quota(requests_per_minute=600, concurrency=8),
    )
    assert config.tls == Tls(cert_dir=Path(folders["cert"]), client_ca_dir=Path(folders["clients"]))
    assert config.discovery is not None
    assert config.discovery.gateways == "a"


def test_without_these_sections_nothing_is_mounted_and_nobody_is_asked() -> None:
    config = gateway_config()
    assert (config.auth, config.tls, config.discovery.gateways) == (None, None, "a")
    assert not [row for row in gateway_template()["spec"]["volumes"] if row["name"].startswith("secret-")]


def test_probes_and_monitors_go_to_the_admin_port_which_stays_plain() -> None:
    container = gateway_template(tls=TLS)["spec"]["containers"][0]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["port"] == "admin"
        assert "scheme" not in container[probe]["httpGet"]


def test_the_service_says_by_its_ports_name_what_is_spoken() -> None:
    assert service_port()["name"] == "http"
    port = service_port(tls=TLS, service={"port": 443})
    assert (port["name"], port["port"], port["targetPort"]) == ("https", 443, "http")


@pytest.mark.parametrize(
    ("gateway", "url"),
    [
        ({}, "http://a.ns.svc"),
        ({"service": {"port": 8080}}, "http://a.ns.svc:8080"),
        ({"tls": TLS}, "https://a.ns.svc:80"),
        ({"tls": TLS, "service": {"port": 443}}, "https://a.ns.svc"),
        ({"service": {"port": 443}}, "http://a.ns.svc:443"),
    ],
)
def test_the_status_names_the_address(gateway: Document, url: str) -> None:
    assert _endpoint(gateway, "a.ns.svc") == url


def test_a_pod_template_cannot_take_a_secrets_volume_or_folder() -> None:
    volume = {"spec": {"volumes": [{"name": "secret-0", "emptyDir": {}}]}}
    with pytest.raises(InvalidInput, match="'secret-0' is the operator's own"):
        objects(auth=AUTH, podTemplate=volume)
    mount = {"name": "mine", "mountPath": "/etc/moeserving-secrets/more/sub"}
    container = {"name": "gateway", "volumeMounts": [mount]}
    spec = {"volumes": [{"name": "mine", "emptyDir": {}}], "containers": [container]}
    with pytest.raises(InvalidInput, match="is, holds or lies in /etc/moeserving-secrets/more"):
        objects(auth=AUTH, podTemplate={"spec": spec})


@pytest.mark.parametrize(
    ("gateway", "said"),
    [
        ({"auth": {}}, "spec.gateway.auth.secrets: Secrets with keys, a jwt or both are needed"),
        ({"auth": {"secrets": ["A b"]}}, "spec.gateway.auth.secrets"),
        ({"auth": {"jwt": {**JWT, "jwksUrl": "login.test/keys"}}}, "spec.gateway.auth.jwt.jwksUrl: an address such as"),
        ({"auth": {**AUTH, "quota": {"concurrency": 0}}}, "spec.gateway.auth.quota.concurrency"),
        ({"auth": {**AUTH, "quota": {"requests": 1}}}, "spec.gateway.auth.quota.requests: unknown field"),
        ({"tls": {}}, "spec.gateway.tls.secretName: required, but absent"),
    ],
)
def test_what_is_not_valid_is_refused_by_its_path(gateway: Document, said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        resource(**gateway)


# One machine.


@pytest.fixture
def secrets_dir(tmp_path: Path) -> Path:
    for name in ("team-keys", "more", "cert", "clients"):
        (tmp_path / "secrets" / name).mkdir(parents=True)
    (tmp_path / "secrets" / "team-keys" / "team-a").write_text("sk-0123456789abcdef")
    (tmp_path / "secrets" / "clients" / "ca.crt").write_text("pem")
    for name in ("tls.crt", "tls.key"):
        (tmp_path / "secrets" / "cert" / name).write_text("pem")
    return tmp_path / "secrets"


def site(**changes: Any) -> LocalSite:
    values = {"state_dir": Path("/s"), "token_file": Path("/s/t"), "ports": tuple(range(20000, 20010)), "cpus": 4}
    return LocalSite(**(values | {"memory_bytes": 64 << 30} | changes))


def local(secrets: Path | None, **gateway: Any) -> LocalPlan:
    return plan_local(resource(**gateway), site(secrets_dir=secrets))


def test_the_switch_of_the_live_page_reaches_the_gateway_on_one_machine_and_in_a_cluster() -> None:
    off = {"ui": {"enabled": False}}
    assert (local(None, **off).gateway.ui, gateway_config(**off).ui) == (False, False)
    assert (local(None).gateway.ui, gateway_config().ui) == (True, True)


def test_one_machine_reads_the_same_secrets_from_a_folder(secrets_dir: Path) -> None:
    plan = local(secrets_dir, auth=AUTH, tls=TLS)
    assert plan.gateway.auth is not None
    assert plan.gateway.auth.key_dirs == (secrets_dir / "team-keys", secrets_dir / "more")
    assert plan.gateway.tls == Tls(cert_dir=secrets_dir / "cert", client_ca_dir=secrets_dir / "clients")
    check_secrets(plan)


def test_without_that_folder_it_is_asked_for() -> None:
    advice = "on one machine name the folder that has them: moeserving up --secrets DIR, or MOESERVING_SECRETS"
    with pytest.raises(InvalidInput) as raised:
        local(None, auth=AUTH, tls=TLS)
    paths = ("spec.gateway.auth.secrets", "spec.gateway.tls.secretName")
    assert str(raised.value).splitlines() == [f"{path}: {advice}" for path in paths]
    assert local(None, auth={"jwt": JWT}).gateway.auth is not None


def test_files_are_checked_before_anything_starts(secrets_dir: Path) -> None:
    (secrets_dir / "cert" / "tls.key").unlink()
    with pytest.raises(InvalidInput, match=r"spec.gateway.tls: no file .*secrets/cert/tls.key"):
        check_secrets(local(secrets_dir, tls=TLS))
    (secrets_dir / "more" / "team-b").write_text("short")
    with pytest.raises(InvalidInput, match="more/team-b: key 1: has 5 characters"):
        check_secrets(local(secrets_dir, auth=AUTH))
    with pytest.raises(InvalidInput, match=r"auth.key_dirs: cannot read .*absent"):
        check_secrets(local(secrets_dir, auth={"secrets": ["absent"]}))


def test_the_record_keeps_the_folder_and_names_the_scheme(secrets_dir: Path, tmp_path: Path) -> None:
    folder = Folder(root=tmp_path, name="a")
    folder.make()
    wanted = resource(auth=AUTH, tls=TLS)
    found = find_site(wanted, folder, secrets_dir)
    assert len(found.ports) == ports_needed(wanted)
    record = build_record(wanted, folder, found, plan_local(wanted, found), Programs())
    assert record.endpoint.startswith("https://127.0.0.1:")
    save_record(folder, record)
    assert load_record(folder) == record
    assert record.site.secrets_dir == secrets_dir
