"""Agents and gateways of a resource over HTTP: their states, and new settings for those that run."""

import asyncio
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import aiohttp
from moe_contract.addresses import http_url
from moe_contract.clients import AgentClient, GatewayClient, PeerError
from moe_contract.engine_process import ADMIN_PORT_NAME, AGENT_PORT_NAME
from moe_contract.experts_state import ExpertsState

from moe_operator.autoscale.signal import States
from moe_operator.plan.names import COMPONENT, REVISION

Document = dict[str, Any]
Answer = TypeVar("Answer")
ENGINE = "engine"


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """A pod that can be asked.

    Attributes:
        pod: its name.
        url: of its agent, or of its gateway's admin port.
        component: `engine` or `gateway`.
        revision: of an engine; empty for a gateway.
    """

    pod: str
    url: str
    component: str
    revision: str


def find_peers(pods: Iterable[Document]) -> list[Peer]:
    """The pods that have an address and are not on their way out."""
    peers = []
    for pod in pods:
        address, labels = pod.get("status", {}).get("podIP"), pod["metadata"].get("labels", {})
        component = labels.get(COMPONENT)
        port = _port(pod, AGENT_PORT_NAME if component == ENGINE else ADMIN_PORT_NAME)
        if not address or port is None or "deletionTimestamp" in pod["metadata"]:
            continue
        peers.append(
            Peer(
                pod=pod["metadata"]["name"],
                url=http_url(address, port),
                component=component,
                revision=labels.get(REVISION, ""),
            )
        )
    return peers


def _port(pod: Document, name: str) -> int | None:
    for container in pod["spec"]["containers"]:
        for port in container.get("ports", []):
            if port.get("name") == name:
                return int(port["containerPort"])
    return None


async def fetch_states(session: aiohttp.ClientSession, peers: Sequence[Peer]) -> States:
    """The state of each peer that answers."""
    engines = [peer for peer in peers if peer.component == ENGINE]
    gateways = [peer for peer in peers if peer.component != ENGINE]
    agent_states, gateway_states = await asyncio.gather(
        asyncio.gather(*(_or_none(AgentClient(session, peer.url).state()) for peer in engines)),
        asyncio.gather(*(_or_none(GatewayClient(session, peer.url).state()) for peer in gateways)),
    )
    return States(engines=_by_pod(engines, agent_states), gateways=_by_pod(gateways, gateway_states))


async def fetch_experts(session: aiohttp.ClientSession, peers: Sequence[Peer]) -> dict[str, ExpertsState]:
    """The experts of each engine that answers, in brief, by pod; those without an expert group are left out."""
    engines = [peer for peer in peers if peer.component == ENGINE]
    answers = await asyncio.gather(*(_or_none(AgentClient(session, peer.url).experts(brief=True)) for peer in engines))
    return _by_pod(engines, answers)


def _by_pod(peers: Sequence[Peer], answers: Sequence[Answer | None]) -> dict[str, Answer]:
    return {peer.pod: answer for peer, answer in zip(peers, answers, strict=True) if answer is not None}


async def _or_none(call: Coroutine[Any, Any, Answer]) -> Answer | None:
    try:
        return await call
    except PeerError:
        return None


async def put_settings(
    session: aiohttp.ClientSession, peer: Peer, settings: Mapping[str, Any], tokens: Sequence[str]
) -> str:
    """Gives a running peer other settings; empty when it took them, else why not."""
    client = AgentClient if peer.component == ENGINE else GatewayClient
    try:
        await client(session, peer.url).put_settings(settings, tokens)
    except PeerError as error:
        return str(error)
    return ""


def differs(wanted: Mapping[str, Any], peer: Peer, states: States) -> bool:
    """Whether the settings in force in a peer that answered are not the wanted ones."""
    state = states.engines.get(peer.pod) or states.gateways.get(peer.pod)
    in_force = {} if state is None or state.config is None else state.config.document()
    return any(in_force.get(name) != value for name, value in wanted.items())
