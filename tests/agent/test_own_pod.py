"""The pod's own name and address, and the leader's address on the other nodes."""

import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from moe_agent.supervisor import own_pod
from moe_agent.supervisor.node import Node
from moe_agent.supervisor.own_pod import find_own_address, with_name, with_own_address
from moe_agent.vllm.leader_address import wait_for_address
from moe_contract.agent_config import AgentConfig
from moe_contract.engine_process import engine_environment
from moe_contract.input_errors import InvalidInput

NAME = "deep-0.deep.models"
LEADER, OTHER = (Node(index=index, leader=NAME, ranks=range(1)) for index in (0, 1))


def config(**engine: Any) -> AgentConfig:
    shape = {"port": 2, "model": "/m", "served_name": "m", "nodes": 2, "data_parallel": 2} | engine
    return AgentConfig.model_validate({"run_dir": "/r", "listen": {"port": 1}, "token_file": "/t", "engine": shape})


Names = dict[str, list[str]]


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Names:
    """The addresses of names, as a resolver knows them."""
    known: Names = {}

    def resolve(name: str, *_: object, **__: object) -> list[tuple[Any, ...]]:
        if name not in known:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(0, 0, 0, "", (address, 0)) for address in known[name]]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    return known


@pytest.fixture
def without_routes(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> Iterator[str]:
        yield from ()

    monkeypatch.setattr(own_pod, "_addresses_of_routes", none)


@pytest.mark.parametrize("address", ["10.1.2.3", "fd00::3"])
def test_the_leader_announces_the_address_of_its_pod(names: Names, address: str) -> None:
    names[socket.gethostname()] = ["127.0.1.1"]
    assert with_own_address(LEADER, {"MOESERVING_POD_IP": address}).leader == address


def test_other_nodes_and_addresses_stay_as_they_are() -> None:
    assert with_own_address(OTHER, {"MOESERVING_POD_IP": "10.1.2.3"}) is OTHER
    addressed = Node(index=0, leader="127.0.0.7", ranks=range(1))
    assert with_own_address(addressed, {"MOESERVING_POD_IP": "10.1.2.3"}) is addressed


@pytest.mark.usefixtures("without_routes")
@pytest.mark.parametrize(
    ("addresses", "wanted"),
    [
        (["10.0.0.5"], "10.0.0.5"),
        (["127.0.1.1", "10.0.0.5"], "10.0.0.5"),
        (["::1", "fd00::5"], "fd00::5"),
        (["fe80::1%eth0"], "fe80::1"),
        (["127.0.1.1"], None),
        ([], None),
    ],
)
def test_without_a_pods_address_that_of_the_machines_name_is_taken_unless_it_is_loopback(names, addresses, wanted):
    if addresses:
        names["machine"] = addresses
    assert find_own_address("machine") == wanted


def test_a_name_that_stands_for_loopback_gives_way_to_the_address_of_a_route(
    names: Names, monkeypatch: pytest.MonkeyPatch
) -> None:
    names["machine"] = ["127.0.1.1"]
    monkeypatch.setattr(own_pod, "_addresses_of_routes", lambda: iter(["10.0.0.6"]))
    assert find_own_address("machine") == "10.0.0.6"


@pytest.mark.usefixtures("without_routes")
def test_a_leader_that_others_cannot_reach_is_refused_with_what_to_set(names: Names) -> None:
    names[socket.gethostname()] = ["127.0.1.1"]
    with pytest.raises(InvalidInput, match=r"engine.nodes: no address .* set MOESERVING_POD_IP"):
        with_own_address(LEADER, {})


def test_this_machines_own_routes_are_no_loopback() -> None:
    for address in own_pod._addresses_of_routes():
        assert not address.startswith(("127.", "::1"))


def test_the_engine_has_the_pods_name_also_where_the_host_name_is_the_nodes() -> None:
    pod = {"MOESERVING_POD_NAME": "deep-engine-0"}
    assert with_name(config(), pod).name == "deep-engine-0"
    assert with_name(config(), {}).name == socket.gethostname()
    assert with_name(config().model_copy(update={"name": "mine"}), pod).name == "mine"


@pytest.mark.parametrize(
    ("engine", "inherited", "wanted"),
    [
        ({}, {"MOESERVING_POD_IP": "fd00::3"}, "fd00::3"),
        ({}, {"MOESERVING_POD_IP": "fd00::3", "VLLM_HOST_IP": "10.0.0.1"}, "10.0.0.1"),
        ({"env": {"VLLM_HOST_IP": "10.0.0.2"}}, {"MOESERVING_POD_IP": "fd00::3"}, "10.0.0.2"),
        ({}, {}, None),
        ({"nodes": 1}, {"MOESERVING_POD_IP": "fd00::3"}, None),
    ],
)
def test_each_node_of_several_tells_vllm_the_address_of_its_pod(engine, inherited, wanted):
    assert engine_environment(config(**engine), inherited, cpu_build=False, cpus=1).get("VLLM_HOST_IP") == wanted


@pytest.mark.parametrize("address", ["10.1.2.3", "fd00::3"])
def test_a_node_waits_until_its_leaders_name_has_an_address(names: Names, address: str, capsys) -> None:
    pauses: list[float] = []

    def pause(length_s: float) -> None:
        pauses.append(length_s)
        if len(pauses) == 40:
            names[NAME] = [address]

    assert wait_for_address(NAME, pause) == address
    assert len(pauses) == 40
    assert capsys.readouterr().out.count(f"waiting for the leader's address: {NAME}: Name or service") == 2


def test_an_address_needs_no_waiting(names: Names) -> None:
    no_pause: Callable[[float], None] = pytest.fail
    assert wait_for_address("fd00::3", no_pause) == "fd00::3"
