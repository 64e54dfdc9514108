"""Agents and gateways of a resource over HTTP: their states, and new settings for those that run.

A state is accepted, and settings with the control token are sent, only where `identity.py` allows it.
"""

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, TypeVar

import aiohttp
from moe_contract.addresses import http_url
from moe_contract.agent_state import AgentState
from moe_contract.clients import AgentClient, GatewayClient, PeerError, Refused
from moe_contract.engine_process import ADMIN_PORT_NAME, AGENT_PORT_NAME
from moe_contract.experts_state import ExpertsState
from moe_contract.gateway_state import GatewayState
from moe_contract.one_connection import one_connection

from moe_operator.autoscale.signal import States
from moe_operator.kubernetes.identity import Identity, judge_identity, says_uid
from moe_operator.plan.names import REVISION
from moe_operator.plan.pod_status import ENGINE, component_of, is_live, label_of
from moe_operator.plan.written_settings import build_body, differs_from

Document = dict[str, Any]
Answer = TypeVar("Answer")
Client = TypeVar("Client", AgentClient, GatewayClient)


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """A pod that can be asked.

    Attributes:
        pod: its name.
        url: of its agent, or of its gateway's admin port.
        component: `engine` or `gateway`.
        revision: of an engine; empty for a gateway.
        uid: of the pod.
        says_uid: whether the pod was made to say its uid in its answers.
    """

    pod: str
    url: str
    component: str
    revision: str
    uid: str = ""
    says_uid: bool = False


def find_peers(pods: Iterable[Document]) -> list[Peer]:
    """The pods that have an address, are not over and are not on their way out."""
    peers = []
    for pod in pods:
        address, component = pod.get("status", {}).get("podIP"), component_of(pod)
        port = _port(pod, AGENT_PORT_NAME if component == ENGINE else ADMIN_PORT_NAME)
        if not address or port is None or not is_live(pod):
            continue
        peers.append(
            Peer(
                pod=pod["metadata"]["name"],
                url=http_url(address, port),
                component=component,
                revision=label_of(pod, REVISION),
                uid=pod["metadata"].get("uid", ""),
                says_uid=says_uid(pod),
            )
        )
    return peers


def _port(pod: Document, name: str) -> int | None:
    for container in pod["spec"]["containers"]:
        for port in container.get("ports", []):
            if port.get("name") == name:
                return int(port["containerPort"])
    return None


async def fetch_state(session: aiohttp.ClientSession, peer: Peer) -> AgentState | GatewayState | None:
    """The state of a peer, whoever answers at its address; None without a usable answer."""
    if peer.component == ENGINE:
        return await _or_none(AgentClient(session, peer.url).state())
    return await _or_none(GatewayClient(session, peer.url).state())


def accept_states(answers: Iterable[tuple[Peer, AgentState | GatewayState | None]]) -> States:
    """The state of each peer that answers as itself; `strangers` has those where another pod answers."""
    engines, gateways, strangers = dict[str, AgentState](), dict[str, GatewayState](), set[str]()
    for peer, state in answers:
        if is_stranger(peer, state):
            strangers.add(peer.pod)
        elif isinstance(state, AgentState):
            engines[peer.pod] = state
        elif state is not None:
            gateways[peer.pod] = state
    return States(engines=engines, gateways=gateways, strangers=frozenset(strangers))


def is_stranger(peer: Peer, state: AgentState | GatewayState | None) -> bool:
    """Whether an answer, if there was one, is another pod's."""
    return state is not None and judge_identity(peer.uid, peer.says_uid, state) is Identity.OTHER


async def fetch_experts(session: aiohttp.ClientSession, peers: Sequence[Peer]) -> dict[str, ExpertsState]:
    """The experts of each engine that answers, in brief, by pod; those without an expert group are left out."""
    engines = [peer for peer in peers if peer.component == ENGINE]
    answers = await asyncio.gather(*(_or_none(AgentClient(session, peer.url).experts(brief=True)) for peer in engines))
    return {peer.pod: answer for peer, answer in zip(engines, answers, strict=True) if answer is not None}


async def _or_none(call: Coroutine[Any, Any, Answer]) -> Answer | None:
    try:
        return await call
    except PeerError:
        return None


async def put_settings(peer: Peer, settings: Mapping[str, Any], tokens: Sequence[str]) -> str:
    """Gives a running peer other settings; empty when it took them, else why not."""
    if peer.component == ENGINE:
        return await _control(peer, AgentClient, lambda client, token: client.put_settings(settings, (token,)), tokens)
    return await _control(peer, GatewayClient, lambda client, token: client.put_settings(settings, (token,)), tokens)


async def drain(peer: Peer, tokens: Sequence[str]) -> str:
    """Has an engine take nothing new and end once its streams are over; empty when it does, else why not."""
    return await _control(peer, AgentClient, lambda client, token: client.drain((token,)), tokens)


async def _control(
    peer: Peer,
    kind: Callable[[aiohttp.ClientSession, str], Client],
    call: Callable[[Client, str], Coroutine[Any, Any, None]],
    tokens: Sequence[str],
) -> str:
    """Makes a control call; empty when it was taken, else why not.

    The token goes out on the very connection on which the peer has just said its uid. After a 401 the next token has
    its turn, for while one is being replaced a peer may know only the old one yet.
    """
    problem = "cannot be changed: no control token"
    for token in tokens:
        try:
            async with one_connection() as session:
                client = kind(session, peer.url)
                if judge_identity(peer.uid, peer.says_uid, await client.state()) is not Identity.PROVED:
                    return "another pod answers at its address"
                await call(client, token)
        except Refused as error:
            problem = str(error)
            if error.status != HTTPStatus.UNAUTHORIZED:
                return problem
        except PeerError as error:
            return str(error)
        else:
            return ""
    return problem


def differs(wanted: Mapping[str, Any], peer: Peer, states: States) -> bool:
    """Whether the settings in force in a peer that answered are not the wanted ones."""
    return differs_from(wanted, _in_force(peer, states))


def build_change(wanted: Mapping[str, Any], peer: Peer, states: States) -> dict[str, Any]:
    """Returns the control body that gives a peer the wanted settings, by those that it said are in force."""
    return build_body(wanted, _in_force(peer, states))


def _in_force(peer: Peer, states: States) -> dict[str, Any]:
    state = states.engines.get(peer.pod) or states.gateways.get(peer.pod)
    return {} if state is None or state.config is None else state.config.document()
