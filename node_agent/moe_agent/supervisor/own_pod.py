"""Name and address of this agent's own pod, or machine, as other nodes know them.

The plan hands both in through the downward API: a pod on the host's network has the host's name, which often stands for
a loopback address (`127.0.1.1` on Debian) and is not the pod's. Elsewhere they are looked up. Used by `moe_agent.app`.
"""

import socket
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from ipaddress import ip_address

from moe_contract.addresses import is_address
from moe_contract.agent_config import AgentConfig
from moe_contract.engine_process import POD_IP_VARIABLE
from moe_contract.input_errors import InputError, InvalidInput
from moe_contract.pod_identity import NAME_VARIABLE

from moe_agent.supervisor.node import Node

# Addresses of documentation (RFC 5737, RFC 3849), in no network: a UDP socket connects there without a packet.
_ELSEWHERE = ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1"))


def with_name(config: AgentConfig, environment: Mapping[str, str]) -> AgentConfig:
    """The configuration with the engine's name: the configured one, else the pod's, else the machine's."""
    name = config.name or environment.get(NAME_VARIABLE) or socket.gethostname()
    return config.model_copy(update={"name": name})


def with_own_address(node: Node, environment: Mapping[str, str]) -> Node:
    """The node with its own address in place of the leader's name, where it is the leader.

    vLLM listens there, and ZeroMQ does not resolve a name to listen on. Raises `InvalidInput` when this machine has no
    address that other nodes could reach.
    """
    if node.headless or is_address(node.leader):
        return node
    own = environment.get(POD_IP_VARIABLE) or find_own_address(socket.gethostname())
    if own is None:
        message = f"no address of this machine but loopback; set {POD_IP_VARIABLE} to one that other nodes reach"
        raise InvalidInput([InputError("engine.nodes", message)])
    return replace(node, leader=own)


def find_own_address(host_name: str) -> str | None:
    """An address of this machine that is no loopback: one of its name, else that of its route to other networks."""
    for address in (*_addresses_of_name(host_name), *_addresses_of_routes()):
        if not ip_address(address).is_loopback:
            return address
    return None


def _addresses_of_name(name: str) -> Iterator[str]:
    with suppress(OSError):
        for _, _, _, _, address in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM):
            yield str(address[0]).partition("%")[0]


def _addresses_of_routes() -> Iterator[str]:
    for family, elsewhere in _ELSEWHERE:
        with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((elsewhere, 9))
            yield str(probe.getsockname()[0])
