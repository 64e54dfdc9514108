"""Variables of Services: all of them go, and nothing that a person set."""

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_contract.agent_config import AgentConfig
from moe_contract.engine_process import engine_environment
from moe_contract.service_links import without_service_links

OWN = {
    "PATH": "/bin",
    "VLLM_LOGGING_LEVEL": "DEBUG",
    "HF_ENDPOINT": "http://hub.test:80",
    "HTTP_PROXY": "http://p:3128",
}


def links(service: str, *ports: tuple[str, int, str], host: str = "10.96.0.7") -> dict[str, str]:
    """What the kubelet sets for a Service. Source: k8s.io/kubernetes v1.34, pkg/kubelet/envvars/envvars.go."""
    name = re.sub("-", "_", service.upper())
    _, first, protocol = ports[0]
    found = {f"{name}_SERVICE_HOST": host, f"{name}_SERVICE_PORT": str(first)}
    joined = f"[{host}]" if ":" in host else host
    found[f"{name}_PORT"] = f"{protocol.lower()}://{joined}:{first}"
    for title, number, protocol in ports:
        if title:
            found[f"{name}_SERVICE_PORT_{re.sub('-', '_', title.upper())}"] = str(number)
        stem = f"{name}_PORT_{number}_{protocol}"
        found[stem] = f"{protocol.lower()}://{joined}:{number}"
        found |= {f"{stem}_PROTO": protocol.lower(), f"{stem}_PORT": str(number), f"{stem}_ADDR": host}
    return found


HTTP = ("http", 80, "TCP")


@pytest.mark.parametrize(
    "found",
    [
        links("vllm", HTTP),
        links("master", HTTP),
        links("ray", ("", 6379, "TCP")),
        links("ray-head", ("gcs-server", 6379, "TCP"), ("dns", 53, "UDP")),
        links("vllm", HTTP, host="fd00::7"),
        links("nccl-port", ("assoc", 9, "SCTP")),
        links("vllm", HTTP) | links("vllm-port", HTTP) | links("vllm-service", HTTP),
    ],
    ids=min,
)
def test_no_variable_of_a_service_is_handed_on(found):
    assert without_service_links(OWN | found) == OWN


@pytest.mark.parametrize(
    "wanted",
    [
        {"MASTER_PORT": "29500", "MASTER_ADDR": "10.0.0.1"},
        {"VLLM_PORT": "8500"},
        {"RAY_ADDRESS": "ray://head:10001", "RAY_PORT": "6379"},
        {"HUB_SERVICE_HOST": "hub.company.test", "HUB_SERVICE_PORT": "443"},
        {"LMCACHE_URL": "tcp://cache:1", "REPORT": "tcp://x:1"},
    ],
)
def test_what_a_person_set_stays(wanted):
    assert without_service_links(OWN | wanted) == OWN | wanted
    beside = links("web", HTTP) | wanted
    assert without_service_links(OWN | beside) == OWN | wanted


def test_a_variable_that_a_person_set_wins_over_the_service_of_its_name_and_stays():
    given_both = links("vllm", HTTP) | {"VLLM_PORT": "8500"}
    assert without_service_links(OWN | given_both) == OWN | {"VLLM_PORT": "8500"}


def test_clients_in_the_pod_still_find_the_api_server():
    found = links("kubernetes", ("https", 443, "TCP"))
    kept = {f"KUBERNETES_SERVICE_{part}" for part in ("HOST", "PORT", "PORT_HTTPS")}
    assert without_service_links(OWN | found) == OWN | {name: found[name] for name in kept}


names = st.from_regex(r"[a-z]([a-z0-9-]{0,12}[a-z0-9])?", fullmatch=True).filter(lambda name: name != "kubernetes")
ports = st.tuples(
    st.sampled_from(["", "http", "grpc-web"]), st.integers(1, 65535), st.sampled_from(["TCP", "UDP", "SCTP"])
)


@given(
    st.lists(st.tuples(names, st.lists(ports, min_size=1, max_size=3)), max_size=4),
    st.dictionaries(st.from_regex(r"[A-Z_]{1,8}", fullmatch=True), st.text(max_size=8), max_size=6),
)
def test_of_any_services_nothing_is_left_and_of_others_nothing_is_lost(services: Any, others: dict[str, str]) -> None:
    found: dict[str, str] = {}
    for service, opened in services:
        found |= links(service, *opened)
    others = {name: value for name, value in others.items() if name not in found}
    left = without_service_links(found | others)
    assert not left.keys() & found.keys()
    lost = others.keys() - left.keys()
    assert all(re.search("_(SERVICE|PORT)", name) for name in lost), "only what has the form of a Service's variable"


def test_the_engine_gets_an_environment_without_services_and_what_the_resource_sets(tmp_path: Path):
    config = AgentConfig.model_validate(
        {
            "run_dir": tmp_path,
            "listen": {"port": 1},
            "token_file": tmp_path / "token",
            "engine": {"port": 2, "model": "/m", "served_name": "m", "env": {"MASTER_PORT": "29501"}},
        }
    )
    inherited = OWN | links("vllm", HTTP) | links("master", HTTP) | {"RAY_DEDUP_LOGS": "0"}
    environment = engine_environment(config, inherited, cpu_build=False, cpus=1)
    assert {name for name in environment if name.startswith(("VLLM_PORT", "VLLM_SERVICE", "MASTER_SERVICE"))} == set()
    assert environment["MASTER_PORT"] == "29501"
    assert environment.items() >= (OWN | {"RAY_DEDUP_LOGS": "0"}).items()
